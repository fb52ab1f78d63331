"""HTTP connections that end with a request's deadline and byte budget, kept open for the next request to a host."""

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vlmpipe.curate.failures import Failure

IDLE_S = 4.0  # servers close idle connections after 5 s or more
IDLE_MOST = 128
_here = threading.local()  # deadline and bytes left of the request that this thread is making
Connect = Callable[..., socket.socket]
Origin = tuple[str, str, int | None]  # scheme, host, port


@contextmanager
def budget(seconds: float, size: int) -> Iterator[None]:
    """What this thread's requests in the block may take, all together."""
    _here.deadline, _here.bytes_left = time.monotonic() + seconds, size
    yield


def seconds_left() -> float:
    """Of the budget that this thread is in; TimeoutError when none are."""
    left = _here.deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _spend(count: int) -> int:
    _here.bytes_left -= count
    if _here.bytes_left < 0:
        raise Failure("too_large", "more bytes than are taken, in headers or redirects")
    return count


class Bounded(socket.socket):
    """A socket whose reads end with the deadline and the byte budget of the thread's request."""

    def recv_into(self, *arguments: Any, **options: Any) -> int:
        self.settimeout(seconds_left())
        return _spend(super().recv_into(*arguments, **options))


class BoundedTLS(ssl.SSLSocket):
    def recv_into(self, *arguments: Any, **options: Any) -> int:
        self.settimeout(seconds_left())
        return _spend(super().recv_into(*arguments, **options))


class Lines:
    """Connections by origin. `connect` makes the sockets, in place of `socket.create_connection`."""

    def __init__(self, connect: Connect, timeout: float):
        self._connect, self._timeout = connect, timeout
        self._context = ssl.create_default_context()
        self._context.sslsocket_class = BoundedTLS
        self._idle: dict[Origin, list[tuple[float, http.client.HTTPConnection]]] = {}
        self._idle_count = 0
        self._lock = threading.Lock()

    def ask(self, origin: Origin, path: str, headers: Mapping[str, str]) -> "Line":
        """GET `path`. A kept connection that the server has closed meanwhile is replaced, once."""
        if (kept := self._take(origin)) is not None:
            try:
                return Line(self, origin, kept, path, headers)
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError, ssl.SSLEOFError):
                pass  # it was no answer to this request
        return Line(self, origin, self._new(origin), path, headers)

    def _new(self, origin: Origin) -> http.client.HTTPConnection:
        scheme, host, port = origin
        if scheme == "https":
            made = http.client.HTTPSConnection(host, port, timeout=self._timeout, context=self._context)
        else:
            made = http.client.HTTPConnection(host, port, timeout=self._timeout)
        made._create_connection = self._connect
        return made

    def _take(self, origin: Origin) -> http.client.HTTPConnection | None:
        with self._lock:
            while kept := self._idle.pop(origin, None):
                since, connection = kept.pop()
                self._idle_count -= 1
                if kept:
                    self._idle[origin] = kept
                if time.monotonic() - since < IDLE_S:
                    return connection
                connection.close()
        return None

    def keep(self, origin: Origin, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            if self._idle_count >= IDLE_MOST:
                self._drop_oldest()
            self._idle.setdefault(origin, []).append((time.monotonic(), connection))
            self._idle_count += 1

    def _drop_oldest(self) -> None:
        """Close what is idle of the origin that was used longest ago: one that is used goes to the dict's end."""
        origin = next(iter(self._idle))
        for _, connection in self._idle.pop(origin):
            connection.close()
            self._idle_count -= 1

    def close(self) -> None:
        with self._lock:
            for kept in self._idle.values():
                for _, connection in kept:
                    connection.close()
            self._idle.clear()
            self._idle_count = 0


class Line:
    """One request on a connection, and its response. `close` keeps the connection where it can be used again."""

    def __init__(self, lines: Lines, origin: Origin, connection: http.client.HTTPConnection, path: str,
                 headers: Mapping[str, str]):
        self._lines, self._origin, self._connection = lines, origin, connection
        self.response: http.client.HTTPResponse | None = None
        try:
            if connection.sock is not None:
                connection.sock.settimeout(seconds_left())
            connection.request("GET", path, headers=headers)
            connection.sock.settimeout(seconds_left())
            self.response = connection.getresponse()
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        response, connection = self.response, self._connection
        if response.isclosed() and not response.will_close and connection.sock is not None:
            self._lines.keep(self._origin, connection)
        else:
            response.close()
            connection.close()
