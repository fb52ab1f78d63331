"""Who is in which group: captions that a word list finds, values of a column, a number's range, a URL's region.

`Members` maps a group to the positions of its rows; a row may stand in several groups of a grouping, or in none.
"""

import itertools
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

Members = dict[str, np.ndarray]
# A list of words, or lists by language code.
Words = tuple[str, ...] | dict[str, tuple[str, ...]]
BEFORE, AFTER = r"(?:^|[^\pL\pM\pN_])", r"(?:$|[^\pL\pM\pN_])"
# Scripts that put no space between words: a listed word matches anywhere in them.
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
BELIEVED = 0.5  # a detected language of lower confidence is taken as unknown: short captions are often misjudged


def word_pattern(words: Sequence[str]) -> str:
    """A regular expression (RE2) that finds any of `words` as a whole word, in any case.

    A word ends where a letter, mark, digit or underscore does not follow (RE2's own word boundary knows ASCII only).
    """
    found: dict[tuple[str, str], list[str]] = {}
    for word in words:
        word = unicodedata.normalize("NFC", word.strip())
        edges = ("" if _unspaced(word[0]) else BEFORE, "" if _unspaced(word[-1]) else AFTER)
        found.setdefault(edges, []).append(_escaped(word))
    # The edges stand once for all words: their classes are what takes long to compile.
    return "(?i)" + "|".join(f"{before}(?:{'|'.join(some)}){after}" for (before, after), some in found.items())


def _escaped(word: str) -> str:
    return "".join(char if char.isalnum() or ord(char) > 127 else f"\\x{{{ord(char):x}}}" for char in word)


def _unspaced(char: str) -> bool:
    return unicodedata.name(char, "").startswith(UNSPACED)


def mentions(
    captions: pa.Array | pa.ChunkedArray, lists: Mapping[str, Words], languages: pa.Array | None = None
) -> Members:
    """Positions of the captions that mention a word of each list; a null caption mentions nothing.

    A list by language is read in captions of that language, so that German "man" (one) is no man. A caption whose
    language is null, or that none of the grouping's lists speaks, is read in all of them.

    Args:
        languages: the captions' language codes; none: unknown.
    """
    normal = pc.utf8_normalize(pc.fill_null(_whole_array(captions).cast(pa.string()), ""), form="NFC")
    spoken = sorted({code for words in lists.values() if isinstance(words, Mapping) for code in words})
    languages = pa.nulls(len(normal), pa.string()) if languages is None else _whole_array(languages).cast(pa.string())
    unspoken = ~_true(pc.is_in(languages, value_set=pa.array(spoken, pa.string())))
    return {name: np.flatnonzero(_mentioned(normal, words, languages, unspoken)) for name, words in lists.items()}


def _mentioned(normal: pa.Array, words: Words, languages: pa.Array, unspoken: np.ndarray) -> np.ndarray:
    if not isinstance(words, Mapping):
        return _true(pc.match_substring_regex(normal, word_pattern(words)))
    found = np.zeros(len(normal), bool)
    for code, listed in words.items():
        found |= _true(pc.match_substring_regex(normal, word_pattern(listed))) & (
            unspoken | _true(pc.equal(languages, code))
        )
    return found


def believed(languages: pa.ChunkedArray, confidence: pa.ChunkedArray | None) -> pa.Array:
    """The detected languages, null where the detector was not sure."""
    codes = _whole_array(languages).cast(pa.string())
    if confidence is None:
        return codes
    sure = pc.fill_null(pc.greater_equal(_whole_array(confidence).cast(pa.float64()), BELIEVED), False)
    return pc.if_else(sure, codes, pa.scalar(None, pa.string()))


def values(column: pa.Array | pa.ChunkedArray) -> Members:
    """Positions of the rows with each value of a column, by value; a null is in no group."""
    coded = _whole_array(column).cast(pa.string()).dictionary_encode()
    codes = pc.fill_null(coded.indices, -1).to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    names = coded.dictionary.to_pylist()
    edges = np.searchsorted(codes[order], np.arange(len(names) + 1))
    return dict(sorted((name, order[edges[i] : edges[i + 1]]) for i, name in enumerate(names)))


def ranges(column: pa.Array | pa.ChunkedArray, edges: Sequence[float]) -> Members:
    """Positions of the rows with a number below, between and from the edges up; null and NaN are in no group."""
    numbers = pc.fill_null(_whole_array(column).cast(pa.float64()), np.nan).to_numpy(zero_copy_only=False)
    names = [f"< {edges[0]:g}"]
    names += [f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)] + [f">= {edges[-1]:g}"]
    place = np.where(np.isnan(numbers), -1, np.searchsorted(edges, numbers, side="right"))
    return {name: np.flatnonzero(place == i) for i, name in enumerate(names)}


def join(parts: Mapping[str, Iterable[np.ndarray]]) -> Members:
    """Members gathered shard by shard, as one, groups by name."""
    return {group: np.concatenate([np.zeros(0, np.int64), *found]) for group, found in sorted(parts.items())}


def _whole_array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)


def _true(mask: pa.Array) -> np.ndarray:
    return pc.fill_null(mask, False).to_numpy(zero_copy_only=False)
