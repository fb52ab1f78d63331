"""The bytes of rows that have a place of their own: read, held to what was listed, decoded."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa

from vlmpipe.curate.failures import parse_failure, status_of
from vlmpipe.curate.pixels import Decoded, DecoderPool
from vlmpipe.curate.pool import ShardTask
from vlmpipe.curate.sources.files import opened
from vlmpipe.curate.sources.pairs import Place
from vlmpipe.curate.sources.tables import bytes_and_path, rows_of
from vlmpipe.errors import disk_full
from vlmpipe.shards import batched


def is_placed(table: pa.Table, row: int) -> bool:
    """Whether a listed row has its bytes, or its refusal, in a place of its own; others are behind their URL."""
    return "place" in table.column_names and table["place"][row].is_valid


def read_rows(
    task: ShardTask, table: pa.Table, rows: Sequence[int], decoders: DecoderPool
) -> Iterator[tuple[int, dict[str, Any], bytes | None]]:
    """Read and decode the placed `rows` of a shard; yields (row, its facts, the image to store), in order."""
    with Reader(task.root) as reader, ThreadPoolExecutor(decoders.size) as threads:
        for few in batched(rows, 2 * decoders.size):
            started = [(row, *_start(reader, Place(**table["place"][row].as_py()), decoders, threads)) for row in few]
            for row, facts, decoding in started:
                got = decoding.result() if decoding else None
                yield row, facts | (outcome(got) if got else {}), got and got.image


def _start(
    reader: "Reader", place: Place, decoders: DecoderPool, threads: ThreadPoolExecutor
) -> tuple[dict[str, Any], Future | None]:
    if place.reason is not None:
        return _failed(place.reason, place.detail), None
    try:
        data = reader.read(place)
    except Unreadable as error:
        return _failed(*parse_failure(str(error))), None
    return {"bytes": len(data), "sha256": place.sha256}, threads.submit(decoders.decode, data)


def outcome(got: Decoded) -> dict[str, Any]:
    """A row's facts after decoding."""
    if got.image is None:
        return _failed(*parse_failure(got.error))
    sizes = {name: getattr(got, name) for name in ("width", "height", "original_width", "original_height")}
    return {"status": "downloaded", "reason": None, "detail": None, **sizes}


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
