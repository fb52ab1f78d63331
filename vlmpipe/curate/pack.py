"""The kept pairs as a dataset that training reads: train, validation and test, through Hugging Face `datasets`.

Written beside its place and moved there whole: an interrupted pack leaves nothing that could be read as a dataset.
Legend: K kept rows of all pools, in the order of the decisions; C clusters of near-duplicates.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmpipe import shards
from vlmpipe.curate import croissant, filters
from vlmpipe.curate.annotators.faces import blur_faces
from vlmpipe.curate.card import MEANING, OWN, UNKNOWN, card
from vlmpipe.curate.duplicates import Looks, Near, clusters
from vlmpipe.curate.expectations import packed_suites, validate
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

@dataclass(frozen=True)
class PackConfig:
    """How the kept pairs are split and written.

    `validation` and `test` are shares of the rows. Rows that are `near` each other, directly or through others,
    always share a split: wider than for dropping duplicates, because what was different enough to keep can still
    be too alike to test on. `seed` picks another split. `licences` names a pool's licence where its list has no
    `licence` column. `rows_per_file` bounds a parquet file. `blur_faces` blurs the boxes that the annotator `faces`
    found, which has to be on; a picture without faces keeps its bytes. `check` validates what was written with
    Great Expectations; `captions` is the least share of rows that must have one.
    """

    validation: float = 0.05
    test: float = 0.05
    near: Near = field(default_factory=lambda: Near(radius=10, match=0.8))
    seed: int = 0
    rows_per_file: int = 5000
    licences: dict[str, str] = field(default_factory=dict)
    blur_faces: bool = False
    check: bool = True
    captions: float = 0.5

    def __post_init__(self):
        if min(self.validation, self.test) < 0 or self.validation + self.test > 0.9:
            raise UserError(
                f"found validation {self.validation} and test {self.test}; expected shares of the rows, each at "
                f"least 0 and together at most 0.9"
            )
        if self.rows_per_file < 1:
            raise UserError(f"found rows_per_file {self.rows_per_file}; expected at least 1")
        if not 0 <= self.captions <= 1:
            raise UserError(f"found captions {self.captions}; expected a share of the rows from 0 to 1")


def pack(
    pools: Path, annotations: Path, selection: Path, out: Path, config: PackConfig, bias: Path | None = None
) -> None:
    """Write train/, validation/ and test/ parquet files, README.md (the dataset card) and manifest.json.

    And croissant.json, and where it is checked expectations.json and data_docs/.

    Args:
        bias: the audit's bias.json, for the card.

    Raises:
        UserError: an input is missing or damaged, is not the one that the others were made from, there are too few
            rows to split, or what was written is not as expected (it is then left beside `out`, for a look).
    """
    pools, annotations, selection, out = Path(pools), Path(annotations), Path(selection), Path(out)
    chosen = read_selection(pools, annotations, selection)
    split, cluster = assign_splits(chosen.sha256, chosen.looks, config)
    facts = {
        "splits": {name: int((split == number).sum()) for number, name in enumerate(SPLITS)},
        "config": asdict(config), "pools": chosen.lineage, "version": chosen.version,
        "selection": shards.sha256_file(selection / shards.MANIFEST), "clusters": _sizes(cluster),
    }
    funnel = shards.read_json(selection / filters.FUNNEL)
    partial = out.with_name(f".{out.name}.partial")
    for stale in (partial, _failed_place(out)):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        entries, facts["licences"] = _write_splits(partial, chosen, split, facts["splits"], config)
        tables = None if bias is None else shards.read_json(bias)
        shards.write_bytes_atomic(partial / "README.md", card(facts, funnel, chosen.extra, entries, tables).encode())
        shards.write_json(partial / croissant.FILE, _croissant(facts, funnel, chosen.extra, entries))
        shards.write_manifest(partial, KIND, entries, card=shards.sha256_file(partial / "README.md"), **facts)
        failed = _failed(partial, entries, facts["splits"], config, chosen.all_scored) if config.check else []
        if failed:
            raise UserError(_unlike(failed, partial, out))
        _move_into_place(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _croissant(facts: dict, funnel: dict, extra: pa.Schema, entries: Sequence[dict]) -> dict:
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary())])), *COLUMNS.items(), *extra])
    text = f"{sum(facts['splits'].values())} image-text pairs kept of {funnel['rows']}. Each has its url and licence."
    licences = sorted(licence for licence in facts["licences"] if licence != UNKNOWN)
    meaning = MEANING | dict.fromkeys(extra.names, OWN)
    version = f"1.0.0+{facts['version'][:16]}"
    return croissant.describe("curated-image-text-pairs", text, licences, version, entries, schema, meaning)


# --- what is expected of the packed data -------------------------------------------------------------------

def _failed(
    directory: Path, entries: Sequence[dict], splits: dict[str, int], config: PackConfig, scored: bool
) -> list[dict]:
    """Validate what was written, as it was written; the failed expectations."""
    totals, names = _Totals(), [name for name in SPLITS if splits[name]]
    frames = {
        f"packed-{name}": [totals.add(name, directory / file) for file in _files(entries, name)] for name in names
    }
    frames["packed"] = [totals.frame()]
    rules = packed_suites(names, sum(splits.values()), config.captions, scored)
    records = validate(rules, frames, directory / "data_docs")
    shards.write_json(directory / "expectations.json", records)
    return [record for record in records if not record["success"]]


def _files(entries: Sequence[dict], split: str) -> list[str]:
    return [file for entry in entries if entry["name"].startswith(f"{split}/") for file in entry["files"]]


class _Totals:
    """What no single file can tell: rows, repeated pairs, and pictures that stand in two splits."""

    def __init__(self):
        self.rows, self.captions, self.pairs, self.pictures = 0, 0, Counter(), {}

    def add(self, split: str, path: Path) -> pd.DataFrame:
        """The columns of one file that are checked row by row, pictures as their length and their first bytes."""
        file = pq.ParquetFile(path)
        known = [name for name in COLUMNS if name in file.schema_arrow.names]
        parts = [self._checked(batch) for batch in file.iter_batches(BATCH, columns=["image", *known])]
        table = pa.Table.from_batches(parts)
        self.rows += len(table)
        self.captions += len(table) - table["caption"].null_count
        self.pairs.update(zip(table["pool"].to_pylist(), table["uid"].to_pylist()))
        for digest in table["sha256"].to_pylist():
            self.pictures.setdefault(digest, set()).add(split)
        return table.to_pandas()

    def _checked(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        data = pc.struct_field(batch.column("image"), "bytes")
        jpeg = pc.fill_null(pc.starts_with(data, pattern=b"\xff\xd8\xff"), False)
        plain = batch.drop_columns(["image"])
        return plain.append_column("image_bytes", pc.binary_length(data)).append_column("image_is_jpeg", jpeg)

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame([{
            "rows": self.rows, "caption_share": self.captions / max(self.rows, 1),
            "repeated_pairs": self.rows - len(self.pairs),
            "pictures_in_two_splits": sum(len(splits) > 1 for splits in self.pictures.values()),
        }])


def _failed_place(out: Path) -> Path:
    return out.with_name(f"{out.name}.failed")


def _unlike(failed: Sequence[dict], partial: Path, out: Path) -> str:
    """Keep the evidence, and say what is not as expected."""
    kept = _failed_place(out)
    os.replace(partial, kept)
    more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
    return f"found packed data not as expected: {failed[0]['message']}{more}; {kept / 'data_docs/index.html'} has all"


def _sizes(cluster: np.ndarray) -> dict[str, int]:
    sizes = np.bincount(cluster)
    return {"count": len(sizes), "largest": int(sizes.max()), "of_several": int((sizes > 1).sum())}


def _write_splits(
    out: Path, chosen: "Chosen", split: np.ndarray, counts: dict[str, int], config: PackConfig
) -> tuple[list[dict], dict[str, int]]:
    """Write every split's files in one pass over the pools; the manifest's entries, and how many rows a licence has."""
    licences: Counter[str] = Counter()
    writers = [SplitWriter(out, name, counts[name], chosen.extra, config.rows_per_file) for name in SPLITS]
    try:
        for number, table, images in progress(_kept_batches(chosen, split, config), None, "pack: batches"):
            writers[number].write(table, images)
            licences.update(licence or UNKNOWN for licence in table["licence"].to_pylist())
        return [entry for writer in writers for entry in writer.close()], dict(licences)
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

    `version` is the sha256 of the kept uids, sorted, a line each: `sort | sha256sum`. `lineage` is
    each pool's manifest by its sha256, `extra` the columns of the pools beyond those that all have, `scored` the pools
    with scores (the annotator can be off).
    """

    pools: Path
    annotations: Path
    version: str
    lineage: dict[str, str]
    extra: pa.Schema
    kept: dict[str, np.ndarray]
    sha256: np.ndarray
    looks: Looks
    scored: list[str]

    @property
    def all_scored(self) -> bool:
        return set(self.scored) == set(self.kept)


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
    uids = sorted(decisions["uid"].filter(decisions["kept"]).to_pylist())
    version = hashlib.sha256("".join(f"{uid}\n" for uid in uids).encode()).hexdigest()
    scored = [name for name in lineage if "clip_score" in _columns(annotations / name)]
    digests = np.concatenate(digests).astype("S64")
    return Chosen(pools, annotations, version, lineage, extra, kept, digests, both, scored)


def _columns(annotations: Path) -> set[str]:
    files = (f"{shard['name']}.parquet" for shard in shards.read_manifest(annotations)["shards"])
    return {column for file in files for column in pq.read_schema(annotations / file).names}


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


def _kept_batches(chosen: Chosen, split: np.ndarray, config: PackConfig) -> Iterator[Batch]:
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
                wanted = ["uid", "clip_score"] if name in chosen.scored else ["uid"]
                scores = shards.read_shard_rows(chosen.annotations / name, shard["name"], wanted)
                table = _dataset_columns(rows, scores, chosen.extra, config.licences.get(name))
                boxes = _faces(chosen.annotations / name, shard["name"], table["uid"]) if config.blur_faces else None
                yield from _by_split(pool, shard["name"], table, splits, boxes)


def _dataset_columns(rows: pa.Table, scores: pa.Table, extra: pa.Schema, licence: str | None) -> pa.Table:
    """The dataset's columns, without the picture, of some rows of a pool."""
    place = pc.index_in(rows["uid"], value_set=scores["uid"])
    if "clip_score" in scores.column_names:
        rows = rows.append_column("clip_score", scores["clip_score"].take(place))
    stated = [rows[name].cast(pa.string()) for name in LICENCE_COLUMNS if name in rows.column_names]
    missing = pa.array([licence] * len(rows), pa.string())
    columns = {"licence": pc.coalesce(*stated, missing)}
    for entry in [*(pa.field(name, kind) for name, kind in COLUMNS.items() if name != "licence"), *extra]:
        known = entry.name in rows.column_names
        columns[entry.name] = rows[entry.name].cast(entry.type) if known else pa.nulls(len(rows), entry.type)
    return pa.table({name: columns[name] for name in (*COLUMNS, *extra.names)})


def _faces(annotations: Path, shard: str, uids: pa.ChunkedArray) -> list[list[list[int]]]:
    """The boxes of the faces in some rows of a shard.

    Raises:
        UserError: the annotator of faces was off, or failed on one of the rows.
    """
    table = shards.read_shard_rows(annotations, shard)
    if "face_boxes" not in table.column_names:
        raise UserError(f"found no face_boxes in {annotations}; expected those that blur_faces blurs; add "
                        f"`faces: {{}}` to curation.annotate and rerun annotate, or turn curation.pack.blur_faces off")
    boxes = table["face_boxes"].take(pc.index_in(uids, value_set=table["uid"])).to_pylist()
    unknown = [uid for uid, found in zip(uids.to_pylist(), boxes) if found is None]
    if unknown:
        raise UserError(f"found no faces measured in {unknown[0]} and {len(unknown) - 1} more rows of {annotations}; "
                        f"expected them for blur_faces; drop such rows in select (column faces), or see faces_error")
    return boxes


def _by_split(
    pool: Path, shard: str, table: pa.Table, splits: np.ndarray, faces: Sequence[Sequence] | None = None
) -> Iterator[Batch]:
    """The rows of one shard with their pictures, each split's together; the boxes in `faces` are blurred."""
    uids = table["uid"].to_pylist()
    waiting: dict[int, tuple[list[int], list[bytes]]] = {number: ([], []) for number in range(len(SPLITS))}
    row = 0
    for uid, data in shards.iter_images(pool, shard):
        if row == len(uids) or uid != uids[row]:
            continue  # downloaded, not kept
        rows, images = waiting[int(splits[row])]
        rows.append(row)
        images.append(blur_faces(data, faces[row]) if faces else data)
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
