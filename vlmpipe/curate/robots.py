"""robots.txt (RFC 9309), read once a host and obeyed."""

import threading
import urllib.parse
import urllib.robotparser
from collections.abc import Callable


class Robots:
    """What hosts allow. `fetch` gives the file at a URL, or None where there is none; it raises where none can be had.

    What it raises is the row's failure: a host that does not even say what it allows is not asked for pictures.
    """

    def __init__(self, fetch: Callable[[str], bytes | None], agent: str):
        self._fetch, self._agent = fetch, agent
        self._known: dict[str, urllib.robotparser.RobotFileParser] = {}
        self.delays: dict[str, float] = {}  # host -> seconds between two requests that it asks for
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def allows(self, url: str) -> bool:
        return self._of(url).can_fetch(self._agent, url)

    def _of(self, url: str) -> urllib.robotparser.RobotFileParser:
        parts = urllib.parse.urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}"
        with self._lock:
            if origin in self._known:
                return self._known[origin]
            lock = self._locks.setdefault(origin, threading.Lock())
        with lock:
            if origin not in self._known:
                rules = urllib.robotparser.RobotFileParser()
                text = self._fetch(f"{origin}/robots.txt")
                rules.parse((text or b"").decode("utf-8", "replace").splitlines())
                with self._lock:
                    self._known[origin] = rules
                    if delay := rules.crawl_delay(self._agent):
                        self.delays[parts.hostname] = float(delay)
            return self._known[origin]
