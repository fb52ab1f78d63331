"""A folder of pictures with their captions: in files beside them, in one file for all, or in their names."""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmpipe.curate.sources.flavours import CAPTIONS, Columns, choose_files
from vlmpipe.curate.sources.pairs import Pair, Place, as_text, refused
from vlmpipe.curate.sources.source import Source
from vlmpipe.curate.urls import SUFFIXES, Reading, read_file
from vlmpipe.errors import UserError

PICTURES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
SIDECARS = (".txt", ".caption", ".json")
MAX_CAPTION = 1 << 20  # bytes of a caption's file


def pairs(root: Path, source: Source, columns: Columns, max_bytes: int) -> Iterator[Pair]:
    """The pairs of the folder `root`: every picture in it, in the order of names or of the captions file.

    Raises:
        UserError: no such folder, or a captions file that can't be used.
    """
    if not root.is_dir():
        raise UserError(f"found no folder {root}; expected a local folder of pictures; set the pool's `urls`")
    if source.captions == "name":
        yield from (_pair(root, name, _words(name), {}, max_bytes) for name in _pictures(root))
    elif files := _caption_files(root, source.captions):
        yield from _listed(root, files, columns, max_bytes)
    else:
        yield from (_with_sidecar(root, name, columns, max_bytes) for name in _pictures(root))


def _words(name: str) -> str:
    return Path(name).stem.replace("_", " ").replace("-", " ").strip()


def _pair(root: Path, name: str, caption: str, extra: dict, max_bytes: int, uid: str | None = None) -> Pair:
    return Pair(as_text(name), caption, extra, uid, place_of(root, name, max_bytes))


def place_of(root: Path, name: str, max_bytes: int) -> Place:
    """The place of the file `name` below `root`, or why it has none: nothing outside of `root` is ever read."""
    path = root / name
    try:
        if not path.resolve(strict=True).is_relative_to(root.resolve()):
            return refused("outside", "its name or a symbolic link leads out of the folder")
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            return refused("not_a_file", "a folder behind a link, a device or a pipe")
        if facts.st_size > max_bytes:
            return refused("too_large", f"{facts.st_size} bytes; at most {max_bytes}")
        name.encode()
        return Place(file=name, size=facts.st_size, sha256=_sha256(path))
    except PermissionError:
        return refused("unreadable", "no permission to read it")
    except UnicodeEncodeError:
        return refused("bad_name", "its name is not UTF-8")
    except (OSError, ValueError, RuntimeError) as error:  # missing, too long, a null byte, links in a circle
        return refused("missing_file", getattr(error, "strerror", None) or "no such file")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pictures(root: Path) -> Iterator[str]:
    """Names of all pictures below `root`, sorted within each folder. A link to a folder is not followed, but named."""
    for folder, inner, names in os.walk(root):
        inner.sort()
        links = [name for name in inner if os.path.islink(os.path.join(folder, name))]
        for name in sorted([*names, *links]):
            if name.lower().endswith(PICTURES) or name in links:
                yield os.path.relpath(os.path.join(folder, name), root)


# --- captions in files beside the pictures -----------------------------------------------------------------

def _with_sidecar(root: Path, name: str, columns: Columns, max_bytes: int) -> Pair:
    extra: dict[str, Any] = dict.fromkeys(columns.extra)
    found = next((path for path in _beside(root / name) if path.is_file()), None)
    if found is None:
        return Pair(as_text(name), "", extra, place=refused("no_caption", "no .txt, .caption or .json beside it"))
    if not found.resolve().is_relative_to(root.resolve()):
        return Pair(as_text(name), "", extra, place=refused("outside", "its caption's file leads out of the folder"))
    try:
        with open(found, "rb") as file:
            caption, extra = caption_in(found.suffix, file.read(MAX_CAPTION + 1), columns)
    except BadCaption as error:
        return Pair(as_text(name), "", extra, place=refused("bad_caption", str(error)))
    except OSError:
        return Pair(as_text(name), "", extra, place=refused("unreadable", "no permission to read its caption"))
    return _pair(root, name, caption, extra, max_bytes)


def _beside(picture: Path) -> Iterator[Path]:
    for suffix in SIDECARS:
        yield picture.with_suffix(suffix)
        yield picture.with_name(picture.name + suffix)


class BadCaption(ValueError):
    """A caption's file can't be used. Its text says why."""


def caption_in(suffix: str, data: bytes, columns: Columns) -> tuple[str, dict[str, Any]]:
    """Caption and extra columns out of the bytes of a .txt, .caption or .json file.

    Raises:
        BadCaption: it is too long, not json, or json without a caption.
    """
    if len(data) > MAX_CAPTION:
        raise BadCaption(f"more than {MAX_CAPTION} bytes")
    text = data.decode("utf-8-sig", errors="replace").strip()
    if suffix != ".json":
        return text, dict.fromkeys(columns.extra)
    facts = json_object(text)
    names = (columns.caption,) if columns.caption else CAPTIONS
    caption = next((facts[name] for name in names if facts.get(name) is not None), None)
    if caption is None:
        raise BadCaption(f"no {' or '.join(names[:2])} in its json")
    if isinstance(caption, list):
        caption = caption[0] if caption else ""
    return as_text(caption), {name: facts.get(name) for name in columns.extra}


def json_object(text: str) -> dict[str, Any]:
    """A json object out of untrusted text.

    Raises:
        BadCaption: it is something else.
    """
    try:
        facts = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadCaption(f"not json ({str(error).splitlines()[0]})") from None
    if not isinstance(facts, dict):
        raise BadCaption(f"json of a {type(facts).__name__}, not an object")
    return facts


# --- captions in one file ----------------------------------------------------------------------------------

def _caption_files(root: Path, name: str | None) -> list[Path]:
    if name == "sidecar":
        return []
    if name is not None:
        path = root / name
        if not path.is_file() or not name.endswith(SUFFIXES):
            raise UserError(f"found no captions file {path}; expected sidecar, name, or a file of "
                            f"{', '.join(SUFFIXES[:4])} below the folder; set source.captions")
        return [path]
    return [Path(folder) / file for folder, _, files in sorted(os.walk(root)) for file in METADATA if file in files]


def _listed(root: Path, files: list[Path], columns: Columns, max_bytes: int) -> Iterator[Pair]:
    """The rows of the captions files, whose names are relative to them; then the pictures that none of them names."""
    named = set()
    for file in files:
        reading = Reading(columns, choose_files)
        for row in read_file(str(file), reading):
            for pair in reading.pairs(row):
                name = os.path.relpath(file.parent / pair.url, root)
                named.add(name)
                yield _pair(root, name, pair.caption, dict(pair.extra), max_bytes, pair.uid)
    for name in _pictures(root):
        if name not in named:
            extra = dict.fromkeys(columns.extra)
            yield Pair(as_text(name), "", extra, place=refused("no_caption", "no captions file names it"))
