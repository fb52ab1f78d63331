"""Hugging Face datasets as pools: saved to disk, as parquet, or streamed from the hub by their id.

Pictures lie in a column of bytes; a dataset with addresses in their place is a URL list.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlmpipe.curate.sources.files import opened, root_and_files
from vlmpipe.curate.sources.flavours import CAPTIONS, Columns, pick
from vlmpipe.curate.sources.folder import place_of
from vlmpipe.curate.sources.pairs import Pair, Place, as_text, each_text, refused
from vlmpipe.curate.sources.source import Source
from vlmpipe.curate.urls import Reading
from vlmpipe.errors import UserError
from vlmpipe.shards import is_there

SUFFIXES = (".parquet", ".arrow")
NAMES = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "bytes")
BATCH = 64  # rows with pictures in them


def pairs(urls: str, source: Source, columns: Columns, max_bytes: int) -> Iterator[Pair]:
    """The pairs of a dataset at `urls`, in its order.

    Raises:
        UserError: there is none, its split is not clear, a file is damaged, no column holds pictures or addresses.
    """
    root, files = _files(urls, source)
    reading = Reading(columns)
    for name in files:
        with _table(root, name) as table:
            meaning = Meaning(table.schema, source, columns, f"{root}/{name}", reading)
            for first, batch in table.batches(meaning.wanted):
                for number, row in enumerate(batch.to_pylist(), first):
                    if meaning.image is None:
                        yield from reading.pairs(row)
                    else:
                        lies = Place(name, row=number, column=meaning.image)
                        place = _place(row[meaning.image], lies, root, max_bytes)
                        yield from meaning.pairs(row, f"{name}#{number}", place)


def _place(value: Any, place: Place, root: str, max_bytes: int) -> Place:
    data, path = bytes_and_path(value)
    if data is None and path and "://" not in root:
        return place_of(Path(root), path, max_bytes)
    if data is None:
        return refused("no_image", "no bytes in its row")
    if len(data) > max_bytes:
        return refused("too_large", f"{len(data)} bytes; at most {max_bytes}")
    return Place(place.file, row=place.row, column=place.column, sha256=hashlib.sha256(data).hexdigest())


def bytes_and_path(value: Any) -> tuple[bytes | None, str | None]:
    """What a cell of an image column holds."""
    if isinstance(value, dict):
        return value.get("bytes"), value.get("path")
    return value, None


class Meaning:
    """What the columns of a dataset mean: `image` is the column of pictures, None where `reading` has addresses."""

    def __init__(self, schema: pa.Schema, source: Source, columns: Columns, where: str, reading: Reading):
        self.columns, found = columns, schema.names
        self.image = _image_column(schema, source.image, where)
        if self.image is None:
            self.wanted = _settle(reading, found, where)
            return
        self.caption = columns.caption or pick(found, CAPTIONS, "a caption column", "caption", where)
        self.url = columns.url or ("url" if "url" in found else None)
        names = [self.image, self.caption, self.url, columns.uid, *columns.extra]
        self.wanted = list(dict.fromkeys(name for name in names if name))
        missing = [name for name in self.wanted if name not in found]
        if missing:
            raise UserError(f"{where}: found columns {', '.join(found)}; expected '{missing[0]}'; set the pool's "
                            f"columns")

    def pairs(self, row: dict[str, Any], address: str, place: Place) -> Iterator[Pair]:
        """A pair for each caption of a row."""
        extra = {name: row[name] for name in self.columns.extra}
        texts = each_text(row[self.caption])
        for number, caption in enumerate(texts):
            uid = None if self.columns.uid is None else str(row[self.columns.uid])
            own = f"{uid}_{number}" if uid and len(texts) > 1 else uid
            yield Pair(as_text(row[self.url]) if self.url else address, caption, extra, own, place)


def _settle(reading: Reading, found: Sequence[str], where: str) -> list[str]:
    try:
        return reading.settle(found, where)
    except UserError as error:
        raise UserError(f"{error}; or a column of pictures (an Image feature, {{bytes, path}}, or bytes called "
                        f"{', '.join(NAMES[:4])}): set source.image") from None


def _image_column(schema: pa.Schema, said: str | None, where: str) -> str | None:
    features = _features(schema)
    if said is not None:
        if said not in schema.names or not _holds_bytes(schema.field(said).type):
            raise UserError(f"{where}: found columns {', '.join(schema.names)}; expected pictures in '{said}'; "
                            f"set source.image")
        return said
    found = [field.name for field in schema if _is_image(field, features.get(field.name))]
    if len(found) > 1:
        raise UserError(f"{where}: found pictures in {', '.join(found)}; expected one column; set source.image")
    return found[0] if found else None


def _features(schema: pa.Schema) -> dict[str, Any]:
    """The feature kinds that `datasets` notes in a file's schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, ValueError):
        return {}


def _holds_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or _is_cell(kind)


def _is_cell(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}


def _is_image(field: pa.Field, feature: str | None) -> bool:
    if feature is not None and feature not in ("Image", "Value"):
        return False  # sound has the same form
    return _is_cell(field.type) or (_holds_bytes(field.type) and field.name.casefold() in NAMES)


# --- files of a dataset ------------------------------------------------------------------------------------

def _files(urls: str, source: Source) -> tuple[str, list[str]]:
    root = urls.rstrip("/")
    if not source.files and is_there(f"{root}/dataset_dict.json"):
        split = _split(source, _json(root, "dataset_dict.json")["splits"], root)
        return root, [f"{split}/{name}" for name in _saved(f"{root}/{split}")]
    if not source.files and is_there(f"{root}/state.json"):
        return root, _saved(root)
    root, names = root_and_files(urls, source.files, SUFFIXES)
    if source.split is None or source.files:
        return root, names
    kept = [name for name in names if _is_of(name, source.split)]
    if not kept:
        raise UserError(f"{root}: found no file of split '{source.split}' ({', '.join(names[:4])}); expected "
                        f"{source.split}-*.parquet or a folder {source.split}/; set source.split or source.files")
    return root, kept


def _is_of(name: str, split: str) -> bool:
    stem = Path(name).stem
    return stem == split or stem.startswith(f"{split}-") or split in Path(name).parts[:-1]


def _split(source: Source, known: Sequence[str], root: str) -> str:
    split = source.split or ("train" if "train" in known or len(known) > 1 else known[0])
    if split not in known:
        raise UserError(f"{root}: found splits {', '.join(known)}; expected '{split}'; set source.split")
    return split


def _saved(root: str) -> list[str]:
    """The files that `save_to_disk` notes."""
    return [entry["filename"] for entry in _json(root, "state.json")["_data_files"]]


def _json(root: str, name: str) -> Any:
    with opened(root, name) as file:
        try:
            return json.load(file)
        except ValueError:
            raise UserError(f"found {root}/{name} that is not json; expected a dataset as save_to_disk writes it; "
                            f"save it again") from None


# --- rows of a file ----------------------------------------------------------------------------------------

class ParquetRows:
    """A parquet file: batches in order, and single values where the rows asked for are mostly neighbours."""

    def __init__(self, file: Any):
        self.file = pq.ParquetFile(file)
        self.schema = self.file.schema_arrow
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._first, self._values, self._column = 0, [], ""

    def batches(self, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        first = 0
        for batch in self.file.iter_batches(columns=list(columns), batch_size=BATCH):
            yield first, batch
            first += batch.num_rows

    def value(self, row: int, column: str) -> Any:
        if column != self._column or row < self._first:
            self._start(row, column)
        while row >= self._first + len(self._values):
            self._first += len(self._values)
            self._values = next(self._batches).column(0).to_pylist()
        return self._values[row - self._first]

    def _start(self, row: int, column: str) -> None:
        """Begin at the row group that holds `row`."""
        group, first = 0, 0
        while row >= first + self.file.metadata.row_group(group).num_rows:
            first += self.file.metadata.row_group(group).num_rows
            group += 1
        groups = range(group, self.file.num_row_groups)
        self._batches = self.file.iter_batches(columns=[column], batch_size=BATCH, row_groups=list(groups))
        self._first, self._values, self._column = first, [], column


class ArrowRows:
    """An arrow file or stream, which `save_to_disk` writes."""

    def __init__(self, file: Any):
        source = pa.PythonFile(file, "r") if not isinstance(file, pa.NativeFile) else file
        try:
            self.table = pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            self.table = pa.ipc.open_file(source).read_all()
        self.schema = self.table.schema

    def batches(self, columns: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        first = 0
        for batch in self.table.select(list(columns)).to_batches(max_chunksize=BATCH):
            yield first, batch
            first += batch.num_rows

    def value(self, row: int, column: str) -> Any:
        return self.table[column][row].as_py()


@contextmanager
def rows_of(root: str, name: str) -> Iterator[ParquetRows | ArrowRows]:
    """Open a file of a dataset; a local arrow file is mapped, not read."""
    if name.endswith(".arrow") and "://" not in root:
        with pa.memory_map(f"{root}/{name}") as file:
            yield ArrowRows(file)
        return
    with opened(root, name) as file:
        yield ArrowRows(file) if name.endswith(".arrow") else ParquetRows(file)


@contextmanager
def _table(root: str, name: str) -> Iterator[ParquetRows | ArrowRows]:
    try:
        with rows_of(root, name) as table:
            yield table
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise UserError(f"{root}/{name}: found damaged {name.rpartition('.')[2]} ({str(error).splitlines()[0]}); "
                        f"expected a whole file; get it again, or leave it out with source.files") from None
