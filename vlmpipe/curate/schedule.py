"""Which row is asked for next: one at a time from each host in turn, as many and as often as its host may be asked.

Hosts never wait for each other. A host that is slow, or that asked to wait, holds only its own rows back.
"""

import heapq
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Row = Any  # whatever the caller calls a row


@dataclass
class _Host:
    rows: deque = field(default_factory=deque)
    running: int = 0
    not_before: float = 0.0
    interval: float = 0.0
    queued: bool = False  # stands in the line of hosts, or in the heap of those that wait


class Schedule:
    """Rows by host. Threads `take` rows until there are none, and say `done` after each.

    Args:
        connections: requests at once to one host; 0: as many as there are threads.
        interval: seconds between two requests to one host.
        threads: how many take; no host gets more than its share of them while others have rows.
        more: called, outside the lock, when fewer than `threads` rows are left to take; adds rows and returns
            True, or returns False when there are none to come.
    """

    def __init__(self, connections: int, interval: float, threads: int, more: Callable[[], bool] = lambda: False):
        self.connections, self.interval, self.threads, self._more = connections, interval, threads, more
        self._hosts: dict[str, _Host] = {}
        self._line: deque[str] = deque()  # hosts with rows that may be asked, in turn
        self._waiting: list[tuple[float, int, str, Row | None]] = []  # heap: a host, or a row, and its time
        self._numbers = itertools.count()
        self._open, self._left, self._active = 0, 0, 0  # rows not done; rows to take; hosts with rows or running
        self._exhausted = self._stopped = self._adding = False
        self._changed = threading.Condition()

    def add(self, host: str, row: Row) -> None:
        with self._changed:
            self._open += 1
            self._put(host, row)
            self._changed.notify()

    def _put(self, host: str, row: Row, first: bool = False) -> None:
        entry = self._hosts.get(host)
        if entry is None:
            entry = self._hosts[host] = _Host(interval=self.interval)
        self._active += not entry.rows and not entry.running
        entry.rows.appendleft(row) if first else entry.rows.append(row)
        self._left += 1
        self._enter(host, entry)

    def _enter(self, host: str, entry: _Host) -> None:
        """Put a host in line where it has rows and may be asked, or in the heap until it may."""
        if entry.queued or not entry.rows or entry.running >= self._share():
            return
        entry.queued = True
        if entry.not_before > time.monotonic():
            heapq.heappush(self._waiting, (entry.not_before, next(self._numbers), host, None))
        else:
            self._line.append(host)

    def _share(self) -> int:
        fair = math.ceil(self.threads / max(1, self._active))
        return min(fair, self.connections) if self.connections else fair

    def take(self) -> tuple[str, Row] | None:
        """The next (host, row) that may be asked for, or None when all are done or the schedule was stopped."""
        while True:
            with self._changed:
                if self._stopped:
                    return None
                if not self._wants_more():
                    found, wait = self._next()
                    if found is not None:
                        return found
                    if self._exhausted and not self._open:
                        return None
                    self._changed.wait(wait)
                    continue
                self._adding = True
            added = False
            try:
                added = self._more()
            finally:
                with self._changed:
                    self._adding, self._exhausted = False, self._exhausted or not added
                    self._changed.notify_all()

    def _wants_more(self) -> bool:
        return self._left < self.threads and not self._exhausted and not self._adding

    def _next(self) -> tuple[tuple[str, Row] | None, float | None]:
        """A row to ask for now, or how long nobody needs to look again."""
        now = time.monotonic()
        while self._waiting and self._waiting[0][0] <= now:
            _, _, host, row = heapq.heappop(self._waiting)
            if row is not None:  # where a host counts, those that were asked for before are let through
                self._put(host, row, first=True)
            else:
                self._hosts[host].queued = False
                self._enter(host, self._hosts[host])
        while self._line:
            host = self._line.popleft()
            entry = self._hosts[host]
            entry.queued = False
            if entry.not_before > now or entry.running >= self._share() or not entry.rows:
                self._enter(host, entry)
                continue
            row = entry.rows.popleft()
            entry.running += 1
            self._left -= 1
            if entry.interval:
                entry.not_before = now + entry.interval
            self._enter(host, entry)
            if self._line:
                self._changed.notify()
            return (host, row), None
        return None, self._waiting[0][0] - now if self._waiting else None

    def done(self, host: str, row: Row, again_at: float | None = None) -> None:
        """The row's request has ended; `again_at`: the monotonic time from which it may be asked for once more."""
        with self._changed:
            entry = self._hosts[host]
            entry.running -= 1
            if again_at is None:
                self._open -= 1
            else:
                heapq.heappush(self._waiting, (again_at, next(self._numbers), host, row))
            if not entry.rows and not entry.running:
                self._active -= 1
            self._enter(host, entry)
            if not self._open:
                self._changed.notify_all()
            elif self._line or self._waiting:
                self._changed.notify()

    def hold(self, host: str, until: float) -> None:
        """Ask this host for nothing before the monotonic time `until`."""
        with self._changed:
            if host in self._hosts:
                self._hosts[host].not_before = max(self._hosts[host].not_before, until)

    def slow_down(self, host: str, interval: float) -> None:
        """Leave at least `interval` seconds between two requests to this host."""
        with self._changed:
            if host in self._hosts:
                self._hosts[host].interval = max(self._hosts[host].interval, interval)

    def stop(self) -> None:
        """Have every thread end after the row that it is at."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
