"""The ledger of a pool: for each URL what came of it, what it cost, where it led, and when it may be tried again.

It lies beside the pool, under the state directory: times and attempts differ between runs, so they are no part of
what DVC tracks. One parquet file a shard, a row for each URL in list order.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlmpipe.curate.guard import host_of
from vlmpipe.curate.hosts import Record
from vlmpipe.curate.pool import ShardTask
from vlmpipe.shards import write_table

# `attempts` and `seconds` are over all runs, `runs` counts those that asked for the row; times are seconds since 1970.
SCHEMA = pa.schema({
    "uid": pa.string(), "url": pa.string(), "host": pa.string(), "status": pa.string(), "reason": pa.string(),
    "detail": pa.string(), "http_status": pa.int32(), "attempts": pa.int32(), "runs": pa.int32(),
    "seconds": pa.float64(), "bytes": pa.int64(), "sha256": pa.string(), "final_url": pa.string(),
    "tried_at": pa.float64(), "next_attempt": pa.float64(),
})
FIRST_WAIT_S = 3600.0  # before a retriable row is due again; doubles with each run that failed
LONGEST_WAIT_S = 30 * 86400.0


def folder(state: Path) -> Path:
    return Path(state) / "ledger"


def write(
    task: ShardTask, uids: Sequence[str], urls: Sequence[str], facts: Sequence[Mapping[str, Any]],
    asked: Mapping[int, Record],
) -> None:
    """Write a shard's ledger: `facts` of each row as the pool holds them, `asked` what this run spent on which."""
    path = folder(task.state) / f"{task.name}.parquet"
    before = {line["uid"]: line for line in read(path)} if path.exists() else {}
    now = time.time()
    lines = [
        _line(uid, url, row, asked.get(i), before.get(uid, {}), now)
        for i, (uid, url, row) in enumerate(zip(uids, urls, facts))
    ]
    write_table(path, pa.Table.from_pylist(lines, SCHEMA))


def read(path: Path) -> list[dict]:
    """The lines of one shard's ledger."""
    return pq.read_table(path).to_pylist()


def _line(uid: str, url: str, facts: Mapping, record: Record | None, before: Mapping, now: float) -> dict:
    line = {name: facts.get(name) for name in ("status", "reason", "detail", "http_status", "bytes", "sha256")}
    tried = record is not None
    runs = (before.get("runs") or 0) + tried
    waits = tried and line["status"] == "retriable"
    return {
        **line, "uid": uid, "url": url, "host": host_of(url), "runs": runs,
        "attempts": (before.get("attempts") or 0) + (record.attempts if tried else 0),
        "seconds": (before.get("seconds") or 0.0) + (record.spent if tried else 0.0),
        "final_url": record.final_url if tried else before.get("final_url"),
        "tried_at": now if tried else before.get("tried_at"),
        "next_attempt": now + wait(runs) if waits else _still_waiting(line, before),
    }


def _still_waiting(line: Mapping, before: Mapping) -> float | None:
    return before.get("next_attempt") if line["status"] == "retriable" else None


def wait(runs: int) -> float:
    """Seconds until a row that failed in `runs` runs is due again."""
    return min(FIRST_WAIT_S * 2.0 ** max(0, min(runs, 64) - 1), LONGEST_WAIT_S)
