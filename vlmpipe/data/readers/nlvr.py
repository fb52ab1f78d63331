"""NLVR2 (photographs, two of them a sentence) and Cornell NLVR (drawn, one a sentence): json lines of statements.

Formats: https://github.com/lil-lab/nlvr, nlvr2/README.md and nlvr/README.md. Consistency counts a sentence as right
when it is judged rightly of every picture it was shown with; groups are made as the official `metrics.py` makes them.
"""

from pathlib import Path, PurePosixPath

from vlmpipe.data.fields import Entry, filled, find, lines, unique
from vlmpipe.data.records import StatementRecord

PERMUTATIONS = 6  # Cornell NLVR shows each scene with its three boxes in every order


def read_nlvr2(path: Path) -> list[StatementRecord]:
    """One record a line. The identifier `split-set-pair-sentence` names the pictures and, without the pair, the group.

    Raises:
        UserError: a line or field is missing or wrong.
    """
    file = find(path, "*.json", "*.jsonl")
    seen: set[str] = set()
    return filled([_pair(entry, seen) for entry in lines(file)], file, "statements")


def _pair(entry: Entry, seen: set[str]) -> StatementRecord:
    identifier = unique(entry, seen, "identifier")
    parts = identifier.split("-")
    if len(parts) != 4:
        raise entry.wrong("identifier", "split-set-pair-sentence such as dev-850-0-0")
    split, number, pair, sentence = parts
    slices = {"split": split} | {name: entry.name(name) for name in ("synset",) if entry.values.get(name)}
    return StatementRecord(
        identifier, tuple(f"{split}-{number}-{pair}-img{side}.png" for side in (0, 1)),
        entry.field("sentence", str), _label(entry), f"{split}-{number}-{sentence}", slices,
    )


def read_nlvr(path: Path) -> list[StatementRecord]:
    """Cornell NLVR. A line stands for its six pictures, or, where it names an `image`, for that one alone.

    Raises:
        UserError: a line or field is missing or wrong.
    """
    file = find(path, "*.json", "*.jsonl")
    seen: set[str] = set()
    records = [record for entry in lines(file) for record in _drawn(entry, seen, file.stem)]
    return filled(records, file, "statements")


def _drawn(entry: Entry, seen: set[str], split: str) -> list[StatementRecord]:
    identifier = unique(entry, seen, "identifier")
    sentence, label, group = entry.field("sentence", str), _label(entry), identifier.partition("-")[0]
    if entry.values.get("image") is not None:
        name = PurePosixPath(entry.field("image", str)).name
        return [StatementRecord(identifier, (name,), sentence, label, group)]
    return [
        StatementRecord(f"{identifier}-{number}", (f"{split}-{identifier}-{number}.png",), sentence, label, group)
        for number in range(PERMUTATIONS)
    ]


def _label(entry: Entry) -> bool | None:
    """Text in some releases, a boolean in others; None in a hidden test split."""
    label = entry.optional("label", str, bool)
    if label is None:
        return None
    if str(label).lower() not in ("true", "false"):
        raise entry.wrong("label", "true or false")
    return str(label).lower() == "true"
