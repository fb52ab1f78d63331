"""What the processes of one download tell each other, in files: hosts that are dead, rows done, time taken."""

import sys
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from vlmpipe import shards
from vlmpipe.curate.hosts import Hosts
from vlmpipe.curate.pool import ShardTask
from vlmpipe.progress import shown_while

WRITE_EVERY_S = 0.5


def forget(state: Path) -> None:
    """Start a run: what an earlier one noted of hosts and progress is no longer so."""
    for folder in ("hosts", "progress"):
        for path in (state / folder).glob("*"):
            path.unlink()


def remember_hosts(task: ShardTask, hosts: Hosts) -> None:
    shards.write_json(task.state / "hosts" / f"{task.name}.json", hosts.facts())


def known_hosts(state: Path) -> dict[str, Any]:
    """What `remember_hosts` noted in this run, all shards together."""
    known: dict[str, Any] = {"dead": {}, "answered": False}
    for path in sorted((state / "hosts").glob("*.json")):
        facts = shards.read_json(path)
        known["dead"] |= facts["dead"]
        known["answered"] |= facts["answered"]
    return known


class Progress:
    """Counts rows, and writes the count into a file now and then."""

    def __init__(self, path: Path):
        self.path, self.count, self._written = path, 0, 0.0
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, rows: int) -> None:
        with self._lock:
            self.count += rows
            due = time.monotonic() - self._written > WRITE_EVERY_S
            if due:
                self._written = time.monotonic()
        if due:
            self.write()

    def write(self) -> None:
        self.path.write_text(str(self.count))


def watched(label: str, state: Path, tasks: list[ShardTask], todo: list[ShardTask]) -> AbstractContextManager[None]:
    """Print `label: rows done/rows (%) rows/s` while shards are on their way, wherever they run."""
    total = sum(task.rows for task in tasks)
    before = total - sum(task.rows for task in todo)
    start = time.monotonic()

    def show(last: bool) -> None:
        counts = [path.read_text() for path in (state / "progress").glob("*")]
        done = before + sum(int(count or 0) for count in counts)
        rate = (done - before) / (time.monotonic() - start)
        print(f"{label}: {done}/{total} ({100 * done // total}%) {rate:.1f}/s", file=sys.stderr, flush=True)

    return shown_while(show)


def write_timing(state: Path, started: float, entries: Sequence[dict], done: Sequence[dict]) -> None:
    seconds = time.time() - started
    images = sum(entry["downloaded"] for entry in done)
    shards.write_json(state / "timing.json", {
        "started": started, "seconds": seconds, "rows": sum(entry["rows"] for entry in entries),
        "shards_fetched": len(done), "images": images, "images_per_second": images / seconds,
    })
