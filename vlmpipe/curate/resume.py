"""What an earlier download left: finished shards stay, finished rows of others are poured into the new spools."""

import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from vlmpipe import shards
from vlmpipe.curate.pool import FACTS, KIND, ShardTask
from vlmpipe.curate.spool import Spool


def open_again(out: Path, state: Path) -> dict[str, dict]:
    """Entries of finished shards, from this run's notes or the manifest of an earlier one."""
    out.mkdir(parents=True, exist_ok=True)
    entries = {}
    if (out / shards.MANIFEST).exists():
        entries = {entry["name"]: entry for entry in shards.read_manifest(out, KIND)["shards"]}
    for path in sorted((state / "done").glob("*.json")):
        entries[path.stem] = shards.read_json(path)
    return {name: entry for name, entry in entries.items() if _is_whole(out, entry)}


def _is_whole(out: Path, entry: dict) -> bool:
    files = dict(entry["files"])
    if entry.get("tar"):  # its name is of its content: to read it all again from the store would cost a download
        del files[f"{entry['name']}.tar"]
        if not shards.is_there(entry["tar"]):
            return False
    try:
        return all(shards.sha256_file(out / file) == digest for file, digest in files.items())
    except FileNotFoundError:
        return False


def is_done(task: ShardTask, entry: dict | None, resting: int = 0) -> bool:
    """Whether the shard stands as it is: the same rows under the same settings, nothing to try again but `resting`."""
    return entry is not None and entry["fingerprint"] == task.fingerprint and entry["retriable"] <= resting


def reuse(
    todo: list[ShardTask], tasks: list[ShardTask], known: dict[str, dict], out: Path, state: Path,
    resting: Set[str] = frozenset(),
) -> None:
    """Move finished rows of shards and spools that are about to go into the spools of the shards to come.

    Retriable rows that are `resting` (uids) count as finished for this time.
    """
    if todo or {task.name for task in tasks} != set(known):
        for name, entry in known.items():  # keep what the manifest knows before `out` stops being complete
            shards.write_json(state / "done" / f"{name}.json", entry)
        (out / shards.MANIFEST).unlink(missing_ok=True)
    kept = {task.name for task in tasks} - {task.name for task in todo}
    wanted = _wanted_uids(todo)
    settings = todo[0].settings if todo else ""
    for name, entry in known.items():
        if name not in kept and entry["settings"] == settings and wanted:
            _pour(_finished_rows(out, entry, wanted, resting), wanted)
    spools = {task.spool_file.name for task in todo}
    for path in sorted((state / "spool").glob("*.spool")):
        if path.name not in spools:
            if path.name.startswith(f"{settings}-") and wanted:
                _pour(_spooled_rows(path, wanted), wanted)
            path.unlink()
    _drop_stale(out, state, known, kept)


def _wanted_uids(todo: Sequence[ShardTask]) -> dict[str, ShardTask]:
    return {
        uid: task for task in todo for uid in pq.read_table(task.list_file, columns=["uid"])["uid"].to_pylist()
    }


def _finished_rows(
    out: Path, entry: dict, wanted: Mapping[str, Any], resting: Set[str]
) -> Iterator[tuple[dict, bytes | None]]:
    names = ["uid", *FACTS]
    rows = {row["uid"]: row for row in shards.read_shard_rows(out, entry["name"], names).to_pylist()}
    for uid, row in rows.items():
        if uid in wanted and (row["status"] == "refused" or (row["status"] == "retriable" and uid in resting)):
            yield row, None
    with shards.local_copy(entry.get("tar") or out / f"{entry['name']}.tar") as here:
        with tarfile.open(here, "r:") as tar:
            for member in tar:
                uid, suffix = os.path.splitext(member.name)
                if suffix == ".jpg" and uid in wanted:
                    yield rows[uid], tar.extractfile(member).read()


def _spooled_rows(path: Path, wanted: Mapping[str, Any]) -> Iterator[tuple[dict, bytes | None]]:
    with Spool(path) as old:
        for uid in old.uids():
            if uid in wanted:
                yield old.facts(uid), old.image(uid) or None


def _pour(rows: Iterator[tuple[dict, bytes | None]], wanted: Mapping[str, ShardTask]) -> None:
    with ExitStack() as stack:
        opened: dict[Path, Spool] = {}
        for facts, image in rows:
            path = wanted[facts["uid"]].spool_file
            if path not in opened:
                opened[path] = stack.enter_context(Spool(path))
            if facts["uid"] not in opened[path]:
                opened[path].append(facts, image)


def _drop_stale(out: Path, state: Path, known: dict[str, dict], kept: set[str]) -> None:
    for path in (state / "done").glob("*.json"):
        if path.stem not in kept:
            path.unlink()
    files = {file for name in kept for file in known[name]["files"]}
    shards.remove_stale(out, files | {shards.MANIFEST})
