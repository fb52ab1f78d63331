"""What a pool may do on the network, and what is known of the hosts that it asks.

Hosts that are dead are remembered and fail at once; hosts that ask to wait are left alone without holding a thread.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlmpipe.curate.failures import Failure, hopeless


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much and how long is asked of the network. Seconds and bytes.

    `deadline` is for one URL over all its `attempts`. `max_wait` bounds how long a server may ask to wait. After
    `offline_after` hosts failed and none ever answered, the network counts as down and the rest fails at once
    (0: never). One host gets at most `host_connections` requests at once (0: no limit but `threads`) and
    `host_rate` requests a second (0: no limit), from each process that downloads. `robots_txt` asks each host for
    its robots.txt first and does as that says, Crawl-delay included.
    """

    max_bytes: int = 32 << 20
    connect_timeout: float = 5.0
    deadline: float = 30.0
    redirects: int = 5
    attempts: int = 3
    backoff: float = 0.5
    max_wait: float = 30.0
    offline_after: int = 200
    host_connections: int = 16
    host_rate: float = 0.0
    robots_txt: bool = False


@dataclass(frozen=True, kw_only=True)
class Rules(Limits):
    """What a pool may do on the network.

    `hosts` maps a host to the (address, port) to connect to in its place, like `curl --connect-to`; such a
    destination is allowed whatever its address. `allow` lists further networks in CIDR form. `agent` is the
    User-Agent that is sent; its first word is the name that robots.txt may address. `opt_out` honours
    TDM-Reservation (W3C TDMRep); X-Robots-Tag is img2dataset's to look at.
    """

    hosts: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    allow: tuple[str, ...] = ()
    agent: str = "vlmpipe"
    opt_out: bool = True


@dataclass
class Record:
    """What a URL has cost so far: contacts made, seconds spent, where it led, and when it may be asked again."""

    attempts: int = 0
    spent: float = 0.0
    http_status: int | None = None
    final_url: str | None = None
    not_before: float = 0.0
    final: bool = False
    deferred: bool = False


class Hosts:
    """What is known of hosts: dead ones fail at once, busy ones are left alone until they said."""

    QUICK = frozenset({"dns", "connection_refused", "unreachable"})
    RUN = 5  # requests to wait in a row, nothing else between them, are about the host and not about one URL
    WAITS = 20  # of `max_wait` in all: a host that serves a few rows per wait can't hold a run for ever
    SLOW = 8  # answers in a row that did not end in time

    def __init__(self, rules: Rules, known: Mapping[str, Any] | None = None):
        known = known or {}
        self.rules = rules
        self.dead: dict[str, tuple[str, str]] = {host: tuple(why) for host, why in known.get("dead", {}).items()}
        self.answered = bool(known.get("answered"))
        self._alive: set[str] = set()
        self._strikes: dict[str, int] = {}
        self._limited: dict[str, int] = {}
        self._fruitless: dict[str, int] = {}  # waits in a row after which it asked to wait again
        self._held: dict[str, float] = {}  # seconds that it was waited for
        self._slow: dict[str, int] = {}
        self._not_before: dict[str, float] = {}
        self._lock = threading.Lock()

    def facts(self) -> dict:
        """What the run's other shards should know: who can't be reached. Who is busy now may not be later."""
        with self._lock:
            dead = {host: list(why) for host, why in self.dead.items() if why[0] in self.QUICK | {"connect_timeout"}}
            return {"dead": dead, "answered": self.answered}

    def learn(self, known: Mapping[str, Any]) -> None:
        """Take over what other processes of the run found out."""
        with self._lock:
            self.answered |= bool(known["answered"])
            for host, why in known["dead"].items():
                self.dead.setdefault(host, tuple(why))

    def check(self, place: str) -> None:
        """Raise the remembered failure of a place: `host:port` that can't be reached, a host that is busy for good."""
        with self._lock:
            if place in self.dead:
                raise hopeless(*self.dead[place])
            if self.rules.offline_after and not self.answered and len(self.dead) >= self.rules.offline_after:
                reasons = ", ".join(sorted({reason for reason, _ in self.dead.values()}))
                raise hopeless("offline", f"no host of the first {self.rules.offline_after} answered ({reasons})")

    def failed(self, place: str, failure: Failure) -> None:
        if failure.reason not in self.QUICK | {"connect_timeout"}:
            return
        with self._lock:
            self._strikes[place] = self._strikes.get(place, 0) + 1
            allowed = (1 if failure.reason in self.QUICK else 2) + (2 if place in self._alive else 0)
            if self._strikes[place] >= allowed:
                self.dead.setdefault(place, (failure.reason, failure.detail))
            failure.hopeless = place in self.dead

    def connected(self, place: str) -> None:
        with self._lock:
            self.answered = True
            self._alive.add(place)
            self._strikes.pop(place, None)

    def limited(self, host: str, failure: Failure) -> None:
        """A server asked to wait. A run of such answers leaves the host alone for as long, or longer each time."""
        now = time.monotonic()
        with self._lock:
            self._limited[host] = self._limited.get(host, 0) + 1
            if self._limited[host] < self.RUN or now < self._not_before.get(host, 0.0):
                return
            fruitless = self._fruitless[host] = self._fruitless.get(host, 0) + 1
            wait = failure.wait or self.rules.backoff * 2**fruitless
            held = self._held[host] = self._held.get(host, 0.0) + wait
            self._not_before[host] = now + wait
            longest = self.rules.max_wait
            if wait > longest or fruitless > self.rules.attempts or held > self.WAITS * longest:
                self.dead[host] = (failure.reason, failure.detail)

    def slow(self, host: str, failure: Failure) -> None:
        """An answer did not end within its deadline; a host where none does is given up."""
        with self._lock:
            self._slow[host] = self._slow.get(host, 0) + 1
            if self._slow[host] >= self.SLOW:
                self.dead.setdefault(host, (failure.reason, failure.detail))

    def served(self, host: str) -> None:
        """The server gave another answer than to wait."""
        with self._lock:
            self._limited.pop(host, None)
            self._fruitless.pop(host, None)

    def finished(self, host: str) -> None:
        """An answer ended in time."""
        with self._lock:
            self._slow.pop(host, None)

    def ready_at(self, host: str) -> float:
        """The monotonic time from which the host may be asked."""
        with self._lock:
            return self._not_before.get(host, 0.0)
