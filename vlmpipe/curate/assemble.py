"""From spooled rows to the shards of a pool: tar and parquet in list order, the manifest last."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa

from vlmpipe import shards
from vlmpipe.curate.pool import FACTS, KIND, PoolConfig, ShardTask
from vlmpipe.curate.sources.listing import finished
from vlmpipe.curate.sources.pairs import LISTED
from vlmpipe.curate.spool import Spool


def assemble(task: ShardTask, table: pa.Table, spool: Spool, failures: Mapping[int, dict]) -> dict:
    """Write the shard's tar and parquet in list order and return its entry."""
    uids = table["uid"].to_pylist()
    facts = [spool.facts(uid) if uid in spool else failures[i] for i, uid in enumerate(uids)]
    columns = {name: pa.array([row.get(name) for row in facts], kind) for name, kind in FACTS.items() if name != "pool"}
    columns["pool"] = pa.array([task.pool] * len(facts), pa.string())
    extra = {name: table[name] for name in table.column_names if name not in (*LISTED, "place")}
    full = pa.table({name: table[name] for name in LISTED} | columns | extra)
    assert full.num_rows == task.rows, f"shard {task.name}: {full.num_rows} rows out of {task.rows}"
    statuses = Counter(full["status"].to_pylist())
    entry = shards.write_shard(task.out, task.name, full, _members(full, spool))
    reasons = Counter(reason for reason in full["reason"].to_pylist() if reason)
    return {
        **entry, "fingerprint": task.fingerprint,
        "settings": task.settings, "reasons": dict(sorted(reasons.items())),
        **{status: statuses[status] for status in ("downloaded", "retriable", "refused")},
        **_stored(task, entry["files"][f"{task.name}.tar"]),
    }


def _members(rows: pa.Table, spool: Spool) -> Iterator[tuple[str, bytes]]:
    for row in rows.to_pylist():
        if row["status"] == "downloaded":
            yield f"{row['uid']}.jpg", spool.image(row["uid"])
            yield f"{row['uid']}.txt", row["caption"].encode()
            yield f"{row['uid']}.json", json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode()


def _stored(task: ShardTask, digest: str) -> dict:
    """Move the tar to the pool's store, under a name of its content: older versions stay readable."""
    if task.config.store is None:
        return {}
    tar = task.out / f"{task.name}.tar"
    target = f"{task.config.store.rstrip('/')}/{task.pool}/{task.name}-{digest[:16]}.tar"
    shards.put(tar, target)
    tar.unlink()
    return {"tar": target}


def finish(name: str, tasks: list[ShardTask], known: dict, done: list[dict], out: Path, config: PoolConfig) -> list:
    """Write the manifest, last, and drop what it does not list."""
    fresh = {entry["name"]: entry for entry in done}
    entries = [fresh.get(task.name) or known[task.name] for task in tasks]
    for entry, task in zip(entries, tasks):
        found = entry["downloaded"] + entry["retriable"] + entry["refused"]
        assert found == entry["rows"] == task.rows, f"shard {task.name}: {found} rows out of {task.rows}"
    files = {file for entry in entries for file in entry["files"]}
    shards.remove_stale(out, files | {shards.MANIFEST})
    totals = {status: sum(entry[status] for entry in entries) for status in ("downloaded", "retriable", "refused")}
    beside = finished(config.source, out, tasks[0].state)
    shards.write_manifest(out, KIND, entries, pool=name, image_size=config.image_size, **totals, **beside)
    return entries
