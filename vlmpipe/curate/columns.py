"""The rows of all pools as columns on disk: read when a rule asks, shard by shard, so that memory holds few of them.

Order of the rows everywhere: pools by name, in each pool the order of its list. Legend: N all rows, n those asked for;
`index` are positions among all rows, ascending; None: all.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmpipe import shards
from vlmpipe.config import nearest
from vlmpipe.curate.duplicates import THUMBNAIL, Looks
from vlmpipe.errors import UserError

DOMAIN = "domain"  # made from `url` when asked for


class Part(Protocol):
    """One shard: its rows, its columns' names, and those columns; rows without annotations have nulls there."""

    rows: int
    names: frozenset[str]

    def read(self, columns: Sequence[str]) -> pa.Table: ...


@dataclass(frozen=True)
class Shard:
    """A shard of a pool and its annotations on disk. `here` [rows] tells the rows that were downloaded."""

    pool: Path
    notes: Path
    rows: int
    here: np.ndarray

    @cached_property
    def _noted(self) -> frozenset[str]:
        return frozenset(pq.read_schema(self.notes).names) - {"uid"}

    @cached_property
    def names(self) -> frozenset[str]:
        return self._noted | frozenset(pq.read_schema(self.pool).names)

    def read(self, columns: Sequence[str]) -> pa.Table:
        """The columns; one that stands in both files is the annotation's."""
        noted = [name for name in columns if name in self._noted]
        rest = [name for name in columns if name in self.names and name not in self._noted]
        found = dict(zip(rest, pq.read_table(self.pool, columns=rest).columns)) if rest else {}
        if noted:
            place = pa.array(np.cumsum(self.here) - 1, mask=~self.here)
            # A null index takes a null.
            found |= dict(zip(noted, pq.read_table(self.notes, columns=noted).combine_chunks().take(place).columns))
        return pa.table({name: found.get(name, pa.nulls(self.rows)) for name in columns})


@dataclass
class Rows:
    """All rows of all pools. `prefer` says who of several twins stays: see `priority`.

    `evaluation` gives the pictures of the named question splits, which must not be trained on.
    """

    parts: Sequence[Part]
    pool_names: list[str]
    pool: np.ndarray  # int16 [N], positions in `pool_names`
    prefer: str = "clip_score"
    evaluation: Callable | None = None

    def __len__(self) -> int:
        return len(self.pool)

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each part begins, and the end."""
        return np.cumsum([0, *(part.rows for part in self.parts)])

    # --- reading

    def require(self, columns: Sequence[str]) -> None:
        """Refuse a column that no shard has.

        Raises:
            UserError: names it, the nearest one, and what makes it.
        """
        known = frozenset().union(*(part.names for part in self.parts))
        for name in columns:
            if ("url" if name == DOMAIN else name) not in known:
                raise UserError(
                    f"found no column '{name}' in the pools and their annotations{nearest(name, known)}; expected one "
                    f"of {', '.join(sorted(known))}; {how_to_have(name)}"
                )

    def scan(self, columns: Sequence[str], index: np.ndarray | None = None) -> Iterator[tuple[slice, pa.Table]]:
        """Yield for each shard which of the asked rows it holds (a slice of `index`) and their columns."""
        self.require(columns)
        for number, part in enumerate(self.parts):
            start, stop = self.starts[number], self.starts[number + 1]
            if index is None:
                yield slice(start, stop), part.read(columns)
                continue
            first, last = np.searchsorted(index, [start, stop])
            if first < last:
                table = part.read(columns)
                yield slice(first, last), table.take(index[first:last] - start) if last - first < len(table) else table

    def numbers(self, name: str, index: np.ndarray | None = None) -> np.ndarray:
        """A number per row, float64 [n]; NaN where there is none. False and true are 0 and 1."""
        found = np.full(self._count(index), np.nan)
        for here, table in self.scan([name], index):
            try:
                found[here] = pc.fill_null(table[name].cast(pa.float64()), np.nan).to_numpy()
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                raise UserError(f"found column '{name}' of type {table[name].type}; expected numbers; "
                                f"use `one_of` or `null` for text") from None
        return found

    def codes(self, name: str, index: np.ndarray | None = None) -> tuple[np.ndarray, list[str]]:
        """Texts with few values as (positions among the values [n], -1 for null; the values)."""
        found, values = np.full(self._count(index), -1, np.int32), {}
        for here, column in self._texts(name, index):
            encoded = column.combine_chunks().dictionary_encode()
            encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
            place = [values.setdefault(value, len(values)) for value in encoded.dictionary.to_pylist()]
            codes = encoded.indices.fill_null(-1).to_numpy()
            found[here] = np.array([*place, -1], np.int32)[codes]
        return found, list(values)

    def keys(self, name: str, index: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Texts or digests with many values as 128 bits of each: (uint64 [n, 2], whether there is one [n])."""
        found, known = np.zeros((self._count(index), 2), np.uint64), np.zeros(self._count(index), bool)
        for here, table in self.scan([name], index):
            column = table[name]
            known[here] = column.is_valid().to_numpy()
            found[here] = hash_bytes(column) if pa.types.is_fixed_size_binary(column.type) else hash_texts(column)
        return found, known

    def _texts(self, name: str, index: np.ndarray | None) -> Iterator[tuple[slice, pa.ChunkedArray]]:
        for here, table in self.scan(["url" if name == DOMAIN else name], index):
            column = table.column(0).cast(pa.string())
            yield here, pa.chunked_array([domains(column)]) if name == DOMAIN else column

    def uids(self, index: np.ndarray) -> pa.Array:
        found = [table["uid"].cast(pa.string()) for _, table in self.scan(["uid"], index)]
        return pa.concat_arrays([pa.array([], pa.string()), *(chunk for column in found for chunk in column.chunks)])

    def vectors(self, name: str, index: np.ndarray) -> np.ndarray:
        """Embeddings, float16 [n, E]; NaN where there is none. The only columns that are large: ask for few rows."""
        found = np.zeros((0, 0), np.float16)
        for here, table in self.scan([name], index):
            column = table[name].combine_chunks()
            if not pa.types.is_fixed_size_list(column.type):
                raise UserError(f"found column '{name}' of type {column.type}; expected embeddings")
            width = column.type.list_size
            if not len(found):
                found = np.full((len(index), width), np.nan, np.float16)
            known = column.is_valid().to_numpy(zero_copy_only=False)
            values = column.flatten().to_numpy(zero_copy_only=False)  # flatten leaves nulls out
            found[np.arange(here.start, here.stop)[known]] = values.reshape(-1, width)
        return found

    def _count(self, index: np.ndarray | None) -> int:
        return len(self) if index is None else len(index)

    # --- what several rules ask

    def priority(self, index: np.ndarray) -> np.ndarray:
        """Ranks of these rows, int64, 0 best: by `prefer` (`clip_score`, `pixels` or any number: more is better,
        nothing known is worst), then in the order of the rows; `first`: by that order alone."""
        if self.prefer == "first":
            return np.arange(len(index))
        order = np.argsort(-np.nan_to_num(self._preferred(index), nan=-np.inf), kind="stable")
        rank = np.empty(len(index), np.int64)
        rank[order] = np.arange(len(index))
        return rank

    def _preferred(self, index: np.ndarray) -> np.ndarray:
        if self.prefer == "pixels":
            return self.numbers("original_width", index) * self.numbers("original_height", index)
        return self.numbers(self.prefer, index)

    def looks(self, index: np.ndarray) -> "LazyLooks":
        return LazyLooks(self, index)


class LazyLooks:
    """Looks whose thumbnails stay on disk until `take` asks for some."""

    def __init__(self, rows: Rows, index: np.ndarray):
        self._rows, self._index = rows, index
        self.hashes = np.zeros(len(index), np.uint64)
        self.known = np.zeros(len(index), bool)
        for here, table in rows.scan(["phash"], index):
            self.known[here] = table["phash"].is_valid().to_numpy()
            self.hashes[here] = pc.fill_null(table["phash"].cast(pa.uint64()), 0).to_numpy()

    def __len__(self) -> int:
        return len(self.hashes)

    def take(self, place: np.ndarray) -> Looks:
        ascending = np.unique(place)
        found = np.zeros((len(ascending), THUMBNAIL), np.uint8)
        for here, table in self._rows.scan(["thumbnail"], self._index[ascending]):
            found[here] = thumbnails_of(table["thumbnail"])
        return Looks(self.hashes[place], found[np.searchsorted(ascending, place)])


def thumbnails_of(column: pa.ChunkedArray) -> np.ndarray:
    """uint8 [n, T]; zeros where there is none."""
    filled = pc.fill_null(column, pa.scalar(bytes(THUMBNAIL), pa.binary(THUMBNAIL))).chunks
    parts = [np.frombuffer(c.buffers()[1], np.uint8)[c.offset * THUMBNAIL :][: len(c) * THUMBNAIL] for c in filled]
    return np.concatenate([np.zeros(0, np.uint8), *parts]).reshape(-1, THUMBNAIL)


def domains(urls: pa.ChunkedArray) -> pa.Array:
    """The host of each address, lower case, without `www.` and port; null where there is none."""
    return pa.array([domain(url) for url in urls.to_pylist()], pa.string())


def domain(url: str | None) -> str | None:
    try:
        host = urlsplit(url or "").hostname
    except ValueError:  # such as an unclosed bracket
        return None
    return host.removeprefix("www.") if host else None


def hash_bytes(column: pa.ChunkedArray) -> np.ndarray:
    """The first 128 bits of digests, uint64 [n, 2]."""
    width = column.type.byte_width
    assert width >= 16, f"digests of {width} bytes"
    filled = pc.fill_null(column, pa.scalar(bytes(width), column.type)).chunks
    data = b"".join(memoryview(c.buffers()[1])[c.offset * width : (c.offset + len(c)) * width] for c in filled)
    return np.frombuffer(data, np.uint8).reshape(-1, width)[:, :16].copy().view(">u8").astype(np.uint64)


def hash_texts(column: pa.ChunkedArray) -> np.ndarray:
    """128 bits of each text, uint64 [n, 2]; those of a sha256 in hex are its first 32 digits."""
    texts = pc.fill_null(column.cast(pa.large_string()), "").combine_chunks()
    texts = texts if isinstance(texts, pa.Array) else pa.concat_arrays(texts.chunks)
    offsets = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
    found, plain = np.zeros((len(texts), 2), np.uint64), np.diff(offsets) == 64
    if plain.any():
        digits_n32 = np.frombuffer(texts.buffers()[2], np.uint8)[offsets[:-1][plain][:, None] + np.arange(32)]
        numeral, letter = (digits_n32 >= 48) & (digits_n32 <= 57), (digits_n32 >= 97) & (digits_n32 <= 102)
        hexadecimal = (numeral | letter).all(axis=1)
        nibbles_n32 = np.where(letter, digits_n32 - 87, digits_n32 - 48)[hexadecimal]
        plain[plain] = hexadecimal
        found[plain] = (nibbles_n32[:, ::2] << 4 | nibbles_n32[:, 1::2]).view(">u8")
    for row in np.flatnonzero(~plain):
        digest = hashlib.blake2b(texts[int(row)].as_py().encode(), digest_size=16).digest()
        found[row] = np.frombuffer(digest, ">u8")
    return found


# Which annotator of curation.annotate makes which columns.
MADE_BY = {
    "geometry": ("width", "height", "aspect"),
    "quality": ("sharpness", "brightness", "contrast", "entropy", "uniform", "border"),
    "hashes": ("phash", "thumbnail", "pixel_hash"),
    "text": (
        "caption_chars", "caption_words", "word_repetition", "char_repetition", "special_characters", "boilerplate",
    ),
    "language": ("language", "language_score"),
    "pii": ("pii",),
    "embeddings": ("clip_score", "image_embedding", "text_embedding"),
    "neg_clip_loss": ("neg_clip_loss",),
    "ocr": ("text_in_image", "text_area", "text_overlap"),
    "tmars": ("masked_clip_score",),
    "faces": ("faces", "face_area"),
}


def how_to_have(column: str) -> str:
    """What to turn on to get a column."""
    if column.startswith("probe_"):
        return f"name its file in curation.annotate: probes: {{{column.removeprefix('probe_')}: {{file: …}}}}"
    maker = next((name for name, columns in MADE_BY.items() if column in columns), None)
    if maker:
        return f"turn on its annotator ({maker}: {{}} in curation.annotate) and run `annotate` again"
    return "name a column of the list in the pool's columns.extra, or take the rule out of `order`"


# --- from disk ---------------------------------------------------------------------------------------------

def load_rows(pools: Path, annotations: Path, names: Sequence[str], **facts) -> Rows:
    """The named pools with their annotations; only which rows were downloaded is read, and every file checked.

    Raises:
        UserError: an input is missing, damaged, or does not fit the others.
    """
    parts, pool = [], []
    for number, name in enumerate(names):
        found = _shards(pools / name, annotations / name, name)
        parts += found
        pool.append(np.full(sum(part.rows for part in found), number, np.int16))
    return Rows(parts, list(names), np.concatenate(pool), **facts)


def _shards(pool: Path, notes: Path, name: str) -> list[Shard]:
    files = [[shard["name"] for shard in shards.read_manifest(folder)["shards"]] for folder in (pool, notes)]
    if not files[0]:
        raise UserError(f"{pool} holds no shards; expected at least one; rerun the stage that writes it")
    found, matching = [], files[0] == files[1]
    for shard in files[0]:
        table = shards.read_shard_rows(pool, shard, ["uid", "status"])
        here = pc.fill_null(pc.equal(table["status"], "downloaded"), False).to_numpy()
        found.append(Shard(pool / f"{shard}.parquet", notes / f"{shard}.parquet", len(table), here))
        if matching:
            noted = shards.read_shard_rows(notes, shard, ["uid"])["uid"]
            matching = noted.cast(pa.string()).equals(table["uid"].filter(pa.array(here)).cast(pa.string()))
    if not matching:
        raise UserError(
            f"{notes}: found annotations of {shards.read_manifest(notes)['rows']} rows that are not the "
            f"{sum(int(part.here.sum()) for part in found)} downloaded rows of pool {name}; expected the same uids in "
            f"the same order; rerun `annotate {name}`"
        )
    return found
