"""The guard between a URL list and the network: an opener for `urllib.request` that trusts nothing.

img2dataset downloads through `urllib.request.urlopen`, so a `Guard` installed as the process's opener holds every
request to the rules: http and https only, no private addresses (checked on the connected peer, so redirects and
DNS rebinding are covered), a byte cap, one deadline per URL over all its attempts, bounded redirects. Hosts that
are dead are remembered, and hosts that ask to wait are left alone without holding a thread.
"""

import email.utils
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

# A later try may succeed. Every other reason is final: the row is refused and never asked for again.
RETRIABLE = {
    "dns", "connection_refused", "unreachable", "connect_timeout", "timeout", "reset", "truncated", "tls_error",
    "protocol", "offline", "download_error", "http_408", "http_425", "http_429",
    "http_500", "http_502", "http_503", "http_504", "http_520", "http_522", "http_524", "http_529",
}
ASKS_TO_WAIT = {429, 503}
BUSY = "the server asks to wait"  # the same words however it came out, so that runs give equal bytes
HEADER_BYTES = 1 << 20  # allowed on top of the body's cap, for headers and the bodies of redirects
SENT_AS_IS = "%/:=&?~+!$,;'@()*[]|"
NAT64 = ipaddress.ip_network("64:ff9b::/96")
_here = threading.local()  # deadline and bytes left of the request that this thread is making


class Failure(Exception):
    """Why a URL gave no image. Its text is `reason: detail`, which survives img2dataset's error strings.

    `wait`: seconds that the server asked for. `hopeless`: its host is given up for the rest of the run.
    """

    def __init__(self, reason: str, detail: str = "", http_status: int | None = None, wait: float | None = None):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.http_status, self.wait = reason, detail, http_status, wait
        self.hopeless = False


def parse_failure(message: str) -> tuple[str, str]:
    """(reason, detail) of an error string that img2dataset hands back, its own ones included."""
    if "X-Robots-Tag" in message:
        return "opt_out", message
    if message.startswith("unknown url type"):
        return "bad_url", "not the form of a URL"
    reason, colon, detail = message.partition(": ")
    if colon and re.fullmatch(r"[a-z][a-z0-9_]*", reason):
        return reason, detail
    return "download_error", message


def status_of(reason: str) -> str:
    """`retriable` or `refused`."""
    return "retriable" if reason in RETRIABLE else "refused"


@dataclass(frozen=True)
class Rules:
    """What a pool may do on the network. Seconds and bytes.

    `hosts` maps a host to the (address, port) to connect to in its place, like `curl --connect-to`; such a
    destination is allowed whatever its address. `allow` lists further networks in CIDR form. `deadline` is for
    one URL over all its attempts. `max_wait` bounds how long a server may ask to wait. After `offline_after`
    hosts failed and none ever answered, the network counts as down and the rest fails at once (0: never).
    """

    hosts: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    allow: tuple[str, ...] = ()
    max_bytes: int = 32 << 20
    connect_timeout: float = 5.0
    deadline: float = 30.0
    redirects: int = 5
    attempts: int = 3
    backoff: float = 0.5
    max_wait: float = 30.0
    offline_after: int = 200


@dataclass
class Record:
    """What a URL has cost so far: contacts made, seconds spent, and when it may be asked again."""

    attempts: int = 0
    spent: float = 0.0
    http_status: int | None = None
    not_before: float = 0.0
    final: bool = False
    deferred: bool = False


# --- hosts -------------------------------------------------------------------------------------------------

class Hosts:
    """What is known of hosts: dead ones fail at once, busy ones are left alone until they said."""

    QUICK = frozenset({"dns", "connection_refused", "unreachable"})
    RUN = 5  # requests to wait in a row, nothing else between them, are about the host and not about one URL

    def __init__(self, rules: Rules, known: Mapping[str, Any] | None = None):
        known = known or {}
        self.rules = rules
        self.dead: dict[str, tuple[str, str]] = {host: tuple(why) for host, why in known.get("dead", {}).items()}
        self.answered = bool(known.get("answered"))
        self._alive: set[str] = set()
        self._strikes: dict[str, int] = {}
        self._limited: dict[str, int] = {}
        self._fruitless: dict[str, tuple[int, str]] = {}  # passes without another answer, the last reason
        self._not_before: dict[str, float] = {}
        self._lock = threading.Lock()

    def facts(self) -> dict:
        """What the run's other shards should know: who can't be reached. Who is busy now may not be later."""
        with self._lock:
            dead = {host: list(why) for host, why in self.dead.items() if why[0] in self.QUICK | {"connect_timeout"}}
            return {"dead": dead, "answered": self.answered}

    def check(self, place: str) -> None:
        """Raise the remembered failure of a place: `host:port` that can't be reached, a host that is busy for good."""
        with self._lock:
            if place in self.dead:
                raise _hopeless(*self.dead[place])
            if self.rules.offline_after and not self.answered and len(self.dead) >= self.rules.offline_after:
                reasons = ", ".join(sorted({reason for reason, _ in self.dead.values()}))
                raise _hopeless("offline", f"no host of the first {self.rules.offline_after} answered ({reasons})")

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
        """A server asked to wait. A run of such answers leaves the host alone for as long."""
        wait, now = failure.wait or self.rules.backoff, time.monotonic()
        with self._lock:
            self._fruitless[host] = (self._fruitless.get(host, (0, ""))[0], failure.reason)
            self._limited[host] = self._limited.get(host, 0) + 1
            if self._limited[host] >= self.RUN and now >= self._not_before.get(host, 0.0):
                self._not_before[host] = now + wait
                if wait > self.rules.max_wait:
                    self.dead[host] = (failure.reason, failure.detail)

    def served(self, host: str) -> None:
        """The server gave another answer than to wait."""
        with self._lock:
            self._limited.pop(host, None)
            self._fruitless.pop(host, None)

    def end_pass(self) -> None:
        """After each pass over the rows: give up on a host that only asked to wait, pass after pass."""
        with self._lock:
            for host, (passes, reason) in self._fruitless.items():
                self._fruitless[host] = (passes + 1, reason)
                if passes + 1 >= self.rules.attempts:
                    self.dead.setdefault(host, (reason, BUSY))

    def ready_at(self, host: str) -> float:
        """The monotonic time from which the host may be asked."""
        with self._lock:
            return self._not_before.get(host, 0.0)


# --- the opener --------------------------------------------------------------------------------------------

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
            failure = explain(error, self.rules)
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

def _hopeless(reason: str, detail: str) -> Failure:
    failure = Failure(reason, detail, int(reason[5:]) if reason.startswith("http_") else None)
    failure.hopeless = True
    return failure


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
    return explain(error, rules)


def explain(error: BaseException, rules: Rules) -> Failure:
    """The Failure that an exception of urllib, http.client, ssl or socket stands for."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, urllib.error.HTTPError):
        return _http_failure(error)
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        return explain(error.reason, rules)
    for kinds, reason, detail in _EXPLANATIONS:
        if isinstance(error, kinds):
            return Failure(reason, detail or str(error))
    if isinstance(error, TimeoutError):
        return Failure("timeout", f"no complete answer in {rules.deadline:g} s")
    if isinstance(error, OSError):
        return Failure("unreachable", error.strerror or str(error))
    return Failure("download_error", f"{type(error).__name__}: {error}")


_EXPLANATIONS = (
    (ssl.SSLCertVerificationError, "certificate", ""),
    (ssl.SSLError, "tls_error", ""),
    (http.client.IncompleteRead, "truncated", "the body ended early"),
    (ConnectionRefusedError, "connection_refused", "nothing listens there"),
    ((ConnectionResetError, BrokenPipeError, ConnectionAbortedError), "reset", "the connection was closed"),
    ((http.client.InvalidURL, UnicodeError), "bad_url", ""),
    (http.client.HTTPException, "protocol", ""),
    (ValueError, "bad_url", ""),
)


def _http_failure(error: urllib.error.HTTPError) -> Failure:
    error.close()
    if 300 <= error.code < 400:
        if "is not allowed" in str(error.msg):  # urllib's own words for another scheme
            return Failure("scheme", "a redirect that leaves http and https", error.code)
        return Failure("redirect", "too many redirects, or to nowhere", error.code)
    wait = _retry_after(error.headers.get("Retry-After")) if error.code in ASKS_TO_WAIT else None
    detail = BUSY if error.code in ASKS_TO_WAIT else http.client.responses.get(error.code, "")
    return Failure(f"http_{error.code}", detail, error.code, wait)


def _retry_after(text: str | None) -> float | None:
    """Seconds of a Retry-After header, given as seconds or as a date (RFC 9110, 10.2.3)."""
    if text is None:
        return None
    if text.strip().isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None
