"""Every column that any stage wrote, for the rows that the explorer shows, packed for a page.

Nothing is known of most columns but their type: numbers become ranges and histograms, strings of few values facets,
other strings text, lists of floats of one width maps. Legend: S rows shown, D width of an embedding.
"""

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as types

from vlmpipe.report.explorer_sample import Sample
from vlmpipe.shards import MANIFEST, read_manifest, read_shard_rows

TEXT_LIMIT = 1000  # characters of a cell
FACET_LIMIT = 60  # values of a facet
DIGEST_LIMIT = 32  # bytes of what is shown in hex; longer ones are pictures, or nothing to read
EXACT = 1 << 53  # integers beyond are not numbers for a browser
FACETS = ("reason", "pool", "status", "language", "http_status")
TEXTS = ("uid", "url", "caption", "other_uid", "sha256")
MAP_STEPS = 65535  # of a map's side; MAP_STEPS itself: not on it
FIT_ROWS = 4096  # that a map's axes are fitted on


@dataclass
class Shown:
    """The columns [S] of the rows shown: name -> (where it is from, values); name -> embedding float32 [S, D]."""

    columns: dict[str, tuple[str, pa.Array]] = field(default_factory=dict)
    embeddings: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, source: str, name: str, values: pa.Array | pa.ChunkedArray, instead: str | None = None) -> None:
        """Keep a column under `name`, or `instead` where that is taken; of two with both taken the first stays."""
        name = instead if name in self.columns and instead else name
        if name not in self.columns:
            flat = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
            self.columns[name] = (source, flat)


# --- reading -----------------------------------------------------------------------------------------------

def read_columns(sample: Sample, pools: Path, annotations: Path) -> Shown:
    """Read the rows of `sample` shard by shard: what select, download and annotate wrote about them.

    Raises:
        UserError: a shard is damaged.
    """
    shown = Shown()
    for name in sample.rows.column_names:
        shown.add("select", name, sample.rows[name])
    for source, directory, new in (("download", pools, "download_reason"), ("annotate", annotations, None)):
        parts, places = _rows_of(sample, directory)
        if parts:
            table = pa.concat_tables(parts, promote_options="permissive")
            back = np.full(len(sample.position), -1)
            back[np.concatenate(places)] = np.arange(len(table))
            table = table.take(pa.array(back, mask=back < 0))
            for name in table.column_names:
                _add(shown, source, name, table[name], new if name == "reason" else None)
    return shown


def _rows_of(sample: Sample, directory: Path) -> tuple[list[pa.Table], list[np.ndarray]]:
    """The shards' rows that are shown, and for each its place in the sample."""
    parts, places = [], []
    for pool, shard, place in shards_of(sample):
        if not (directory / pool / MANIFEST).exists():
            continue
        if any(entry["name"] == shard for entry in read_manifest(directory / pool)["shards"]):
            table = read_shard_rows(directory / pool, shard)
            wanted = sample.rows["uid"].take(place).combine_chunks()
            found = pc.index_in(wanted, value_set=table["uid"].combine_chunks())
            here = pc.is_valid(found).to_numpy(zero_copy_only=False)
            parts.append(table.take(pc.drop_null(found)))
            places.append(place[here])
    return parts, places


def shards_of(sample: Sample) -> Iterator[tuple[str, str, np.ndarray]]:
    """(pool, shard, places in the sample) of each shard that some row shown is from, in order."""
    order = np.argsort(sample.position)
    found = [(start, pool, shard) for pool, shards in sample.shards.items() for shard, start in shards]
    edges = np.searchsorted(sample.position[order], [start for start, _, _ in found] + [np.iinfo(np.int64).max])
    for (_, pool, shard), low, high in zip(found, edges, edges[1:]):
        if high > low:
            yield pool, shard, order[low:high]


def _add(shown: Shown, source: str, name: str, values: pa.ChunkedArray, instead: str | None) -> None:
    kind = values.type
    if types.is_fixed_size_list(kind) and types.is_floating(kind.value_type):
        shown.embeddings.setdefault(name, _matrix(values.combine_chunks()))
    elif _legible(kind):
        shown.add(source, name, values, instead)


def _legible(kind: pa.DataType) -> bool:
    if types.is_fixed_size_binary(kind):
        return kind.byte_width <= DIGEST_LIMIT
    return not (types.is_binary(kind) or types.is_large_binary(kind))


def _matrix(values: pa.FixedSizeListArray) -> np.ndarray:
    """float32 [S, D]; a null row is NaN."""
    matrix = np.full((len(values), values.type.list_size), np.nan, np.float32)
    valid = values.is_valid().to_numpy(zero_copy_only=False)
    matrix[valid] = values.flatten().to_numpy(zero_copy_only=False).reshape(-1, values.type.list_size)
    return matrix


# --- types -------------------------------------------------------------------------------------------------

def describe(name: str, source: str, values: pa.Array) -> tuple[dict[str, Any], np.ndarray | None]:
    """What a page needs of a column: {name, source, kind, ...} and, for `number` and `facet`, an array [S].

    number: float, NaN where there is none. facet: codes of `values`, the last code + 1 where there is none.
    text: strings or null, in `texts`.
    """
    facts: dict[str, Any] = {"name": name, "source": source}
    kind = values.type
    number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    if number and name not in FACETS:
        numbers = _numbers(values)
        if numbers is not None:
            return {**facts, "kind": "number", "whole": types.is_integer(kind)}, numbers
    strings = _strings(name, values)
    counts = sorted(pc.value_counts(strings.drop_null()).to_pylist(), key=lambda c: (-c["counts"], c["values"]))
    names = pa.array([entry["values"] for entry in counts], pa.string())
    few = len(names) <= FACET_LIMIT and (2 * len(names) <= len(strings) or types.is_boolean(kind))
    if name not in TEXTS and (few or (name in FACETS and len(names) < MAP_STEPS)):
        codes = pc.fill_null(pc.index_in(strings, value_set=names), len(names)).to_numpy()
        return {**facts, "kind": "facet", "values": names.to_pylist()}, _narrow(codes, len(names))
    return {**facts, "kind": "text", "texts": strings.to_pylist()}, None


def _numbers(values: pa.Array) -> np.ndarray | None:
    """float32 where that is exact or what the column holds, else float64; None: too large for a browser's numbers."""
    if types.is_integer(values.type):
        largest = max((abs(edge) for edge in pc.min_max(values).as_py().values() if edge is not None), default=0)
        if largest > EXACT:
            return None
        kind = np.float32 if largest <= 1 << 24 else np.float64
    else:
        kind = np.float32 if values.type in (pa.float16(), pa.float32()) else np.float64
    numbers = pc.fill_null(values.cast(pa.float64(), safe=False), np.nan).to_numpy().astype(kind)
    return np.where(np.isfinite(numbers), numbers, kind(np.nan))


def _strings(name: str, values: pa.Array) -> pa.Array:
    kind = values.type
    if types.is_boolean(kind):
        return pc.if_else(values, "yes", "no")
    if types.is_uint64(kind):  # a hash
        return pa.array([None if value is None else f"{value:016x}" for value in values.to_pylist()], pa.string())
    if types.is_fixed_size_binary(kind):
        return pa.array([None if value is None else value.hex() for value in values.to_pylist()], pa.string())
    if types.is_nested(kind):
        return pa.array([None if value is None else cut(json.dumps(value, default=str, ensure_ascii=False))
                         for value in values.to_pylist()], pa.string())
    return pc.utf8_slice_codeunits(values.cast(pa.string()), 0, TEXT_LIMIT)


def cut(text: str) -> str:
    return text[:TEXT_LIMIT]


def _narrow(codes: np.ndarray, largest: int) -> np.ndarray:
    return codes.astype(np.uint8 if largest < 1 << 8 else np.uint16)


# --- thresholds --------------------------------------------------------------------------------------------

def thresholds(shown: Shown, steps: Sequence[Mapping]) -> dict[str, list[dict[str, Any]]]:
    """Column -> [{rule, at}]: the column that a rule names, or whose values are those that its drops were decided by.

    A rule that dropped nothing left no value: it is known where it bears a column's name.
    """
    numbers = {name: pc.fill_null(values.cast(pa.float64(), safe=False), np.nan).to_numpy()
               for name, (source, values) in sorted(shown.columns.items(), key=lambda item: item[1][0] != "explorer")
               if source != "select" and (types.is_integer(values.type) or types.is_floating(values.type))}
    reason = shown.columns["reason"][1]
    value, threshold = (pc.fill_null(shown.columns[name][1], np.nan).to_numpy() for name in ("value", "threshold"))
    found: dict[str, list[dict[str, Any]]] = {}
    for step in steps:
        rule, config = step["reason"], step.get("config") or {}
        rows = np.flatnonzero(pc.equal(reason, rule).to_numpy(zero_copy_only=False) & np.isfinite(value))
        fits = [name for name, column in numbers.items()
                if len(rows) and np.allclose(column[rows], value[rows], rtol=1e-5, atol=1e-9)]
        named = [name for name in (config.get("column"), rule) if name in numbers]
        limits = {float(limit) for limit in np.unique(threshold[rows]) if np.isfinite(limit)}
        limits |= {float(config[key]) for key in ("min", "max") if isinstance(config.get(key), int | float)}
        if config.get("column") in numbers or not len(rows):
            column = named[0] if named else None
        else:
            column = _nearest(rule, fits) if fits else None
        if column is not None and len(limits) <= 4:
            found.setdefault(column, []).extend({"rule": rule, "at": limit} for limit in sorted(limits))
    return found


def _nearest(rule: str, columns: Sequence[str]) -> str:
    """The column that shares most of its name with the rule, the first of equals."""
    return max(columns, key=lambda name: (name == rule, len(set(name.split("_")) & set(rule.split("_")))))


def step_of(reason: str, steps: Sequence[Mapping]) -> str | None:
    """The rule behind a reason: `download:http_404` is of `downloaded`."""
    names = [step["reason"] for step in steps]
    prefix = reason.partition(":")[0]
    return reason if reason in names else next((name for name in names if name.startswith(prefix)), None)


# --- maps --------------------------------------------------------------------------------------------------

def flatten(embedding: np.ndarray) -> tuple[np.ndarray, list[float]] | None:
    """The two principal components of [S, D] as uint16 [S, 2], MAP_STEPS where a row has none; and their shares.

    None: fewer than three rows have an embedding, or all are the same.
    """
    there = np.isfinite(embedding).all(axis=1)
    known = embedding[there].astype(np.float64)
    if len(known) < 3:
        return None
    fit = known[:: -(-len(known) // FIT_ROWS)]
    mean = fit.mean(axis=0)
    spread, axes = np.linalg.eigh(np.cov(fit - mean, rowvar=False).reshape(known.shape[1], -1))
    if len(spread) < 2 or spread[-1] <= 1e-12:
        return None
    plane = axes[:, [-1, -2]]
    plane = plane * np.sign(plane[np.abs(plane).argmax(axis=0), [0, 1]])  # an axis has no sign of its own
    points = (known - mean) @ plane
    low, high = points.min(axis=0), points.max(axis=0)
    scaled = (points - low) / max(float((high - low).max()), 1e-12)
    scaled += (1 - scaled.max(axis=0)) / 2
    placed = np.full((len(embedding), 2), MAP_STEPS, np.uint16)
    placed[there] = np.rint(scaled * (MAP_STEPS - 1))
    return placed, [float(share) for share in np.maximum(spread[[-1, -2]], 0) / np.maximum(spread, 0).sum()]


# --- packing -----------------------------------------------------------------------------------------------

def pack(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """gzip of [length of the json, uint32][json][arrays, little endian, each at a multiple of 8].

    The json is `header` with `arrays`: name -> {type, at, length}, `at` counted from the end of the json's padding.
    """
    listed, blob = {}, bytearray()
    for name, values in arrays.items():
        blob += bytes(-len(blob) % 8)
        listed[name] = {"type": values.dtype.name, "at": len(blob), "length": values.size}
        blob += values.astype(values.dtype.newbyteorder("<")).tobytes()
    text = json.dumps({**header, "arrays": listed}, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()
    text += b" " * (-(len(text) + 4) % 8)
    return gzip.compress(len(text).to_bytes(4, "little") + text + bytes(blob), compresslevel=6, mtime=0)
