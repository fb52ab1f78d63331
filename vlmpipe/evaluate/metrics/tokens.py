"""Words of a caption as the COCO caption evaluation splits them, in Python alone.

The official tools run Stanford's tokenizer, a Java program, in lower case, and drop punctuation. These rules follow it
where captions go (docs/metrics.md); rare abbreviations and symbols may come out otherwise. Callers who have the
official tokens pass them joined by spaces, with tokenize="plain".
"""

import re

# The list of the official tools. Brackets stay: the tokenizer writes them "-lrb-", the list has them in capitals.
PUNCTUATION = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

_LIKE_ASCII = str.maketrans({
    "‘": "'", "’": "'", "“": '"', "”": '"', "«": '"', "»": '"', "–": "--", "—": "--", "…": "...", "\u00a0": " ",
    "\u00ad": None,
})
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TITLES = "mr|mrs|ms|dr|st|jr|sr|prof|gen|lt|col|capt|rev|gov|sen|rep|inc|co|corp|ltd|etc|vs|ave|blvd|rd|mt|ft|ca"
_TOKEN = re.compile(
    rf"""
      https?://\S+ | www\.\S+
    | \w+(?:[.+-]\w+)*@\w+(?:\.\w+)+           # an address
    | (?:{_TITLES})\.(?![\w])
    | [a-z](?:\.[a-z])+\.(?![^\W_])            # u.s., p.m.
    | \b(?-i:[A-Z])\.(?![^\W_])                # an initial
    | '(?:\d0s|tis\b|twas\b|n\b'?|em\b|til\b)   # '80s
    | \d+(?:[.,:]\d+)+
    | [^\W_]+(?:[-_/'.][^\W_]+)*
    | \.{{2,}} | -{{2,}} | [?!]+
    | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)
_NOT = re.compile(r"(.+)(n't)")
_CLITIC = re.compile(r"(.+)('(?:s|m|d|re|ve|ll))")
_GLUED = {
    "cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na"),
    "gimme": ("gim", "me"), "lemme": ("lem", "me"), "'tis": ("'t", "is"), "'twas": ("'t", "was"),
}


def ptb_tokens(text: str) -> list[str]:
    """The lower-case words of `text`, contractions apart ("do", "n't"), without punctuation."""
    words = []
    for match in _TOKEN.finditer(text.translate(_LIKE_ASCII)):
        words.extend(_parts(match[0].lower()))
    return [word for word in words if word not in PUNCTUATION and word.strip('."')]


def _parts(token: str) -> tuple[str, ...]:
    if token in _GLUED:
        return _GLUED[token]
    for rule in (_NOT, _CLITIC):
        if match := rule.fullmatch(token):
            return match.groups()
    return (_BRACKETS.get(token, token),)
