"""MetaCLIP's balancing: frequent concepts are thinned to a cap, rare ones stay.

Source: facebookresearch/MetaCLIP, metaclip/substr_matching.py and balancing.py (Xu et al., "Demystifying CLIP Data",
arXiv 2309.16671, algorithm 1).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from vlmpipe.curate.columns import Rows
from vlmpipe.curate.rules import Drops, read_list, uniform
from vlmpipe.errors import UserError
from vlmpipe.shards import read_json

WRAPPED, SPACES = (",", ".", ";", ":", "?", "!", "`"), ("\t", "\n", "\r")


@dataclass(frozen=True)
class Balance:
    """Keeps a caption with probability 1 - Π(1 - min(1, cap / count)) over the entries of `metadata` that it holds.

    An entry matches as a substring of the caption with spaces around both. A caption that holds none is dropped. The
    draw is a hash of the uid and `seed`, so it is the same in every run. Value: that number; threshold: the
    probability it had to stay under. `count` is over the rows that reach the rule, so it stands last.
    """

    metadata: Path
    cap: int = 20_000
    seed: int = 0
    column: str = "caption"
    alone: ClassVar = False

    def __post_init__(self):
        if self.cap < 1:
            raise UserError(f"found cap {self.cap}; expected at least 1 (MetaCLIP: 20,000 for 400 million pairs)")

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        matcher = Matcher(entries_of(self.metadata))
        row, entry = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for here, table in rows.scan([self.column], alive):
            found = [matcher(caption or "") for caption in table[self.column].to_pylist()]
            row.append(np.repeat(np.arange(here.start, here.stop), [len(one) for one in found]))
            entry.append(np.array([number for one in found for number in one], np.int64))
        chance = probabilities(np.concatenate(row), np.concatenate(entry), len(alive), self.cap)
        draw = uniform(rows.uids(alive), self.seed)
        bad = draw >= chance
        return Drops(alive[bad], draw[bad], chance[bad])


def probabilities(row: np.ndarray, entry: np.ndarray, rows: int, cap: int) -> np.ndarray:
    """Of each row the chance to stay, float64 [rows]; `row` and `entry` are the matches, each once."""
    kept = np.minimum(1, cap / np.bincount(entry)[entry]) if len(entry) else np.zeros(0)
    with np.errstate(divide="ignore"):  # an entry under the cap: the row stays for certain
        return -np.expm1(np.bincount(row, np.log1p(-kept), rows))


def entries_of(path: Path) -> list[str]:
    """The entries of a metadata file: a json list, as MetaCLIP publishes, or text with one a line."""
    if Path(path).suffix != ".json":
        return read_list(path)
    found = read_json(path)
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise UserError(f"{path}: expected a json list of texts, as MetaCLIP's metadata.json")
    return found


def spaced(text: str) -> str:
    """A caption as MetaCLIP matches in it: punctuation and both ends set apart by spaces."""
    text = f" {text} "
    for mark in WRAPPED:
        text = text.replace(mark, f" {mark} ")
    for space in SPACES:
        text = text.replace(space, " ")
    return text


class Matcher:
    """Which of the entries stand in a caption: a text is cut at its spaces, where alone an entry can begin and end."""

    def __init__(self, entries: Iterable[str]):
        self._entries = {tuple(entry.split(" ")): number for number, entry in enumerate(entries)}
        self._lengths: dict[str, set[int]] = {}
        for words in self._entries:
            self._lengths.setdefault(words[0], set()).add(len(words))

    def __call__(self, caption: str) -> list[int]:
        """Positions of the matching entries, each once, ascending."""
        words = spaced(caption)[1:-1].split(" ")
        found = set()
        for start, word in enumerate(words):
            for length in self._lengths.get(word, ()):
                number = self._entries.get(tuple(words[start : start + length]))
                if number is not None:
                    found.add(number)
        return sorted(found)
