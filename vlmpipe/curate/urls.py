"""URL lists: any of the usual files, read as a stream, into rows with a uid that never changes."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from vlmpipe.config import nearest
from vlmpipe.errors import UserError
from vlmpipe.shards import batched, is_there, reaching, write_table

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".csv.gz", ".tsv.gz", ".jsonl.gz")
RESERVED = (
    "uid", "url", "caption", "status", "reason", "detail", "http_status", "bytes", "sha256",
    "original_width", "original_height", "width", "height", "pool",
)
csv.field_size_limit(1 << 24)  # captions scraped from pages can be long


@dataclass(frozen=True)
class Columns:
    """What a list calls its columns. `uid`: its own unique ids (null: made from url and caption); `extra`: kept."""

    url: str = "url"
    caption: str = "caption"
    uid: str | None = None
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        taken = [name for name in self.extra if name in RESERVED]
        if taken:
            raise UserError(f"found extra column '{taken[0]}'; expected another name than the pool's own columns; "
                            f"rename it in the list")

    @property
    def wanted(self) -> list[str]:
        names = [self.url, self.caption, *([self.uid] if self.uid else []), *self.extra]
        return list(dict.fromkeys(names))


def read_list(source: str | Path, columns: Columns) -> Iterator[dict[str, Any]]:
    """Stream rows {uid, url, caption, *extra} of a list: a file, a directory of files, or an fsspec URL of either.

    Raises:
        UserError: no such list, a missing column, a damaged file, a uid that is not unique or not usable as a name.
    """
    rows = (row for file in _files(str(source)) for row in _read_file(file, columns))
    return _with_own_uid(rows, columns, source) if columns.uid else _with_made_uid(rows, columns)


def _files(source: str) -> list[str]:
    if not is_there(source):
        raise UserError(f"found no URL list {source}; expected a file or directory of {', '.join(SUFFIXES[:4])}; "
                        f"set the pool's `urls`")
    filesystem, path = fsspec.core.url_to_fs(source)
    if not filesystem.isdir(path):
        if not path.endswith(SUFFIXES):
            raise UserError(f"{source}: found an unknown kind of file; expected one of {', '.join(SUFFIXES)}")
        return [filesystem.unstrip_protocol(path)]
    files = [filesystem.unstrip_protocol(name) for name in sorted(filesystem.find(path)) if name.endswith(SUFFIXES)]
    if not files:
        raise UserError(f"{source}: found no list in this directory; expected files of {', '.join(SUFFIXES)}")
    return files


def _read_file(file: str, columns: Columns) -> Iterator[dict[str, Any]]:
    kind = next(suffix for suffix in SUFFIXES if file.endswith(suffix)).removesuffix(".gz")
    with reaching(file):
        try:
            yield from _READERS[kind](file, columns)
        except (csv.Error, json.JSONDecodeError, UnicodeDecodeError, pa.ArrowInvalid, EOFError) as error:
            why = str(error).splitlines()[0]
            raise UserError(f"{file}: found damaged {kind[1:]} ({why}); expected a readable list; mend it") from None


def _parquet(file: str, columns: Columns) -> Iterator[dict[str, Any]]:
    with fsspec.open(file, "rb") as stream:
        table = pq.ParquetFile(stream)
        _check_columns(table.schema_arrow.names, columns, file)
        for batch in table.iter_batches(columns=columns.wanted, batch_size=8192):
            yield from batch.to_pylist()


def _separated(delimiter: str, file: str, columns: Columns) -> Iterator[dict[str, Any]]:
    with _text(file) as stream:
        reader = csv.DictReader(stream, delimiter=delimiter)
        _check_columns(reader.fieldnames or [], columns, file)
        for row in reader:
            yield {name: row[name] for name in columns.wanted}


def _json_lines(file: str, columns: Columns) -> Iterator[dict[str, Any]]:
    with _text(file) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict):
                raise UserError(f"{file}, line {number}: found {type(row).__name__}; expected an object per line")
            if columns.url not in row or number == 1:  # a caption or extra may be left out of later lines
                _check_columns(list(row), columns, f"{file}, line {number}")
            yield {name: row.get(name) for name in columns.wanted}


@contextmanager
def _text(file: str) -> Iterator[IO[str]]:
    with fsspec.open(file, "rb", compression="infer") as stream:
        yield io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")


_READERS = {
    ".parquet": _parquet,
    ".csv": lambda file, columns: _separated(",", file, columns),
    ".tsv": lambda file, columns: _separated("\t", file, columns),
    ".jsonl": _json_lines,
}


def _check_columns(found: Sequence[str], columns: Columns, where: str) -> None:
    keys = {columns.url: "url", columns.caption: "caption", columns.uid: "uid"}
    for name in columns.wanted:
        if name not in found:
            same = [other for other in found if other.casefold() == name.casefold()]
            hint = f"; did you mean '{same[0]}'?" if same else nearest(name, found)
            raise UserError(
                f"{where}: found columns {', '.join(found) or '(none)'}; expected '{name}'{hint}; "
                f"set the pool's columns.{keys.get(name, 'extra')}"
            )


# --- uids --------------------------------------------------------------------------------------------------

def _with_made_uid(rows: Iterable[dict], columns: Columns) -> Iterator[dict]:
    """uid: the first 128 bits of sha256(url, caption, how often this pair came before)."""
    seen: dict[bytes, int] = {}
    for row in rows:
        url, caption, extra = _parts(row, columns)
        pair = f"{url}\0{caption}\0".encode(errors="surrogatepass")
        key = hashlib.sha256(pair).digest()[:16]
        occurrence = seen.get(key, 0)
        seen[key] = occurrence + 1
        uid = hashlib.sha256(pair + str(occurrence).encode()).hexdigest()[:32]
        yield {"uid": uid, "url": url, "caption": caption, **extra}


def _with_own_uid(rows: Iterable[dict], columns: Columns, source: str | Path) -> Iterator[dict]:
    seen = set()
    for row in rows:
        url, caption, extra = _parts(row, columns)
        uid = str(row[columns.uid])
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", uid) or uid == "None":
            raise UserError(f"{source}: found uid {uid!r}; expected 1 to 64 letters, digits, - and _, which name "
                            f"files; choose another columns.uid, or null to make uids from url and caption")
        if uid in seen:
            raise UserError(f"{source}: found uid '{uid}' twice; expected a uid of its own for every row; "
                            f"choose another columns.uid, or null to make uids from url and caption")
        seen.add(uid)
        yield {"uid": uid, "url": url, "caption": caption, **extra}


def _parts(row: dict, columns: Columns) -> tuple[str, str, dict]:
    extra = {name: row[name] for name in columns.extra}
    return _as_text(row[columns.url]), _as_text(row[columns.caption]), extra


def _as_text(value: Any) -> str:
    return "" if value is None else str(value).encode(errors="replace").decode()


# --- shards of a list --------------------------------------------------------------------------------------

def split(source: str | Path, columns: Columns, rows_per_shard: int, directory: Path) -> list[tuple[str, int]]:
    """Write the list as `<directory>/<shard>.parquet`, a shard at a time; return [(shard, rows)].

    Raises:
        UserError: as `read_list`; the list is empty; an extra column is of different types in different places.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.parquet"):
        old.unlink()
    rows, shards, schemas = read_list(source, columns), [], []
    for chunk in batched(rows, rows_per_shard):
        name = f"{len(shards):05d}"
        table = _table(chunk, columns, source)
        write_table(directory / f"{name}.parquet", table)
        shards.append((name, len(chunk)))
        schemas.append(table.schema)
    if not shards:
        raise UserError(f"{source}: found no rows; expected a list of at least one URL; check the pool's `urls`")
    _unify(directory, shards, schemas, source)
    return shards


def _table(rows: list[dict], columns: Columns, source: str | Path) -> pa.Table:
    text = [pa.array([row[name] for row in rows], pa.string()) for name in ("uid", "url", "caption")]
    extra = []
    for name in columns.extra:
        try:
            extra.append(pa.array([row[name] for row in rows]))
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise UserError(f"{source}: extra column '{name}' mixes types ({str(error).splitlines()[0]}); "
                            f"expected one type; mend the list or drop the column") from None
    return pa.table([*text, *extra], names=["uid", "url", "caption", *columns.extra])


def _unify(directory: Path, shards: list[tuple[str, int]], schemas: list[pa.Schema], source: str | Path) -> None:
    """Give every shard the same types: one shard may hold only nulls or whole numbers of a column."""
    try:
        schema = pa.unify_schemas(schemas, promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise UserError(f"{source}: an extra column changes its type ({str(error).splitlines()[0]}); "
                        f"expected one type; mend the list or drop the column") from None
    for (name, _), own in zip(shards, schemas):
        if own != schema:
            path = directory / f"{name}.parquet"
            write_table(path, pq.read_table(path).cast(schema))
