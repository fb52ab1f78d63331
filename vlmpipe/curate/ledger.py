"""The ledger of a pool: for each URL what came of it, what it cost, where it led, and when it may be tried again.

It lies beside the pool, under the state directory: times and attempts differ between runs, so they are no part of
what DVC tracks. One parquet file a shard, a row for each URL in list order.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from vlmpipe.curate.guard import host_of
from vlmpipe.curate.hosts import Record
from vlmpipe.curate.pool import ShardTask
from vlmpipe.errors import UserError
from vlmpipe.shards import write_table

# `attempts` and `seconds` are over all runs, `runs` counts those that asked for the row; times are seconds since 1970.
SCHEMA = pa.schema({
    "uid": pa.string(), "url": pa.string(), "host": pa.string(), "status": pa.string(), "reason": pa.string(),
    "detail": pa.string(), "http_status": pa.int32(), "attempts": pa.int32(), "runs": pa.int32(),
    "seconds": pa.float64(), "bytes": pa.int64(), "sha256": pa.string(), "final_url": pa.string(),
    "tried_at": pa.float64(), "next_attempt": pa.float64(),
})
STATUSES = ("downloaded", "retriable", "refused")
FIRST_WAIT_S = 3600.0  # before a retriable row is due again; doubles with each run that failed
LONGEST_WAIT_S = 30 * 86400.0


def folder(state: Path) -> Path:
    return Path(state) / "ledger"


def write(
    task: ShardTask, uids: Sequence[str], urls: Sequence[str], facts: Sequence[Mapping[str, Any]],
    asked: Mapping[int, Record],
) -> None:
    """Write a shard's ledger: `facts` of each row as the pool holds them, `asked` what this run spent on which.

    A row that a killed run finished has what it took in its facts, as `cost`.
    """
    path = folder(task.state) / f"{task.name}.parquet"
    before = {line["uid"]: line for line in read(path)} if path.exists() else {}
    now = time.time()
    lines = [
        _line(uid, url, row, cost(asked[i], now) if i in asked else row.get("cost"), before.get(uid, {}))
        for i, (uid, url, row) in enumerate(zip(uids, urls, facts))
    ]
    write_table(path, pa.Table.from_pylist(lines, SCHEMA))


def read(path: Path) -> list[dict]:
    """The lines of one shard's ledger."""
    return pq.read_table(path).to_pylist()


def cost(record: Record, now: float) -> dict[str, Any]:
    """What one run spent on a row, by the ledger's names."""
    return {"attempts": record.attempts, "seconds": record.spent, "final_url": record.final_url, "tried_at": now}


def _line(uid: str, url: str, facts: Mapping, spent: Mapping | None, before: Mapping) -> dict:
    line = {name: facts.get(name) for name in ("status", "reason", "detail", "http_status", "bytes", "sha256")}
    line |= {"uid": uid, "url": url, "host": host_of(url)}
    runs = (before.get("runs") or 0) + (spent is not None)
    if spent is None:
        kept = {name: before.get(name) for name in ("final_url", "tried_at")}
        waits = before.get("next_attempt")
        spent = {"attempts": 0, "seconds": 0.0}
    else:
        kept = {name: spent[name] for name in ("final_url", "tried_at")}
        waits = spent["tried_at"] + wait(runs)
    totals = {name: (before.get(name) or 0) + spent[name] for name in ("attempts", "seconds")}
    return line | kept | totals | {"runs": runs, "next_attempt": waits if line["status"] == "retriable" else None}


def wait(runs: int) -> float:
    """Seconds until a row that failed in `runs` runs is due again."""
    return min(FIRST_WAIT_S * 2.0 ** max(0, min(runs, 64) - 1), LONGEST_WAIT_S)


# --- read as a whole ---------------------------------------------------------------------------------------

def summary(state: Path, now: float | None = None) -> dict[str, Any]:
    """Rows, attempts, seconds and bytes by outcome and by host, and how many retriable rows are due.

    Raises:
        UserError: there is no ledger.
    """
    table = _whole(state)
    outcomes = table.group_by(["status", "reason"]).aggregate([
        ("uid", "count"), ("attempts", "sum"), ("seconds", "sum"), ("bytes", "sum")])
    retriable = table.filter(pc.equal(table["status"], "retriable"))
    due = is_due(retriable["next_attempt"], time.time() if now is None else now)
    return {
        "rows": table.num_rows, "attempts": pc.sum(table["attempts"]).as_py(), "hosts": _by_host(table),
        "outcomes": sorted(_renamed(outcomes), key=lambda row: (-row["rows"], row["status"], row["reason"] or "")),
        "retriable": retriable.num_rows, "due": pc.sum(due).as_py() or 0,
        "next_attempt": pc.min(retriable["next_attempt"].filter(pc.invert(due))).as_py(),
    }


def is_due(next_attempt: pa.ChunkedArray, now: float) -> pa.ChunkedArray:
    return pc.fill_null(pc.less_equal(next_attempt, now), True)


def _whole(state: Path) -> pa.Table:
    files = sorted(folder(state).glob("*.parquet"))
    if not files:
        raise UserError(f"found no ledger in {folder(state)}; expected one of a download that ran in this workspace; "
                        f"run the download stage (`dvc repro`)")
    names = ["uid", "host", "status", "reason", "attempts", "seconds", "bytes", "next_attempt"]
    return pa.concat_tables(pq.read_table(file, columns=names) for file in files)


def _renamed(grouped: pa.Table) -> list[dict]:
    names = {"uid_count": "rows", "attempts_sum": "attempts", "seconds_sum": "seconds", "bytes_sum": "bytes"}
    return grouped.rename_columns([names.get(name, name) for name in grouped.column_names]).to_pylist()


def _by_host(table: pa.Table) -> list[dict]:
    """A line a host, the largest first: rows by status, and the reason that most of its failures have."""
    totals = {row["host"]: row for row in _renamed(table.group_by(["host"]).aggregate(
        [("uid", "count"), ("attempts", "sum"), ("seconds", "sum"), ("bytes", "sum")]))}
    for row in totals.values():
        row.update(dict.fromkeys(STATUSES, 0), reason=None, most=0)
    for row in _renamed(table.group_by(["host", "status", "reason"]).aggregate([("uid", "count")])):
        host = totals[row["host"]]
        host[row["status"]] += row["rows"]
        if row["reason"] is not None and (-row["rows"], row["reason"]) < (-host["most"], host["reason"] or ""):
            host["most"], host["reason"] = row["rows"], row["reason"]
    return sorted(totals.values(), key=lambda row: (-row["rows"], row["host"]))


def show(name: str, found: Mapping[str, Any], hosts: int) -> None:
    """Print a summary; of hosts the largest."""
    console = Console()
    costs = map(_right, ("rows", "attempts", "seconds", "MB"))
    table = Table("status", Column("reason", no_wrap=True), *costs, title=f"pool {name}")
    for row in found["outcomes"]:
        table.add_row(row["status"], row["reason"] or "", *_costs(row))
    console.print(table)
    named = f"the {hosts} largest of {len(found['hosts'])} hosts" if hosts < len(found["hosts"]) else "hosts"
    counts = map(_right, (*STATUSES, "attempts", "seconds"))
    host, why = Column("host", min_width=14, overflow="fold"), Column("most failures", no_wrap=True)
    table = Table(host, *counts, why, title=named)
    for row in found["hosts"][:hosts]:
        table.add_row(escape(row["host"] or "(none)"), *(str(row[status]) for status in STATUSES), *_costs(row)[1:3],
                      row["reason"] or "")
    console.print(table)
    print(due_line(name, found))


def _right(name: str) -> Column:
    return Column(name, justify="right")


def _costs(row: Mapping[str, Any]) -> tuple[str, ...]:
    return str(row["rows"]), str(row["attempts"]), f"{row['seconds']:.1f}", f"{(row['bytes'] or 0) / 1e6:.1f}"


def due_line(name: str, found: Mapping[str, Any]) -> str:
    """How many rows `refresh` would try now, and when the next ones are due."""
    later = found["retriable"] - found["due"]
    soonest = "" if not later else f"; {later} wait, the first until {_clock(found['next_attempt'])}"
    return f"pool '{name}': {found['due']} of {found['retriable']} retriable rows are due{soonest}"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
