"""What the columns of a list mean: as its pool says, or recognised as one of the public metadata formats."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from vlmpipe.config import nearest
from vlmpipe.errors import UserError

RESERVED = (
    "uid", "url", "caption", "status", "reason", "detail", "http_status", "bytes", "sha256",
    "original_width", "original_height", "width", "height", "pool", "place",
)
CAPTIONS = ("caption", "text", "TEXT", "texts", "captions", "alt", "alt_text", "description", "sentences")
FILE_NAMES = ("file_name", "file", "filename", "image", "image_path", "filepath", "path")


@dataclass(frozen=True)
class Columns:
    """What a list calls its columns; null: recognised. `uid`: its own unique ids (null: made); `extra`: kept."""

    url: str | None = None
    caption: str | None = None
    uid: str | None = None
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        taken = [name for name in self.extra if name in RESERVED]
        if taken:
            raise UserError(f"found extra column '{taken[0]}'; expected another name than the pool's own columns; "
                            f"rename it in the list")


@dataclass(frozen=True)
class Chosen:
    """The columns of one list. `extra`: (name in the pool, name in the list)."""

    url: str
    caption: str
    uid: str | None = None
    extra: tuple[tuple[str, str], ...] = ()

    @property
    def wanted(self) -> list[str]:
        names = [self.url, self.caption, *([self.uid] if self.uid else []), *(name for _, name in self.extra)]
        return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Flavour:
    """A public metadata format: its url, caption and uid columns, and `marks`, which it has beside them."""

    name: str
    url: str
    caption: str
    uid: str | None = None
    marks: tuple[str, ...] = ()

    def fits(self, found: Sequence[str]) -> bool:
        return {self.url, self.caption, *self.marks} <= set(found)


# The first that fits. Sources: the datasets' own metadata files and cards.
FLAVOURS = (
    Flavour("DataComp", "url", "text", uid="uid", marks=("uid", "original_width", "original_height")),
    Flavour("PMD", "image_url", "texts", marks=("source", "meta")),
    Flavour("PMD", "image_url", "text", marks=("source", "meta")),
    Flavour("LAION", "URL", "TEXT"),
    Flavour("Conceptual Captions", "image_url", "caption"),
    Flavour("COYO", "url", "text"),
)


def choose(found: Sequence[str], columns: Columns, where: str) -> Chosen:
    """The columns of a URL list with columns `found`. A recognised format brings all its other columns along.

    Raises:
        UserError: the columns are not there, or of no format that is known.
    """
    if columns.url or columns.caption or {"url", "caption"} <= set(found):
        return _as_said(found, columns, where)
    flavour = next((flavour for flavour in FLAVOURS if flavour.fits(found)), None)
    if flavour is None:
        return _as_said(found, columns, where)  # says what is missing
    chosen = Chosen(flavour.url, flavour.caption, columns.uid or flavour.uid)
    return _with_extras(chosen, columns, found, flavour.name, where)


def _with_extras(chosen: Chosen, columns: Columns, found: Sequence[str], name: str, where: str) -> Chosen:
    names = columns.extra or [other for other in found if other not in chosen.wanted]
    extra = tuple((f"list_{other}" if other in RESERVED else other, other) for other in names)
    chosen = Chosen(chosen.url, chosen.caption, chosen.uid, extra)
    _expect(chosen.wanted, found, {}, where)
    kept = ", ".join(kept for kept, _ in extra) or "nothing else"
    uid = f", uid {chosen.uid}" if chosen.uid else ""
    print(f"{where}: {name} metadata (url {chosen.url}, caption {chosen.caption}{uid}; carried along: {kept})",
          file=sys.stderr, flush=True)
    return chosen


def _as_said(found: Sequence[str], columns: Columns, where: str) -> Chosen:
    extra = tuple((name, name) for name in columns.extra)
    chosen = Chosen(columns.url or "url", columns.caption or "caption", columns.uid, extra)
    keys = {chosen.url: "url", chosen.caption: "caption", chosen.uid: "uid"}
    known = "" if columns.url or columns.caption else (
        "; or the columns of " + ", ".join(dict.fromkeys(flavour.name for flavour in FLAVOURS)))
    _expect(chosen.wanted, found, keys, where, known)
    return chosen


def _expect(wanted: Sequence[str], found: Sequence[str], keys: dict, where: str, known: str = "") -> None:
    for name in wanted:
        if name not in found:
            same = [other for other in found if other.casefold() == name.casefold()]
            hint = f"; did you mean '{same[0]}'?" if same else nearest(name, found)
            raise UserError(
                f"{where}: found columns {', '.join(found) or '(none)'}; expected '{name}'{hint}{known}; "
                f"set the pool's columns.{keys.get(name, 'extra')}"
            )


def choose_files(found: Sequence[str], columns: Columns, where: str) -> Chosen:
    """The columns of a captions file: those of `imagefolder` (file_name, caption or text) and their usual names.

    Raises:
        UserError: no column that names files, or none of captions.
    """
    url = columns.url or pick(found, FILE_NAMES, "a column of file names", "url", where)
    caption = columns.caption or pick(found, CAPTIONS, "a caption column", "caption", where)
    chosen = Chosen(url, caption, columns.uid, tuple((name, name) for name in columns.extra))
    _expect(chosen.wanted, found, {url: "url", caption: "caption", columns.uid: "uid"}, where)
    return chosen


def pick(found: Sequence[str], names: Sequence[str], what: str, key: str, where: str) -> str:
    """The first of `names` that is `found`.

    Raises:
        UserError: none is.
    """
    for name in names:
        if name in found:
            return name
    raise UserError(f"{where}: found columns {', '.join(found) or '(none)'}; expected {what} ({', '.join(names)}); "
                    f"set the pool's columns.{key}")


def headerless(fields: Sequence[str]) -> list[str] | None:
    """Column names of a Conceptual Captions tsv, which has no header: CC3M is (caption, url), CC12M (url, caption)."""
    if len(fields) != 2:
        return None
    addresses = [field.strip().startswith(("http://", "https://")) for field in fields]
    if addresses == [True, False]:
        return ["url", "caption"]
    return ["caption", "url"] if addresses == [False, True] else None
