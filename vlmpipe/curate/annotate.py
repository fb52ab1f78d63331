"""Measure every downloaded pair once: numbers for `select` to threshold, never a decision.

What is measured is the annotators' (`vlmpipe.curate.annotators`); here is what is done, kept and done again. A shard's
file carries a fingerprint of each annotator, so switching one on measures that one only.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmpipe import shards
from vlmpipe.curate.annotators import negative
from vlmpipe.curate.annotators.base import Annotator
from vlmpipe.curate.annotators.loop import Row, measure, schema_of
from vlmpipe.curate.annotators.table import AnnotateConfig
from vlmpipe.dispatch import Cluster, map_shards
from vlmpipe.errors import UserError

__all__ = ["AnnotateConfig", "annotate"]

KIND = "annotations"
VERSION = 3  # raise it when a column's meaning changes: every shard is then done again
FINGERPRINTS = b"vlmpipe.fingerprints"
Fingerprints = dict[str, str]  # by annotator


@dataclass(frozen=True)
class Task:
    """One shard to annotate; travels to a worker. `carried`: what its file holds; None: no file, or a damaged one."""

    name: str
    pool: Path
    scorer: str
    out: Path
    fingerprints: Fingerprints
    weights: Fingerprints
    config: AnnotateConfig
    carried: Fingerprints | None

    @property
    def path(self) -> Path:
        return self.out / f"{self.name}.parquet"


def annotate(name: str, pool: Path, scorer: Path, out: Path, config: AnnotateConfig, cluster: Cluster) -> None:
    """Annotate each downloaded row of the pool's shards into `out`; what is done and still true is kept.

    An annotator's columns of a shard are true when they were made from the same pool shard, config and weights.

    Raises:
        UserError: the pool or the scorer is incomplete or damaged, or an annotator's weights or package are not there.
    """
    pool, out = Path(pool).absolute(), Path(out).absolute()  # workers may stand in another directory
    scorer = Path(scorer).absolute() if Path(scorer).is_dir() else scorer  # else the id of a hub
    manifest = shards.read_manifest(pool)
    out.mkdir(parents=True, exist_ok=True)
    weights = _weights(config, str(scorer))
    tasks = [_task(shard, pool, str(scorer), out, config, weights) for shard in manifest["shards"]]
    pending = [task for task in tasks if not _done(task)]
    after = _pool_task(name, tasks, config)
    if pending or not _pool_done(after):  # the old manifest would vouch for shards that are about to change
        (out / shards.MANIFEST).unlink(missing_ok=True)
    map_shards(annotate_shard, pending, cluster, f"annotate {name}")
    if not _pool_done(after):
        map_shards(annotate_pool, [after], cluster, f"annotate {name}: the whole pool")
    entries = [_entry(task) for task in tasks]
    failed = _failures(name, tasks)
    shards.remove_stale(out, [shards.MANIFEST, *(file for entry in entries for file in entry["files"])])
    digest = weights.get("scorer") if tasks else None
    shards.write_manifest(out, KIND, entries, pool=name, scorer=digest, failed=failed)


def _entry(task: Task) -> dict:
    rows = pq.read_metadata(task.path).num_rows
    return {"name": task.name, "rows": rows, "files": {task.path.name: shards.sha256_file(task.path)}}


def _failures(name: str, tasks: list[Task]) -> dict[str, int]:
    """Rows on which each annotator failed, said aloud: one that fails on all rows looks like one that is off."""
    failed: dict[str, int] = {}
    for task in tasks:
        table = pq.ParquetFile(task.path)
        columns = [column for column in table.schema_arrow.names if column.endswith("_error")]
        for column in columns:
            here = table.read(columns=[column]).column(0)
            failed[column] = failed.get(column, 0) + len(here) - here.null_count
    failed = {column.removesuffix("_error"): count for column, count in sorted(failed.items()) if count}
    for annotator, count in failed.items():
        print(f"annotate {name}: {annotator} failed on {count} rows; the reasons are in {annotator}_error",
              file=sys.stderr, flush=True)
    return failed


# --- what is done ------------------------------------------------------------------------------------------

def _weights(config: AnnotateConfig, scorer: str) -> Fingerprints:
    """What names the weights of each annotator that has any, and of the scorer."""
    found = {"scorer": scorer_digest(scorer)} if config.scores else {}
    for name, (cls, settings) in config.chosen().items():
        for file in cls.weights(settings):
            if not file.is_file():
                raise UserError(f"found no file {file}; expected the weights of {name}; check the path, or take it out "
                                f"of curation.annotate")
            found[name] = shards.sha256_file(file)
    return found


def scorer_digest(scorer: str) -> str:
    """What names a scorer's weights: the sha256 of its files' names and bytes, or a hub id as it stands."""
    return shards.sha256_directory(scorer) if Path(scorer).is_dir() else scorer


def _task(
    shard: dict, pool: Path, scorer: str, out: Path, config: AnnotateConfig, weights: Fingerprints
) -> Task:
    # Not the batch size: halving it after running out of memory must not throw finished shards away.
    made: Fingerprints = {}
    for name, (cls, settings) in config.chosen().items():
        uses = [made[needed] for needed in config.needed_by(name)]
        scored = weights.get("scorer") if cls.uses_scorer else None
        made[name] = _fingerprint(VERSION, shard["files"], asdict(settings), weights.get(name), scored, uses)
    # Read now: the manifest, by which damage shows, is gone once shards are about to change.
    carried = _carried(out / f"{shard['name']}.parquet")
    return Task(shard["name"], pool, scorer, out, made, weights, config, carried)


def _fingerprint(*facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _carried(path: Path) -> Fingerprints | None:
    """The fingerprints in a shard's file; None where it is not there or damaged."""
    try:
        shards.check_file(path.parent, path.name)  # a damaged file still carries its fingerprints
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowInvalid, UserError):
        return None
    return json.loads(metadata.get(FINGERPRINTS, b"{}"))


def _done(task: Task) -> bool:
    off = {negative.NAME: None}
    return task.carried is not None and task.carried | off == task.fingerprints | off


# --- a shard -----------------------------------------------------------------------------------------------

def annotate_shard(task: Task) -> None:
    """Write one shard's annotations; rows are the pool's downloaded ones in the pool's order."""
    kept = {name for name, mark in task.fingerprints.items() if (task.carried or {}).get(name) == mark}
    old = pq.read_table(task.path).combine_chunks() if kept else None
    fresh = tuple(name for name in task.fingerprints if name not in kept)
    new = _measured(task, fresh, old) if fresh or old is None else old
    columns = {"uid": new["uid"]}
    for name in task.fingerprints:
        source = old if name in kept else new
        columns |= {column: source[column] for column in _groups(source)[name]}
    _write(task.path, pa.table({**columns, "error": new["error"]}), task.fingerprints)


def _measured(task: Task, names: tuple[str, ...], old: pa.Table | None) -> pa.Table:
    annotators = _annotators(task.config, names, task.scorer, tuple(task.weights.items()))
    needed = {column for one in annotators.values() for column in one.needs}
    known = old.select([name for name in old.column_names if name in needed]) if old else pa.table({})
    tables = measure(_batches(task, known), annotators, task.config.threads)
    return pa.concat_tables([schema_of(annotators).empty_table(), *tables]).combine_chunks()


def _groups(table: pa.Table) -> dict[str, list[str]]:
    """The columns of each annotator: its error closes them."""
    groups, group = {}, []
    for column in table.column_names[1:]:
        group.append(column)
        if column.endswith("_error"):
            groups[column.removesuffix("_error")] = group
            group = []
    return groups


def _write(path: Path, table: pa.Table, marks: Fingerprints) -> None:
    facts = {FINGERPRINTS: json.dumps(marks, sort_keys=True)}
    shards.write_table(path, table.combine_chunks().replace_schema_metadata(facts))


@lru_cache(maxsize=1)
def _annotators(
    config: AnnotateConfig, names: tuple[str, ...], scorer: str, weights: tuple[tuple[str, str], ...]
) -> dict[str, Annotator]:
    """Loaded once a process. The weights' digests are in the key for files that change at the same path."""
    return config.build(names, scorer)


def _batches(task: Task, known: pa.Table) -> Iterator[tuple[list[Row], dict[str, pa.Array]]]:
    """The shard's rows in batches, with what is known of them already."""
    at = 0
    for rows in shards.batched(_pairs(task.pool, task.name), task.config.batch_size):
        part = known.slice(at, len(rows)).combine_chunks()
        yield rows, {name: part[name].chunk(0) for name in part.column_names}
        at += len(rows)


def _pairs(pool: Path, name: str) -> Iterator[Row]:
    """A shard's downloaded rows, from its parquet and its tar in step."""
    rows = shards.read_shard_rows(pool, name, ["uid", "caption", "status"])
    rows = rows.filter(pc.equal(rows["status"], "downloaded"))
    images = shards.iter_images(pool, name)
    for uid, caption in zip(rows["uid"].to_pylist(), rows["caption"].to_pylist()):
        member, data = next(images, (None, b""))
        if member != uid:
            raise shards.corrupt(pool / f"{name}.tar", f"found picture {member} where its table lists {uid}")
        yield Row(uid, caption or "", data)
    if (extra := next(images, None)) is not None:
        raise shards.corrupt(pool / f"{name}.tar", f"found picture {extra[0]}, which its table does not list")


# --- the whole pool ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class PoolTask:
    """What needs all shards: they are read once they are done. `mark` is None where it is off."""

    name: str
    paths: tuple[Path, ...]
    mark: str | None
    config: negative.NegClipLossConfig | None


def _pool_task(name: str, tasks: list[Task], config: AnnotateConfig) -> PoolTask:
    settings = config.neg_clip_loss
    made = [(task.name, task.fingerprints.get("embeddings")) for task in tasks]
    mark = _fingerprint(VERSION, made, asdict(settings)) if settings else None
    return PoolTask(name, tuple(task.path for task in tasks), mark, settings)


def _pool_done(task: PoolTask) -> bool:
    return all((_carried(path) or {}).get(negative.NAME) == task.mark for path in task.paths)


def annotate_pool(task: PoolTask) -> None:
    """Give every shard its negCLIPLoss, or take it away where it is off. Killed in between, it is done again."""
    losses = negative.pool_losses(task.paths, task.config) if task.config else None
    at = 0
    for path in task.paths:
        table, marks = pq.read_table(path), _carried(path) or {}
        rows = slice(at, at + len(table))
        at = rows.stop
        if marks.pop(negative.NAME, None) == task.mark:
            continue
        table = table.drop_columns([field.name for field in negative.FIELDS if field.name in table.column_names])
        if losses is not None:
            marks[negative.NAME] = task.mark
            for field, array in zip(negative.FIELDS, negative.arrays(losses[rows])):
                table = table.add_column(table.num_columns - 1, field, array)
        _write(path, table, marks)
