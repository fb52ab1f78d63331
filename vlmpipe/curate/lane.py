"""The shards that one process downloads: threads fetch, a few child processes decode, and nobody waits for the other.

Rows of several shards may be on their way at once, so that the last slow rows of one don't hold up the next. A shard
whose last row is settled is assembled while the others go on.
"""

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlmpipe import shards
from vlmpipe.curate import ledger, notes
from vlmpipe.curate.assemble import assemble
from vlmpipe.curate.failures import parse_failure, status_of
from vlmpipe.curate.guard import Guard, host_of, tagged
from vlmpipe.curate.hosts import Hosts, Record
from vlmpipe.curate.pixels import DecoderPool
from vlmpipe.curate.pool import ShardTask
from vlmpipe.curate.schedule import Schedule
from vlmpipe.curate.sources.read import is_placed, outcome, read_rows
from vlmpipe.curate.spool import Spool

Fetch = Callable[[tuple[str, str]], tuple[str, Any, str | None]]  # (key, url) -> (key, stream, error), as img2dataset's


@dataclass
class _Shard:
    """A shard on its way. `left`: rows that are not settled yet."""

    task: ShardTask
    table: pa.Table
    spool: Spool
    failures: dict[int, dict]
    left: int = 0
    asked: dict[int, Record] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.uids, self.urls = self.table["uid"].to_pylist(), self.table["url"].to_pylist()


Row = tuple[_Shard, int]


class Lane:
    """Downloads `tasks`, all of one pool, in order; `fetch` is called from its threads."""

    def __init__(self, name: str, tasks: Sequence[ShardTask], guard: Guard, fetch: Fetch, decoders: DecoderPool):
        self.guard, self.fetch, self.decoders = guard, fetch, decoders
        self.config, self.state = tasks[0].config, tasks[0].state
        self.entries: dict[str, dict | Future] = {}
        self.error: BaseException | None = None
        self._tasks = list(tasks)
        self._coming = iter(self._tasks)
        self._bytes: queue.Queue = queue.Queue(4 * decoders.size)
        self._closing = ThreadPoolExecutor(1)
        self._open_shards: dict[str, _Shard] = {}
        self._progress = notes.Progress(self.state / "progress" / name)
        threads = min(self.config.threads, sum(task.rows for task in tasks))
        interval = 1 / self.config.host_rate if self.config.host_rate else 0.0
        self.schedule = Schedule(self.config.host_connections, interval, threads, self._open_next)

    def run(self) -> list[dict]:
        """Return the shards' entries for the manifest, in order."""
        fetchers = [threading.Thread(target=self._fetch_all, daemon=True) for _ in range(self.schedule.threads)]
        decoders = [threading.Thread(target=self._decode_all, daemon=True) for _ in range(self.decoders.size)]
        try:
            with self.guard.installed():
                _start_and_join(fetchers, decoders)
            for _ in decoders:
                self._bytes.put(None)
            _start_and_join(decoders)
        finally:  # an interrupt too: what is at work ends by itself, and starts nothing new
            self._stop(None)
            self._closing.shutdown(wait=True)
            for shard in self._open_shards.values():
                with shard.lock:  # nothing is written after a stop
                    shard.spool.close()
        if self.error is not None:
            raise self.error
        self._progress.write()
        return [_result(self.entries[task.name]) for task in self._tasks]

    def _stop(self, error: BaseException | None) -> None:
        self.error = self.error or error
        self.schedule.stop()
        self.guard.cancel()

    # --- shards ---

    def _open_next(self) -> bool:
        """Open the next shard and schedule its rows; False when there is none."""
        task = next(self._coming, None)
        if task is None:
            return False
        try:
            self._open(task)
        except BaseException as error:
            self._stop(error)
        return True

    def _open(self, task: ShardTask) -> None:
        spool = Spool(task.spool_file)
        if task.done_file.exists():  # a process that outlived a killed run got here first
            spool.close()
            self.entries[task.name] = shards.read_json(task.done_file)
            return
        table = pq.read_table(task.list_file)
        shard = self._open_shards[task.name] = _Shard(task, table, spool, {})
        open_rows = [row for row, uid in enumerate(shard.uids) if uid not in spool]
        self._progress.add(task.rows - len(open_rows))
        placed = [row for row in open_rows if is_placed(table, row)]
        shard.left = len(open_rows)
        self.guard.hosts.learn(notes.known_hosts(self.state))
        for row in sorted({*open_rows} - {*placed}):
            self.schedule.add(host_of(shard.urls[row]), (shard, row))
        for row, facts, image in read_rows(task, table, placed, self.decoders):
            if self.guard.cancelled:
                break
            self._settle(shard, row, facts, image)
        if not open_rows:
            self._close_soon(shard)

    def _close_soon(self, shard: _Shard) -> None:
        self.entries[shard.task.name] = self._closing.submit(self._close, shard)

    def _close(self, shard: _Shard) -> dict:
        task = self._open_shards.pop(shard.task.name).task
        try:
            notes.remember_hosts(task, self.guard.hosts)
            entry = assemble(task, shard.table, shard.spool, shard.failures)
            facts = [shard.spool.facts(uid) if uid in shard.spool else shard.failures[row]
                     for row, uid in enumerate(shard.uids)]
            ledger.write(task, shard.uids, shard.urls, facts, shard.asked)
            shards.write_json(task.done_file, entry)
            task.spool_file.unlink()
            return entry
        except BaseException as error:
            self._stop(error)
            raise
        finally:
            shard.spool.close()

    # --- rows ---

    def _fetch_all(self) -> None:
        try:
            while (taken := self.schedule.take()) is not None:
                self._fetch(*taken)
        except BaseException as error:
            self._stop(error)

    def _fetch(self, host: str, at: Row) -> None:
        shard, row = at
        tag = f"{shard.task.name}.{row}"
        _, stream, message = self.fetch((tag, tagged(shard.urls[row], tag)))
        record = shard.asked[row] = self.guard.record(tag)
        self.schedule.hold(host, self.guard.hosts.ready_at(host))
        if self.guard.robots is not None:
            self.schedule.slow_down(host, self.guard.robots.delays.get(host, 0.0))
        if stream is None:
            reason, detail = parse_failure(message)
            if self.guard.may_retry(tag, reason) and not self.guard.cancelled:
                self.schedule.done(host, at, record.not_before)
                return
        self.schedule.done(host, at)
        self.guard.records.pop(tag)
        if stream is None:
            self._settle(shard, row, {"status": status_of(reason), "reason": reason, "detail": detail}, None)
        else:
            self._bytes.put((shard, row, stream.getvalue()))

    def _decode_all(self) -> None:
        while (item := self._bytes.get()) is not None:
            if self.error is not None:
                continue  # empty the queue: fetchers wait at it
            try:
                shard, row, data = item
                got = self.decoders.decode(data)
                seen = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                self._settle(shard, row, seen | outcome(got), got.image)
            except BaseException as error:
                self._stop(error)

    def _settle(self, shard: _Shard, row: int, facts: dict, image: bytes | None) -> None:
        record = shard.asked.get(row)  # none of a row that has a place of its own
        facts |= {"uid": shard.uids[row], "http_status": record and record.http_status}
        if record is not None:  # kept with the row, for the ledger of a run that takes over from a killed one
            facts["cost"] = ledger.cost(record, time.time())
        with shard.lock:
            if self.guard.cancelled:
                return
            if facts["status"] == "retriable":
                shard.failures[row] = facts
            else:
                shard.spool.append(facts, image)
            shard.left -= 1
            last = not shard.left
        self._progress.add(1)
        if last:
            self._close_soon(shard)


def _result(entry: dict | Future) -> dict:
    return entry.result() if isinstance(entry, Future) else entry


def _start_and_join(threads: Sequence[threading.Thread], others: Sequence[threading.Thread] = ()) -> None:
    """Start what has not started; wait for `threads`, with an ear for Ctrl-C."""
    for thread in (*others, *threads):
        if thread.ident is None:
            thread.start()
    for thread in threads:
        thread.join()


def lane(name: str, tasks: Sequence[ShardTask], rules: Any, fetch: Fetch, decoders: DecoderPool) -> Lane:
    """A lane with a guard of its own that knows what the run's other processes found out about hosts."""
    return Lane(name, tasks, Guard(rules, Hosts(rules, notes.known_hosts(tasks[0].state))), fetch, decoders)
