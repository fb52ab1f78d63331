"""The bytes of rows that have a place of their own: read, held to what was listed, decoded, spooled."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa

from vlmpipe.curate.failures import parse_failure, status_of
from vlmpipe.curate.pixels import Decoded
from vlmpipe.curate.pool import ShardTask
from vlmpipe.curate.sources.files import opened
from vlmpipe.curate.sources.pairs import Place
from vlmpipe.curate.sources.tables import bytes_and_path, rows_of
from vlmpipe.curate.spool import Spool
from vlmpipe.errors import disk_full


def is_placed(table: pa.Table, row: int) -> bool:
    """Whether a listed row has its bytes, or its refusal, in a place of its own; others are behind their URL."""
    return "place" in table.column_names and table["place"][row].is_valid


def read_rows(
    task: ShardTask, table: pa.Table, spool: Spool, rows: Sequence[int], decode: Callable[[bytes], Decoded]
) -> dict[int, dict]:
    """Finish the placed `rows` of a shard in its spool; return the facts of those that a later run may read."""
    failures: dict[int, dict] = {}
    uids = table["uid"].to_pylist()
    progress = task.state / "progress" / task.name
    progress.parent.mkdir(parents=True, exist_ok=True)
    with Reader(task.root) as reader:
        for row in rows:
            facts, image = _row(reader, Place(**table["place"][row].as_py()), decode)
            facts["uid"] = uids[row]
            if facts["status"] == "retriable":
                failures[row] = facts
            else:
                spool.append(facts, image)
            progress.write_text(str(len(spool.uids()) + len(failures)))
    return failures


def _row(reader: "Reader", place: Place, decode: Callable[[bytes], Decoded]) -> tuple[dict[str, Any], bytes | None]:
    if place.reason is not None:
        return _failed(place.reason, place.detail), None
    try:
        data = reader.read(place)
    except Unreadable as error:
        return _failed(*parse_failure(str(error))), None
    seen = {"bytes": len(data), "sha256": place.sha256}
    got = decode(data)
    if got.image is None:
        return _failed(*parse_failure(got.error)) | seen, None
    sizes = {name: getattr(got, name) for name in ("width", "height", "original_width", "original_height")}
    return {"status": "downloaded", "reason": None, "detail": None, **seen, **sizes}, got.image


def _failed(reason: str, detail: str | None) -> dict[str, Any]:
    return {"status": status_of(reason), "reason": reason, "detail": detail}


class Unreadable(Exception):
    """A picture can't be had now. Its text is `reason: detail`."""


class Reader:
    """Reads places below a root; keeps the last file open, since rows of a shard lie side by side."""

    def __init__(self, root: str):
        self.root = root
        self._name: str | None = None
        self._file: Any = None
        self._open = ExitStack()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: Any) -> None:
        self._open.close()

    def read(self, place: Place) -> bytes:
        """The bytes that were listed.

        Raises:
            Unreadable: the file is gone, can't be read, or says something else now.
        """
        try:
            data = self._read(place)
        except (OSError, ValueError, IndexError, StopIteration) as error:
            if disk_full(error):
                raise
            raise Unreadable(f"unreadable: {getattr(error, 'strerror', None) or type(error).__name__}") from None
        if hashlib.sha256(data).hexdigest() != place.sha256:
            raise Unreadable("changed: its bytes are not the ones that were listed; run again")
        return data

    def _read(self, place: Place) -> bytes:
        if place.row is not None:
            data, _ = bytes_and_path(self._at(place.file, rows_of).value(place.row, place.column))
            return data or b""
        file = self._at(place.file, opened)
        file.seek(place.offset or 0)
        return file.read(place.size)

    def _at(self, name: str, how: Callable[[str, str], AbstractContextManager]) -> Any:
        if name != self._name:
            self._open.close()
            self._name = None
            if "://" not in self.root:
                _check_inside(Path(self.root), name)
            self._file = self._open.enter_context(how(self.root, name))
            self._name = name
        return self._file


def _check_inside(root: Path, name: str) -> None:
    """A link may have been put there since the files were listed."""
    if not (root / name).resolve().is_relative_to(root.resolve()):
        raise OSError(None, "a symbolic link leads out of the folder")
