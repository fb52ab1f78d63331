"""The kept pairs as a dataset that training reads: train, validation and test, through Hugging Face `datasets`.

Written beside its place and moved there whole: an interrupted pack leaves nothing that could be read as a dataset.
Legend: K kept rows of all pools, in the order of the decisions; C clusters of near-duplicates.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from vlmpipe import shards
from vlmpipe.curate import filters
from vlmpipe.curate.duplicates import Looks, Near, clusters
from vlmpipe.errors import UserError
from vlmpipe.progress import progress

KIND = "packed"
SPLITS = ("train", "validation", "test")
BATCH = 100  # rows in memory and in a row group: what `datasets` itself takes for pictures
POOL_COLUMNS = (
    "uid", "url", "caption", "status", "reason", "detail", "http_status", "bytes", "sha256", "original_width",
    "original_height", "width", "height", "pool",
)
LICENCE_COLUMNS = ("licence", "license")
COLUMNS = {
    "caption": pa.string(), "uid": pa.string(), "url": pa.string(), "pool": pa.string(), "sha256": pa.string(),
    "width": pa.int32(), "height": pa.int32(), "clip_score": pa.float32(), "licence": pa.string(),
}
MEANING = {
    "image": "the stored picture (RGB JPEG)", "caption": "the text that came with it", "uid": "never changes",
    "url": "where it was fetched from", "pool": "the list it comes from", "sha256": "of the bytes as fetched",
    "width": "as stored, pixels", "height": "as stored, pixels", "clip_score": "raw cosine of picture and caption",
    "licence": "as the list says, null where it says nothing",
}


@dataclass(frozen=True)
class PackConfig:
    """How the kept pairs are split and written.

    `validation` and `test` are shares of the rows. Rows that are `near` each other, directly or through others,
    always share a split: wider than for dropping duplicates, because what was different enough to keep can still
    be too alike to test on. `seed` picks another split. `licences` names a pool's licence where its list has no
    `licence` column. `rows_per_file` bounds a parquet file.
    """

    validation: float = 0.05
    test: float = 0.05
    near: Near = field(default_factory=lambda: Near(radius=10, match=0.8))
    seed: int = 0
    rows_per_file: int = 5000
    licences: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if min(self.validation, self.test) < 0 or self.validation + self.test > 0.9:
            raise UserError(
                f"found validation {self.validation} and test {self.test}; expected shares of the rows, each at "
                f"least 0 and together at most 0.9"
            )
        if self.rows_per_file < 1:
            raise UserError(f"found rows_per_file {self.rows_per_file}; expected at least 1")


def pack(pools: Path, annotations: Path, selection: Path, out: Path, config: PackConfig) -> None:
    """Write train/, validation/ and test/ parquet files, README.md (the dataset card) and manifest.json.

    Raises:
        UserError: an input is missing or damaged, is not the one that the others were made from, or there are too
            few rows to split.
    """
    pools, annotations, selection, out = Path(pools), Path(annotations), Path(selection), Path(out)
    chosen = read_selection(pools, annotations, selection)
    split, cluster = assign_splits(chosen.sha256, chosen.looks, config)
    facts = {
        "splits": {name: int((split == number).sum()) for number, name in enumerate(SPLITS)},
        "config": asdict(config), "pools": chosen.lineage,
        "selection": shards.sha256_file(selection / shards.MANIFEST), "clusters": _sizes(cluster),
    }
    funnel = shards.read_json(selection / filters.FUNNEL)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        entries = _write_splits(partial, chosen, split, facts["splits"], config)
        shards.write_bytes_atomic(partial / "README.md", card(facts, funnel, chosen.extra, entries).encode())
        shards.write_manifest(partial, KIND, entries, card=shards.sha256_file(partial / "README.md"), **facts)
        _move_into_place(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sizes(cluster: np.ndarray) -> dict[str, int]:
    sizes = np.bincount(cluster)
    return {"count": len(sizes), "largest": int(sizes.max()), "of_several": int((sizes > 1).sum())}


def _write_splits(
    out: Path, chosen: "Chosen", split: np.ndarray, counts: dict[str, int], config: PackConfig
) -> list[dict]:
    """Write every split's files in one pass over the pools; returns the manifest's entries."""
    writers = [SplitWriter(out, name, counts[name], chosen.extra, config.rows_per_file) for name in SPLITS]
    try:
        for number, table, images in progress(_kept_batches(chosen, split, config.licences), None, "pack: batches"):
            writers[number].write(table, images)
        return [entry for writer in writers for entry in writer.close()]
    finally:
        for writer in writers:
            writer.abandon()


def _move_into_place(partial: Path, out: Path) -> None:
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(partial, out)
    shutil.rmtree(old, ignore_errors=True)


# --- what is packed ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Chosen:
    """The kept rows: sha256 [K], looks [K], and for each pool which of its rows are kept, bool.

    `lineage` is each pool's manifest by its sha256, `extra` the columns of the pools beyond those that all have.
    """

    pools: Path
    annotations: Path
    lineage: dict[str, str]
    extra: pa.Schema
    kept: dict[str, np.ndarray]
    sha256: np.ndarray
    looks: Looks


def read_selection(pools: Path, annotations: Path, selection: Path) -> Chosen:
    """The selection, checked against the pools that it was made from.

    Raises:
        UserError: the selection is incomplete, or a pool changed after it.
    """
    lineage = shards.read_manifest(selection, filters.KIND)["pools"]
    decisions = shards.read_rows(selection, ["uid", "pool", "kept"])
    kept, digests, looks = {}, [], []
    for name in sorted(lineage):
        rows = shards.read_rows(pools / name, ["uid", "status", "sha256"])
        decided = decisions.filter(pc.equal(decisions["pool"], name))
        same = shards.sha256_file(pools / name / shards.MANIFEST) == lineage[name]
        if not same or not decided["uid"].equals(rows["uid"]):
            raise UserError(
                f"found that {pools / name} changed after {selection} was made from it; expected them to belong "
                f"together; rerun `select`"
            )
        kept[name] = decided["kept"].to_numpy()
        notes, place = filters.read_annotations(annotations / name, name, rows, ["uid", "phash", "thumbnail"])
        looks.append(filters.looks_of(notes).take(place[kept[name]]))
        digests.append(pc.coalesce(rows["sha256"], rows["uid"]).filter(pa.array(kept[name])).to_numpy())
    both = Looks(np.concatenate([part.hashes for part in looks]), np.concatenate([part.thumbnails for part in looks]))
    extra = extra_schema(pools, sorted(lineage))
    return Chosen(pools, annotations, lineage, extra, kept, np.concatenate(digests).astype("S64"), both)


def assign_splits(sha256: np.ndarray, looks: Looks, config: PackConfig) -> tuple[np.ndarray, np.ndarray]:
    """Each row's split (a position in SPLITS) and cluster: int [K] each.

    A cluster is placed by the hash of its smallest sha256, so a row keeps its split when others come or go, unless
    they join its cluster. A cluster of more than a quarter of a split goes to train: one template that half the
    web repeats is no test set.

    Raises:
        UserError: there are fewer clusters than splits.
    """
    cluster = clusters(looks, config.near)
    order = np.lexsort((sha256, cluster))
    first = order[np.flatnonzero(np.diff(cluster[order], prepend=-1))]
    place_C = np.array([_uniform(config.seed, digest) for digest in sha256[first]])
    size_C = np.bincount(cluster)
    split_C = np.zeros(len(size_C), np.int8)
    start = 0.0
    for number, share in ((2, config.test), (1, config.validation)):
        small = (split_C == 0) & (size_C <= max(share * len(sha256) / 4, 1))
        split_C[small & (place_C >= start) & (place_C < start + share)] = number
        start += share
        if share and not (split_C == number).any():  # few rows: the cluster that was nearest to falling here
            if small.sum() < 1 or (split_C == 0).sum() < 2:
                raise UserError(
                    f"found {len(sha256)} kept rows in {len(size_C)} clusters of look-alikes; expected more to make "
                    f"a {SPLITS[number]} split of {share:g}; lower pack.near.radius, set the share to 0, or keep more"
                )
            split_C[np.flatnonzero(small)[place_C[small].argmin()]] = number
    return split_C[cluster], cluster


def _uniform(seed: int, digest: bytes) -> float:
    """A number in [0, 1) that depends on nothing but the two."""
    return int.from_bytes(hashlib.sha256(b"%d:" % seed + digest).digest()[:7], "big") / 2**56


def extra_schema(pools: Path, names: Sequence[str]) -> pa.Schema:
    """The pools' own columns, beyond those that every pool has.

    Raises:
        UserError: two shards disagree about a column's type, or a column has a name that the dataset uses.
    """
    schemas = []
    for name in names:
        for shard in shards.read_manifest(pools / name)["shards"]:
            schema = pq.read_schema(pools / name / f"{shard['name']}.parquet").remove_metadata()
            schemas.append(pa.schema([f for f in schema if f.name not in (*POOL_COLUMNS, *LICENCE_COLUMNS)]))
    try:
        found = pa.unify_schemas(schemas, promote_options="default")
    except pa.ArrowTypeError as error:
        raise UserError(f"pools disagree: {error}; expected one type for each extra column; mend the lists") from None
    taken = set(found.names) & {"image", *COLUMNS}
    if taken:
        raise UserError(f"found extra columns {sorted(taken)}; expected other names, as the dataset uses these; rename")
    # A column that is null in every pool still needs a type.
    return pa.schema([f.with_type(pa.string()) if pa.types.is_null(f.type) else f for f in found])


# --- reading and writing -----------------------------------------------------------------------------------

Batch = tuple[int, pa.Table, list[bytes]]  # the split's position in SPLITS, rows, pictures


def _kept_batches(chosen: Chosen, split: np.ndarray, licences: dict[str, str]) -> Iterator[Batch]:
    """Batches of at most BATCH rows; every tar is read once."""
    done = 0
    for name, pool_kept in chosen.kept.items():
        pool, row = chosen.pools / name, 0
        for shard in shards.read_manifest(pool)["shards"]:
            kept = np.flatnonzero(pool_kept[row : row + shard["rows"]])
            splits = split[done : done + len(kept)]
            row, done = row + shard["rows"], done + len(kept)
            if len(kept):
                rows = shards.read_shard_rows(pool, shard["name"]).take(pa.array(kept))
                scores = shards.read_shard_rows(chosen.annotations / name, shard["name"], ["uid", "clip_score"])
                table = _dataset_columns(rows, scores, chosen.extra, licences.get(name))
                yield from _by_split(pool, shard["name"], table, splits)


def _dataset_columns(rows: pa.Table, scores: pa.Table, extra: pa.Schema, licence: str | None) -> pa.Table:
    """The dataset's columns, without the picture, of some rows of a pool."""
    place = pc.index_in(rows["uid"], value_set=scores["uid"])
    rows = rows.append_column("clip_score", scores["clip_score"].take(place))
    stated = [rows[name].cast(pa.string()) for name in LICENCE_COLUMNS if name in rows.column_names]
    missing = pa.array([licence] * len(rows), pa.string())
    columns = {"licence": pc.coalesce(*stated, missing)}
    for entry in [*(pa.field(name, kind) for name, kind in COLUMNS.items() if name != "licence"), *extra]:
        known = entry.name in rows.column_names
        columns[entry.name] = rows[entry.name].cast(entry.type) if known else pa.nulls(len(rows), entry.type)
    return pa.table({name: columns[name] for name in (*COLUMNS, *extra.names)})


def _by_split(pool: Path, shard: str, table: pa.Table, splits: np.ndarray) -> Iterator[Batch]:
    """The rows of one shard with their pictures, each split's together."""
    uids = table["uid"].to_pylist()
    waiting: dict[int, tuple[list[int], list[bytes]]] = {number: ([], []) for number in range(len(SPLITS))}
    row = 0
    for uid, data in shards.iter_images(pool, shard):
        if row == len(uids) or uid != uids[row]:
            continue  # downloaded, not kept
        rows, images = waiting[int(splits[row])]
        rows.append(row)
        images.append(data)
        if len(rows) == BATCH:
            yield int(splits[row]), table.take(pa.array(rows)), images
            waiting[int(splits[row])] = ([], [])
        row += 1
    if row < len(uids):
        raise shards.corrupt(pool / f"{shard}.tar", f"found no picture of {uids[row]}, which its table lists")
    for number, (rows, images) in waiting.items():
        if rows:
            yield number, table.take(pa.array(rows)), images


class SplitWriter:
    """One split: parquet files of at most `rows_per_file` rows, named as the Hub expects."""

    def __init__(self, out: Path, name: str, rows: int, extra: pa.Schema, rows_per_file: int):
        import datasets

        self.out, self.name, self.rows, self.rows_per_file = out, name, rows, rows_per_file
        columns = pa.schema([*(pa.field(*item) for item in COLUMNS.items()), *extra])
        self.features = datasets.Features({"image": datasets.Image(), **datasets.Features.from_arrow_schema(columns)})
        self.files = -(-rows // rows_per_file)
        self.entries: list[dict] = []
        self._writer, self._room = None, 0

    def write(self, table: pa.Table, images: list[bytes]) -> None:
        paths = [f"{uid}.jpg" for uid in table["uid"].to_pylist()]
        pictures = pa.StructArray.from_arrays([pa.array(images, pa.binary()), pa.array(paths)], ["bytes", "path"])
        table = table.add_column(0, "image", pictures)
        while len(table):
            if not self._room:
                self._next_file()
            part, table = table.slice(0, self._room), table.slice(self._room)
            self._writer.write_table(part, BATCH)
            self._room -= len(part)

    def _next_file(self) -> None:
        from datasets.arrow_writer import ParquetWriter

        self._finish_file()
        path = self.out / self._file(len(self.entries))
        path.parent.mkdir(exist_ok=True)
        self._writer, self._room = ParquetWriter(path=str(path), features=self.features), self.rows_per_file

    def _file(self, number: int) -> str:
        return f"{self.name}/{self.name}-{number:05d}-of-{self.files:05d}.parquet"

    def _finish_file(self) -> None:
        if self._writer is None:
            return
        self._writer.finalize()  # not close(), which swallows errors: a full disk would go unseen
        file = self._file(len(self.entries))
        digest = shards.sha256_file(self.out / file)
        rows = pq.read_metadata(self.out / file).num_rows
        self.entries.append({"name": file.removesuffix(".parquet"), "rows": rows, "files": {file: digest}})
        self._writer = None

    def abandon(self) -> None:
        """Let go of an unfinished file: pyarrow would write to it when it is collected, and print that it can't."""
        if self._writer is not None and self._writer.pa_writer is not None:
            self._writer.pa_writer.is_open = False

    def close(self) -> list[dict]:
        """Finish the last file and return the manifest's entries, after counting what they hold."""
        self._finish_file()
        written = sum(entry["rows"] for entry in self.entries)
        assert (written, len(self.entries)) == (self.rows, self.files), f"{self.name}: {written} of {self.rows} rows"
        return self.entries


# --- the card ----------------------------------------------------------------------------------------------

def card(facts: dict[str, Any], funnel: dict, extra: pa.Schema, entries: Sequence[dict]) -> str:
    """README.md: yaml that `datasets.load_dataset` and the Hub read, then what a person wants to know."""
    splits = {name: count for name, count in facts["splits"].items() if count}
    licences = sorted(set(facts["config"]["licences"].values()))
    head = {
        "license": "other" if licences else "unknown",
        "task_categories": ["image-to-text"],
        "configs": [{
            "config_name": "default",
            "data_files": [{"split": name, "path": f"{name}/*.parquet"} for name in splits],
        }],
    }
    files = [[name, count, sum(e["name"].startswith(f"{name}/") for e in entries)] for name, count in splits.items()]
    groups, near = facts["clusters"], facts["config"]["near"]
    columns = [*MEANING.items(), *([name, "the list's own"] for name in extra.names)]
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# Curated image-text pairs",
        f"{sum(splits.values())} pairs kept of {funnel['rows']}, from the pools {', '.join(facts['pools'])}.",
        "## Splits\n\n" + _markdown(["split", "rows", "files"], files),
        f"Pictures within {near['radius']} of 64 hash bits and a colour match of {near['match']:g}, directly or "
        f"through others, share a split: {groups['count']} clusters, {groups['of_several']} of several pictures, the "
        f"largest of {groups['largest']}.",
        "## Columns\n\n" + _markdown(["column", "what"], columns),
        "## Selection\n\n" + _markdown(
            ["rule", "rows in", "dropped", "rows out"],
            [[s["reason"], s["rows_in"], s["dropped"], s["rows_out"]] for s in funnel["steps"]],
        ),
        "## Pools\n\n" + _markdown(
            ["pool", "rows", "kept", "licence", "manifest sha256"],
            [[name, funnel["pools"][name]["rows"], funnel["pools"][name]["kept"],
              facts["config"]["licences"].get(name, "per row, or unknown"), digest]
             for name, digest in sorted(facts["pools"].items())],
        ),
        f"Selection manifest sha256: {facts['selection']}. Every row's decision, with the number behind it, is in the "
        f"selection's {filters.DECISIONS}; `uid` is the key.",
        "Pictures and captions belong to their authors; `url` and `licence` say what is known about each.",
    ]
    return "\n\n".join(parts) + "\n"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
