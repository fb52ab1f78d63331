"""Which rows the explorer shows: streamed over the decisions, so that memory does not grow with their number.

Legend: N rows of the decisions, S rows shown.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmpipe.errors import UserError
from vlmpipe.shards import check_file, corrupt, read_manifest

KEPT = "kept"  # the reason of a row that has none
BATCH = 1 << 16


@dataclass(frozen=True)
class Sample:
    """The rows shown, by reason and then in the order of the decisions.

    rows: their decisions [S], `reason` filled with `kept`. position: their places in the decisions [S]. weight: how
    many rows each stands for [S]; 0 where it is here only as the twin of another. counts: rows of each reason in all.
    shards: pool -> [(shard, place of its first row)].
    """

    rows: pa.Table
    position: np.ndarray
    weight: np.ndarray
    counts: dict[str, int]
    shards: dict[str, list[tuple[str, int]]]


def draw(decisions: Path, pools: Sequence[Path], samples: int, shards: int, seed: int) -> Sample:
    """At most `samples` rows, some of every reason, and the twins of the duplicates among them on top.

    Duplicates of one twin are drawn together. Rows come from `shards` random shards as long as these have enough of
    a reason, so that a large pool's pictures are not all read for a few of them.

    Raises:
        UserError: the decisions are damaged, or are not those of these pools.
    """
    counts, per_pool = _count(decisions)
    places = _shards(decisions, pools, per_pool)
    block = _blocks(places, shards, seed)
    quota = quotas(counts, samples)
    drawn = _lowest(decisions, quota, block, seed)
    position = np.concatenate([np.zeros(0, np.int64), *drawn.values()])
    weight = np.concatenate([np.zeros(0), *(np.full(len(drawn[name]), counts[name] / max(len(drawn[name]), 1))
                                            for name in drawn)])
    twins = _twins(decisions, position)
    position, weight = np.concatenate([position, twins]), np.concatenate([weight, np.zeros(len(twins))])
    order = np.argsort(position)
    position, weight, rows = position[order], weight[order], _take(decisions, position[order])
    order = _by_reason(rows, position, list(counts))
    return Sample(rows.take(order), position[order], weight[order], counts, places)


def quotas(counts: dict[str, int], samples: int) -> dict[str, int]:
    """How many rows of each reason: half the room in equal parts, the rest in proportion; at least one of each."""
    if sum(counts.values()) <= samples:
        return dict(counts)
    equal = max(1, samples // (2 * len(counts)))
    quota = {reason: min(count, equal) for reason, count in counts.items()}
    room = max(0, samples - sum(quota.values()))
    more = {reason: count - quota[reason] for reason, count in counts.items()}
    total = max(1, sum(more.values()))
    return {reason: quota[reason] + room * more[reason] // total for reason in counts}


# --- where rows are ----------------------------------------------------------------------------------------

def _batches(decisions: Path, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """(place of the first row, batch) in order, `reason` filled."""
    start = 0
    try:
        for batch in pq.ParquetFile(decisions).iter_batches(BATCH, columns=list(columns)):
            table = pa.Table.from_batches([batch])
            if "reason" in columns:
                place = table.column_names.index("reason")
                table = table.set_column(place, "reason", pc.fill_null(table["reason"], KEPT))
            yield start, table
            start += len(batch)
    except (OSError, pa.ArrowInvalid) as error:
        raise corrupt(decisions, str(error).splitlines()[0]) from None


def _count(decisions: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Rows of each reason, the kept ones first and then the most frequent, and of each pool."""
    check_file(decisions.parent, decisions.name)
    reasons, pools = pd.Series(dtype=np.int64), pd.Series(dtype=np.int64)
    for _, batch in _batches(decisions, ("reason", "pool")):
        reasons = reasons.add(batch["reason"].to_pandas().value_counts(), fill_value=0)
        pools = pools.add(batch["pool"].to_pandas().value_counts(), fill_value=0)
    ordered = sorted(reasons.items(), key=lambda item: (item[0] != KEPT, -item[1], item[0]))
    return {name: int(count) for name, count in ordered}, {name: int(count) for name, count in pools.items()}


def _shards(decisions: Path, pools: Sequence[Path], per_pool: dict[str, int]) -> dict[str, list[tuple[str, int]]]:
    """The decisions list pools by name and each pool in its order: so a row's place tells its shard."""
    places, start = {}, 0
    for pool in sorted(pools, key=lambda pool: pool.name):
        places[pool.name] = []
        before = start
        for shard in read_manifest(pool)["shards"]:
            places[pool.name].append((shard["name"], start))
            start += shard["rows"]
        if start - before != per_pool.get(pool.name, 0):
            raise UserError(f"{decisions}: found {per_pool.get(pool.name, 0)} rows of pool {pool.name}; expected its "
                            f"{start - before}; rerun `select`")
    if start != sum(per_pool.values()):
        raise UserError(f"{decisions}: found {sum(per_pool.values())} rows; expected the {start} of pools "
                        f"{', '.join(places)}; rerun `select`")
    return places


def _blocks(places: dict[str, list[tuple[str, int]]], size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(first row of each shard, number of the block of `size` random shards that it is in)."""
    starts = np.array([start for shards in places.values() for _, start in shards], np.int64)
    rank = np.random.default_rng(seed).permutation(len(starts))
    return starts, rank // size


# --- drawing -----------------------------------------------------------------------------------------------

def _lowest(
    decisions: Path, quota: dict[str, int], blocks: tuple[np.ndarray, np.ndarray], seed: int
) -> dict[str, np.ndarray]:
    """Of each reason the places of the `quota` rows of lowest (block, hash)."""
    drawn = {reason: (np.zeros(0, np.uint64), np.zeros(0, np.int64)) for reason in quota}
    starts, block = blocks
    for start, batch in _batches(decisions, ("uid", "reason", "other_uid")):
        position = np.arange(start, start + len(batch))
        shard = np.searchsorted(starts, position, side="right") - 1
        names = pc.coalesce(batch["other_uid"], batch["uid"]).to_numpy()
        hashed = pd.util.hash_array(names, hash_key=f"{seed % 10**16:016d}")
        key = (block[shard].astype(np.uint64) << np.uint64(40)) | (hashed >> np.uint64(24))
        for reason, places in batch.to_pandas().groupby("reason").indices.items():
            keys = np.concatenate([drawn[reason][0], key[places]])
            positions = np.concatenate([drawn[reason][1], position[places]])
            lowest = np.lexsort((positions, keys))[: quota[reason]]
            drawn[reason] = keys[lowest], positions[lowest]
    return {reason: positions for reason, (_, positions) in drawn.items()}


def _twins(decisions: Path, position: np.ndarray) -> np.ndarray:
    """Places of the rows that the drawn ones were duplicates of, where they were not drawn themselves."""
    wanted = pc.unique(pc.drop_null(_take(decisions, np.sort(position))["other_uid"]).combine_chunks())
    found = [np.zeros(0, np.int64)]
    for start, batch in _batches(decisions, ("uid",)) if len(wanted) else ():
        found.append(start + np.flatnonzero(pc.is_in(batch["uid"], value_set=wanted).to_numpy()))
    return np.setdiff1d(np.concatenate(found), position)


def _take(decisions: Path, position: np.ndarray) -> pa.Table:
    """The rows at ascending places."""
    columns = ("uid", "pool", "reason", "value", "threshold", "other_uid")
    parts = []
    for start, batch in _batches(decisions, columns):
        low, high = np.searchsorted(position, (start, start + len(batch)))
        parts.append(batch.take(position[low:high] - start))
    return pa.concat_tables(parts)


def _by_reason(rows: pa.Table, position: np.ndarray, reasons: list[str]) -> np.ndarray:
    rank = pc.index_in(rows["reason"], value_set=pa.array(reasons, pa.string())).to_numpy()
    return np.lexsort((position, rank))
