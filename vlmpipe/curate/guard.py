"""The guard between a URL list and the network: an opener for `urllib.request` that trusts nothing.

img2dataset downloads through `urllib.request.urlopen`, so a `Guard` installed as the process's opener holds every
request to the rules: http and https only, no private addresses (checked on the connected peer, so redirects and
DNS rebinding are covered), a byte cap, one deadline per URL over all its attempts, bounded redirects. What
it learns of hosts it tells `Hosts`, and does as that says.
"""

import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from vlmpipe.curate.failures import ASKS_TO_WAIT, BUSY, Failure, explain, status_of
from vlmpipe.curate.hosts import Hosts, Record, Rules

HEADER_BYTES = 1 << 20  # allowed on top of the body's cap, for headers and the bodies of redirects
SENT_AS_IS = "%/:=&?~+!$,;'@()*[]|"
NAT64 = ipaddress.ip_network("64:ff9b::/96")
_here = threading.local()  # deadline and bytes left of the request that this thread is making


def tagged(url: str, tag: object) -> str:
    """The URL as urllib can send it, with a row's tag where a fragment stands (fragments are never sent).

    What is no URL at all becomes the tag alone, which urllib refuses.
    """
    url = re.sub(r"[\t\r\n]", "", url.strip()).partition("#")[0]
    scheme, slashes, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    try:
        if not host.isascii():
            host = host.encode("idna").decode()
        urllib.parse.urlsplit(f"{scheme}{slashes}{host}")
    except ValueError:
        return f"#{tag}"
    return urllib.parse.quote(f"{scheme}{slashes}{host}{slash}{path}", safe=SENT_AS_IS) + f"#{tag}"


class Guard:
    """An opener that holds requests to `rules`; use `with guard.installed():` around calls of `urlopen`."""

    def __init__(self, rules: Rules, hosts: Hosts | None = None):
        self.rules = rules
        self.hosts = hosts or Hosts(rules)
        self.records: dict[str, Record] = {}
        self.cancelled = False
        self._allow = [ipaddress.ip_network(network, strict=False) for network in rules.allow]
        self._mapped = {_plain(host): tuple(place) for host, place in rules.hosts.items()}
        self._director = self._build()

    def _build(self) -> urllib.request.OpenerDirector:
        # No proxy handler: a proxy's address says nothing about where a request ends. No file, ftp or data handler.
        director = urllib.request.OpenerDirector()
        context = ssl.create_default_context()
        context.sslsocket_class = _BoundedTLS
        redirects = _Redirects()
        redirects.max_redirections, redirects.max_repeats = self.rules.redirects, self.rules.redirects
        for handler in (
            _Http(self._connect), _Https(self._connect, context), redirects,
            urllib.request.HTTPErrorProcessor(), urllib.request.HTTPDefaultErrorHandler(),
        ):
            director.add_handler(handler)
        return director

    @contextmanager
    def installed(self) -> Iterator["Guard"]:
        """Be the opener of this process's `urllib.request.urlopen`."""
        urllib.request.install_opener(self)
        try:
            yield self
        finally:
            urllib.request.install_opener(None)

    def record(self, tag: object) -> Record:
        return self.records.setdefault(str(tag), Record())

    def cancel(self) -> None:
        """Fail every further request at once."""
        self.cancelled = True

    def open(self, request: urllib.request.Request, data: None = None, timeout: object = None) -> "Answer":
        """What `urllib.request.urlopen` calls. `timeout` gives way to the rules.

        Raises:
            Failure: always this type, whatever went wrong.
        """
        url, _, tag = request.full_url.rpartition("#")
        record = self.record(tag)
        record.deferred, record.final, record.http_status = False, False, None
        host = _check_url(url, record)
        with self._watched(record, host):
            self._check_busy(host, record)
            record.attempts += 1
            plain = urllib.request.Request(url, headers=dict(request.header_items()))
            response = self._director.open(plain, timeout=self.rules.connect_timeout)
            record.http_status = response.status
            self.hosts.served(host)
            return Answer(self, response, record, host)

    def _check_busy(self, host: str, record: Record) -> None:
        if self.cancelled:
            raise Failure("download_error", "stopped")
        self.hosts.check(host)
        if (ready := self.hosts.ready_at(host)) > time.monotonic():
            record.deferred, record.not_before = True, ready
            raise Failure("http_429", BUSY, 429)

    @contextmanager
    def _watched(self, record: Record, host: str) -> Iterator[None]:
        """Bound the block by the URL's deadline, and turn whatever it raises into a Failure."""
        start = time.monotonic()
        _here.deadline = start + self.rules.deadline - record.spent
        _here.bytes_left = self.rules.max_bytes + HEADER_BYTES
        try:
            yield
        except Exception as error:
            failure = explain(error, self.rules.deadline)
            record.http_status = failure.http_status or record.http_status
            if not record.deferred:
                self._note(record, host, failure, time.monotonic())
            raise failure from None
        finally:
            record.spent += time.monotonic() - start

    def _note(self, record: Record, host: str, failure: Failure, now: float) -> None:
        wait = self.rules.backoff * 2 ** max(record.attempts - 1, 0)
        if failure.http_status in ASKS_TO_WAIT:
            self.hosts.limited(host, failure)
            wait = wait if failure.wait is None else failure.wait
        elif failure.http_status is not None:
            self.hosts.served(host)
        record.not_before = now + wait
        record.final = failure.hopeless or status_of(failure.reason) == "refused" or wait > self.rules.max_wait

    def may_retry(self, tag: object, reason: str) -> bool:
        """Whether this row should be asked for again in this run."""
        record = self.record(tag)
        if record.deferred:
            return True
        given_up = reason in ("dns", "download_error") or record.final or status_of(reason) == "refused"
        return not given_up and record.attempts < self.rules.attempts and record.spent < self.rules.deadline

    def _connect(self, address: tuple[str, int], timeout: object = None, source_address: object = None):
        """In place of `socket.create_connection`, for both schemes."""
        host, port = _plain(address[0]), address[1]
        place = f"{host}:{port}"
        self.hosts.check(place)
        try:
            connection = self._dial(host, port)
        except Failure as failure:
            self.hosts.failed(place, failure)
            raise
        self.hosts.connected(place)
        return connection

    def _dial(self, host: str, port: int) -> socket.socket:
        mapped = self._mapped.get(host)
        refusal = Failure("dns", "the name has no address")
        for family, kind, protocol, _, target in _resolve(*(mapped or (host, port))):
            connection = _Bounded(family, kind, protocol)
            try:
                self._check_address(target[0], mapped)
                connection.settimeout(min(self.rules.connect_timeout, _seconds_left()))
                connection.connect(target)
                self._check_address(connection.getpeername()[0], mapped)
                return connection
            except (OSError, Failure) as error:
                connection.close()
                refusal = _connect_failure(error, self.rules)
        raise refusal

    def _check_address(self, text: str, mapped: tuple[str, int] | None) -> None:
        address = ipaddress.ip_address(text.partition("%")[0])
        if mapped and address == ipaddress.ip_address(mapped[0]):
            return
        if not is_public(address) and not any(address in network for network in self._allow):
            raise Failure("private_address", f"{address}; list its network in allow_addresses if it is wanted")


class Answer:
    """An open response, as `urlopen` gives it, whose body is bounded in size and time."""

    def __init__(self, guard: Guard, response: http.client.HTTPResponse, record: Record, host: str):
        self._guard, self._response, self._record, self._host = guard, response, record, host
        self.headers = response.headers

    def __enter__(self) -> "Answer":
        return self

    def __exit__(self, *_: object) -> None:
        self._response.close()

    def read(self) -> bytes:
        """The whole body.

        Raises:
            Failure: too large, too slow, or shorter than the server said.
        """
        with self._guard._watched(self._record, self._host):
            return self._read(self._guard.rules.max_bytes)

    def _read(self, cap: int) -> bytes:
        expected = self._response.length
        if expected is not None and expected > cap:
            raise Failure("too_large", f"{expected} bytes; at most {cap} are taken")
        chunks, size = [], 0
        while chunk := self._response.read1(1 << 16):
            chunks.append(chunk)
            size += len(chunk)
            if size > cap:
                raise Failure("too_large", f"more than the {cap} bytes that are taken")
        if expected is not None and size < expected:
            raise Failure("truncated", f"fewer than the {expected} bytes announced")
        return b"".join(chunks)


# --- parts of a connection ---------------------------------------------------------------------------------

class _Bounded(socket.socket):
    """A socket whose reads end with the deadline and the byte budget of the thread's request."""

    def recv_into(self, *arguments: Any, **options: Any) -> int:
        self.settimeout(_seconds_left())
        return _spend(super().recv_into(*arguments, **options))


class _BoundedTLS(ssl.SSLSocket):
    def recv_into(self, *arguments: Any, **options: Any) -> int:
        self.settimeout(_seconds_left())
        return _spend(super().recv_into(*arguments, **options))


def _seconds_left() -> float:
    left = _here.deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _spend(count: int) -> int:
    _here.bytes_left -= count
    if _here.bytes_left < 0:
        raise Failure("too_large", "more bytes than are taken, in headers or redirects")
    return count


class _HttpConnection(http.client.HTTPConnection):
    def __init__(self, *arguments: Any, connect: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._create_connection = connect


class _HttpsConnection(http.client.HTTPSConnection):
    def __init__(self, *arguments: Any, connect: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._create_connection = connect


class _Http(urllib.request.HTTPHandler):
    def __init__(self, connect: Any):
        super().__init__()
        self.connection = partial(_HttpConnection, connect=connect)

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self.connection, request)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, connect: Any, context: ssl.SSLContext):
        super().__init__(context=context)
        self.connection = partial(_HttpsConnection, connect=connect, context=context)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self.connection, request)


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, response, code, message, headers, url):
        _check_url(url, None)
        return super().redirect_request(request, response, code, message, headers, url)


# --- small judgements --------------------------------------------------------------------------------------

def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is on the public internet, IPv4 inside IPv6 looked through."""
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    if teredo := getattr(address, "teredo", None):
        inner = teredo[1]
    if address.version == 6 and address in NAT64:
        inner = ipaddress.ip_address(int(address) & 0xFFFFFFFF)
    if inner is not None:
        return is_public(inner)
    return address.is_global and not address.is_multicast and not address.is_reserved


def _check_url(url: str, record: Record | None) -> str:
    """The host of an http or https URL."""
    reason = None
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
        if parts.scheme not in ("http", "https"):
            reason = Failure("scheme", f"'{parts.scheme}'; only http and https are fetched")
        elif not host or "@" in parts.netloc:
            reason = Failure("bad_url", "a name and password before the host" if host else "no host")
    except ValueError as error:
        reason = Failure("bad_url", str(error))
    if reason is not None:
        if record is not None:
            record.final = True
        raise reason
    return _plain(host)


def _plain(host: str) -> str:
    return host.casefold().rstrip(".").strip("[]")


def _resolve(host: str, port: int) -> list[tuple]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise Failure("dns", error.strerror or "the name was not found") from None
    except UnicodeError:
        raise Failure("bad_url", "the host is not a valid name") from None


def _connect_failure(error: Exception, rules: Rules) -> Failure:
    if isinstance(error, TimeoutError):
        return Failure("connect_timeout", f"no connection in {rules.connect_timeout:g} s")
    return explain(error, rules.deadline)
