"""Image-text pairs as every source lists them: where the picture is, and a uid that never changes."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlmpipe.errors import UserError
from vlmpipe.shards import batched, write_table

LISTED = ("uid", "url", "caption")
# Where a row's bytes lie, beside the columns that the pool keeps; assemble leaves it out.
PLACE = pa.struct({
    "file": pa.string(), "offset": pa.int64(), "size": pa.int64(), "row": pa.int64(), "column": pa.string(),
    "sha256": pa.string(), "reason": pa.string(), "detail": pa.string(),
})


@dataclass(frozen=True)
class Place:
    """Where a picture's bytes lie when they are not behind its URL, or the reason why they can't be had.

    `file` is relative to the pool's `urls`. The bytes are the whole file, `size` bytes from `offset`, or the value in
    row `row` of the table's `column`. `sha256` is of these bytes.
    """

    file: str | None = None
    offset: int | None = None
    size: int | None = None
    row: int | None = None
    column: str | None = None
    sha256: str | None = None
    reason: str | None = None
    detail: str | None = None


def refused(reason: str, detail: str) -> Place:
    """The place of a picture that is not even read."""
    return Place(reason=reason, detail=detail)


@dataclass(frozen=True)
class Pair:
    """One picture with one text. `uid`: the list's own, null where it is to be made."""

    url: str
    caption: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    uid: str | None = None
    place: Place | None = None


def as_text(value: Any) -> str:
    return "" if value is None else str(value).encode(errors="replace").decode()


def each_text(value: Any) -> list[str]:
    """The captions of a picture: a list of texts makes a pair of each."""
    return [as_text(text) for text in value] or [""] if isinstance(value, (list, tuple)) else [as_text(value)]


def with_uids(pairs: Iterable[Pair], source: str | Path) -> Iterator[dict[str, Any]]:
    """Rows {uid, url, caption, *extra, place} of pairs.

    A made uid is the first 128 bits of sha256(url, caption, how often this came before). The bytes' own sha256 goes
    in too where they are at hand: file names recur between folders, and a changed picture is another sample.

    Raises:
        UserError: an own uid that is not unique, or not usable as a name.
    """
    seen: dict[bytes, int] = {}
    own: set[str] = set()
    for pair in pairs:
        uid = _made_uid(pair, seen) if pair.uid is None else _own_uid(pair.uid, own, source)
        yield {"uid": uid, "url": pair.url, "caption": pair.caption, **pair.extra, "place": pair.place}


def _made_uid(pair: Pair, seen: dict[bytes, int]) -> str:
    content = f"{pair.place.sha256 or pair.place.reason}\0" if pair.place else ""
    text = f"{pair.url}\0{pair.caption}\0{content}".encode(errors="surrogatepass")
    key = hashlib.sha256(text).digest()[:16]
    occurrence = seen.get(key, 0)
    seen[key] = occurrence + 1
    return hashlib.sha256(text + str(occurrence).encode()).hexdigest()[:32]


def _own_uid(uid: str, own: set[str], source: str | Path) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", uid) or uid == "None":
        raise UserError(f"{source}: found uid {uid!r}; expected 1 to 64 letters, digits, - and _, which name "
                        f"files; choose another columns.uid, or null to make uids from url and caption")
    if uid in own:
        raise UserError(f"{source}: found uid '{uid}' twice; expected a uid of its own for every row; "
                        f"choose another columns.uid, or null to make uids from url and caption")
    own.add(uid)
    return uid


# --- shards of a list --------------------------------------------------------------------------------------

def write_list(
    rows: Iterable[dict[str, Any]], rows_per_shard: int, directory: Path, source: str | Path
) -> list[tuple[str, int]]:
    """Write rows as `<directory>/<shard>.parquet`, a shard at a time; return [(shard, rows)].

    Raises:
        UserError: there are no rows; an extra column is of different types in different places.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.parquet"):
        old.unlink()
    shards, schemas = [], []
    for chunk in batched(rows, rows_per_shard):
        name = f"{len(shards):05d}"
        table = _table(chunk, source)
        write_table(directory / f"{name}.parquet", table)
        shards.append((name, len(chunk)))
        schemas.append(table.schema)
    if not shards:
        raise UserError(f"{source}: found no rows; expected at least one pair; check the pool's `urls`")
    _unify(directory, shards, schemas, source)
    return shards


def _table(rows: list[dict[str, Any]], source: str | Path) -> pa.Table:
    columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in LISTED}
    for name in rows[0]:
        if name not in (*LISTED, "place"):
            columns[name] = _extra(name, [row[name] for row in rows], source)
    if any(row["place"] for row in rows):
        columns["place"] = pa.array([row["place"] and asdict(row["place"]) for row in rows], PLACE)
    return pa.table(columns)


def _extra(name: str, values: list[Any], source: str | Path) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"{source}: extra column '{name}' mixes types ({str(error).splitlines()[0]}); "
                        f"expected one type; mend the list or drop the column") from None


def _unify(directory: Path, shards: list[tuple[str, int]], schemas: list[pa.Schema], source: str | Path) -> None:
    """Give every shard the same types: one shard may hold only nulls or whole numbers of a column."""
    own_fields = [pa.schema([column for column in schema if column.name != "place"]) for schema in schemas]
    try:
        schema = pa.unify_schemas(own_fields, promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
        raise UserError(f"{source}: an extra column changes its type ({str(error).splitlines()[0]}); "
                        f"expected one type; mend the list or drop the column") from None
    for (name, _), own, found in zip(shards, own_fields, schemas):
        if own != schema:
            path = directory / f"{name}.parquet"
            place = [found.field("place")] if "place" in found.names else []
            write_table(path, pq.read_table(path).cast(pa.schema([*schema, *place])))
