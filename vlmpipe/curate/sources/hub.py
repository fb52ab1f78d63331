"""A dataset of the hub, streamed: its pictures wait in the pool's state until their shards are made."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from vlmpipe.curate.sources.flavours import Columns
from vlmpipe.curate.sources.pairs import Pair, Place, refused
from vlmpipe.curate.sources.source import Source
from vlmpipe.curate.sources.tables import Meaning, bytes_and_path
from vlmpipe.curate.urls import Reading
from vlmpipe.errors import UserError, disk_full

PICTURES = "pictures"


def pairs(source: Source, columns: Columns, max_bytes: int, staged: Path) -> Iterator[Pair]:
    """The pairs of `source.hub`, their pictures written below `staged`. No code of the dataset's is run.

    Raises:
        UserError: the hub or the dataset can't be had, or its columns are not what is expected.
    """
    where = f"dataset {source.hub}"
    reading = Reading(columns)
    with _staging(staged, max_bytes) as keep:
        rows, schema = _stream(source, where)
        meaning = Meaning(schema, source, columns, where, reading)
        for number, row in enumerate(_reached(rows, where)):
            if meaning.image is None:
                yield from reading.pairs(row)
                continue
            data, _ = bytes_and_path(row[meaning.image])
            yield from meaning.pairs(row, f"{source.hub}#{number}", keep(data))


def _stream(source: Source, where: str) -> tuple[Any, pa.Schema]:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(
            source.hub, source.subset, split=source.split or "train", revision=source.revision, streaming=True)
        features = rows.features or rows._resolve_features().features
    except Exception as error:  # the library's, the hub's and the network's: none says what to do
        raise _unreached(error, where) from error
    for name, feature in features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows, features.arrow_schema


def _reached(rows: Any, where: str) -> Iterator[dict[str, Any]]:
    try:
        yield from rows
    except (UserError, GeneratorExit):
        raise
    except Exception as error:
        if disk_full(error):
            raise
        raise _unreached(error, where) from error


def _unreached(error: Exception, where: str) -> UserError:
    said = " ".join(str(error).split())[:300] or "no reason given"
    return UserError(f"can't stream {where} ({type(error).__name__}: {said}); expected a dataset of the hub that needs "
                     f"no code of its own; check source.hub, subset, split and revision, the network and HF_TOKEN")


@contextmanager
def _staging(directory: Path, max_bytes: int) -> Iterator[Callable[[bytes | None], Place]]:
    """A function that keeps a picture in a file of the directory, one behind the other, and says where."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / PICTURES, "wb") as file:

        def keep(data: bytes | None) -> Place:
            if data is None:
                return refused("no_image", "no bytes in its row")
            if len(data) > max_bytes:
                return refused("too_large", f"{len(data)} bytes; at most {max_bytes}")
            offset = file.tell()
            file.write(data)
            return Place(PICTURES, offset=offset, size=len(data), sha256=hashlib.sha256(data).hexdigest())

        yield keep
