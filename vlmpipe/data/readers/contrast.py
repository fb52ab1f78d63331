"""Pictures with a true sentence and a false one that differs by a swap: SugarCrepe and Winoground."""

from collections.abc import Iterator
from pathlib import Path

from vlmpipe.data.fields import Entry, filled, find, found_files, lines, load, unique
from vlmpipe.data.records import ContrastRecord
from vlmpipe.errors import UserError


def read_sugarcrepe(path: Path) -> list[ContrastRecord]:
    """One record an entry of each file, in a directory all of them; slice `swap`: the file's name, such as swap_att.

    Format: https://github.com/RAIVNLab/sugar-crepe, data/*.json, arXiv 2306.14610.

    Raises:
        UserError: a file or field is missing or wrong.
    """
    path = Path(path)
    files = [path] if path.is_file() else found_files(path, "*.json")
    records = [_sugar(file.stem, number, entry) for file in files for number, entry in _numbered(file)]
    return filled(records, path, "pairs of sentences")


def _numbered(file: Path) -> Iterator[tuple[str, Entry]]:
    """The entries of an object by number, as published, or of a list."""
    content = load(file)
    if not isinstance(content, dict | list):
        raise UserError(f"{file}: found {type(content).__name__}; expected SugarCrepe's object by number")
    for number, value in content.items() if isinstance(content, dict) else enumerate(content):
        if not isinstance(value, dict):
            raise UserError(f"{file}: {number}: found {type(value).__name__}; expected an object; mend the file")
        yield str(number), Entry(value, f"{file}: {number}")


def _sugar(swap: str, number: str, entry: Entry) -> ContrastRecord:
    true, false = entry.field("caption", str), entry.field("negative_caption", str)
    if true == false:
        raise entry.wrong("negative_caption", "another text than the caption")
    name = f"{swap}-{number}"
    return ContrastRecord(name, entry.field("filename", str), true, (false,), name, {"swap": swap})


def read_winoground(path: Path) -> list[ContrastRecord]:
    """Two records a line, a group: each picture with its sentence, and the other's as the false one. Slice `swap`: the
    `collapsed_tag`, or else the `tag`.

    Format: https://huggingface.co/datasets/facebook/winoground, data/examples.jsonl, arXiv 2204.03162.

    Raises:
        UserError: a line or field is missing or wrong.
    """
    file, seen = find(path, "*.jsonl"), set()
    records = [record for entry in lines(file) for record in _winoground(entry, seen)]
    return filled(records, file, "pairs of pictures")


def _winoground(entry: Entry, seen: set[str]) -> list[ContrastRecord]:
    group = unique(entry, seen, "id")
    images = [entry.field(f"image_{k}", str) for k in range(2)]
    said = [entry.field(f"caption_{k}", str) for k in range(2)]
    if said[0] == said[1]:
        raise entry.wrong("caption_1", "another text than caption_0")
    tag = entry.optional("collapsed_tag", str) or entry.optional("tag", str)
    slices = {"swap": tag} if tag else {}
    return [
        ContrastRecord(f"{group}-{k}", images[k], said[k], (said[1 - k],), group, slices) for k in range(2)
    ]
