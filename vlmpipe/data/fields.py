"""Annotation files of others: json whose fields are checked as they are read, so that an error names file and field."""

import json
import reprlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmpipe.errors import UserError

SHORT = reprlib.Repr()  # looks at no more of a value than it shows
SHORT.maxlevel, SHORT.maxstring = 2, 80


@dataclass(frozen=True, slots=True)
class Entry:
    """One json object, and where it stands: "captions.json: annotations[3]"."""

    values: dict[str, Any]
    where: str

    def wrong(self, name: str, expected: str, found: str | None = None) -> UserError:
        """The one line for a field that is not as it should be; `found` where the value alone doesn't say it."""
        return UserError(f"{self.where}.{name}: found {found or _shown(self.values.get(name))}; expected {expected}; "
                         f"mend the file")

    def field(self, name: str, *kinds: type) -> Any:
        """A field that must be there, of one of `kinds`.

        Raises:
            UserError: it is missing or of another type.
        """
        value = self.values.get(name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.wrong(name, " or ".join(kind.__name__ for kind in kinds))
        return value

    def optional(self, name: str, *kinds: type, default: Any = None) -> Any:
        """A field that may be missing or null."""
        return default if self.values.get(name) is None else self.field(name, *kinds)

    def objects(self, name: str) -> Iterator["Entry"]:
        """The objects of a list."""
        return _objects(self.field(name, list), f"{self.where}.{name}")

    def object(self, name: str) -> "Entry":
        return Entry(self.field(name, dict), f"{self.where}.{name}")

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings."""
        for index, text in enumerate(values := self.field(name, list)):
            if not isinstance(text, str):
                raise self.wrong(f"{name}[{index}]", "str", _shown(text))
        return tuple(values)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` finite numbers."""
        values = self.field(name, list)
        if len(values) != count or not all(is_number(value) for value in values):
            raise self.wrong(name, f"{count} numbers", short(values))
        return tuple(float(value) for value in values)

    def name(self, field: str) -> str:
        """An id, number or text, as text."""
        return str(self.field(field, int, str))


def is_number(value: Any) -> bool:
    """Finite, also as a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def short(value: Any) -> str:
    """The beginning of what a value looks like."""
    return SHORT.repr(value)[:80]


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {short(value)}"


def _objects(values: list, where: str) -> Iterator[Entry]:
    for index, value in enumerate(values):
        if not isinstance(value, dict):
            raise UserError(f"{where}[{index}]: found {type(value).__name__}; expected an object; mend the file")
        yield Entry(value, f"{where}[{index}]")


# --- files -------------------------------------------------------------------------------------------------

def find(path: Path, *patterns: str) -> Path:
    """`path` itself if it is a file, or the only file below the directory `path` that fits a pattern.

    Raises:
        UserError: there is none, or there are several.
    """
    path = Path(path)
    if path.is_file():
        return path
    found = found_files(path, *patterns)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise UserError(f"{path}: found {len(found)} files {' or '.join(patterns)} ({names}); expected exactly one; "
                        f"keep one split of one dataset in a directory, or name the file itself")
    return found[0]


def found_files(directory: Path, *patterns: str) -> list[Path]:
    """The files of a directory that fit any of the patterns, by name."""
    return sorted({file for pattern in patterns for file in Path(directory).glob(pattern) if file.is_file()})


def load(path: Path) -> Any:
    """The content of a json file.

    Raises:
        UserError: the file is missing, or is not json.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"found no file {path}; expected an annotation file; check the path") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: found {str(error).splitlines()[0]}; expected json; restore the file") from None


def entries(path: Path, key: str | None = None) -> Iterator[Entry]:
    """The objects of a json file: those of its list `key`, or, without a key, of the list that it is.

    Raises:
        UserError: the file is not laid out so.
    """
    return listed(load(path), path, key)


def listed(content: Any, path: Path, key: str | None = None) -> Iterator[Entry]:
    """As `entries`, of what a file holds."""
    values = content.get(key) if key and isinstance(content, dict) else content
    if not isinstance(values, list) or (key and not isinstance(content, dict)):
        wanted = f"list '{key}'" if key else "list of objects"
        raise UserError(f"{path}: found no {wanted}; expected the official layout; check that it is the right file")
    return _objects(values, f"{path}: {key}" if key else f"{path}: ")


def lines(path: Path) -> Iterator[Entry]:
    """The objects of a file of json lines; empty lines are skipped.

    Raises:
        UserError: a line is something else.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _line(line, f"{path}, line {number}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: found {error}; expected json lines in UTF-8; restore the file") from None


def _line(line: str, where: str) -> Entry:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: found {str(error).splitlines()[0]}; expected json; restore the file") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: found {type(value).__name__}; expected an object per line; mend the file")
    return Entry(value, where)


def unique(entry: Entry, seen: set[str], name: str) -> str:
    """The id in field `name`, once.

    Raises:
        UserError: another entry has it too.
    """
    own = entry.name(name)
    if own in seen:
        raise entry.wrong(name, f"a {name} of its own", f"{own} a second time")
    seen.add(own)
    return own


def filled(records: list, path: Path, what: str) -> list:
    """`records`, of which there is at least one.

    Raises:
        UserError: there is none.
    """
    if not records:
        raise UserError(f"{path}: found 0 {what}; expected at least one; check the file")
    return records
