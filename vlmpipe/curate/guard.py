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
import threading
import time
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vlmpipe.curate.failures import ASKS_TO_WAIT, BUSY, Failure, explain, http_failure, status_of
from vlmpipe.curate.hosts import Hosts, Record, Rules
from vlmpipe.curate.robots import Robots
from vlmpipe.curate.wire import Bounded, Line, Lines, budget, seconds_left

HEADER_BYTES = 1 << 20  # allowed on top of the body's cap, for headers and the bodies of redirects
ROBOTS_BYTES = 512 << 10  # RFC 9309, 2.5: at least 500 KiB are read
REDIRECTS = {301, 302, 303, 307, 308}
ENCODINGS = {"gzip": 31, "x-gzip": 31, "deflate": 47}  # zlib's wbits
SENT_AS_IS = "%/:=&?~+!$,;'@()*[]|"
NAT64 = ipaddress.ip_network("64:ff9b::/96")


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
        self.robots = Robots(self._robots_file, re.split("[/ ]", rules.agent)[0]) if rules.robots_txt else None
        self._allow = [ipaddress.ip_network(network, strict=False) for network in rules.allow]
        self._mapped = {_plain(host): tuple(place) for host, place in rules.hosts.items()}
        self._lines = Lines(self._connect, rules.connect_timeout)
        self._addresses: dict[tuple[str, int], list[tuple]] = {}

    @contextmanager
    def installed(self) -> Iterator["Guard"]:
        """Be the opener of this process's `urllib.request.urlopen`."""
        urllib.request.install_opener(self)
        try:
            yield self
        finally:
            urllib.request.install_opener(None)
            self._lines.close()

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
        record.deferred, record.final, record.http_status, record.final_url = False, False, None, None
        host = _check_url(url, record)
        with self._watched(record, host):
            self._check_busy(host, record)
            record.attempts += 1
            line, record.final_url = self._follow(url, self.robots)
            record.http_status = line.response.status
            self.hosts.served(host)
            if self.rules.opt_out and line.response.headers.get("TDM-Reservation", "").strip() == "1":
                line.close()
                raise Failure("opt_out", "TDM-Reservation: 1", line.response.status)
            return Answer(self, line, record, host)

    def _follow(self, url: str, robots: Robots | None) -> tuple[Line, str]:
        """The answer at the end of all redirects, and its address."""
        for _ in range(self.rules.redirects + 1):
            if robots is not None and not robots.allows(url):
                raise Failure("robots_txt", "the host's robots.txt asks not to fetch it")
            parts = urllib.parse.urlsplit(url)
            path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
            headers = {"User-Agent": self.rules.agent, "Accept": "*/*"}
            line = self._lines.ask((parts.scheme, parts.hostname, parts.port), path, headers)
            status, place = line.response.status, line.response.headers.get("Location")
            if 200 <= status < 300:
                return line, url
            failure = http_failure(status, line.response.headers)
            line.close()
            if status not in REDIRECTS or place is None:
                raise failure
            url = urllib.parse.urljoin(url, _as_sent(place))
            _check_url(url, None)
        raise failure

    def _robots_file(self, url: str) -> bytes | None:
        """The robots.txt at `url`; None where there is none."""
        try:
            line, _ = self._follow(url, None)
        except Failure as failure:
            if failure.http_status is not None and 400 <= failure.http_status < 500 and failure.http_status != 429:
                return None
            raise
        try:
            return line.response.read(ROBOTS_BYTES)
        finally:
            line.close()

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
        try:
            with budget(self.rules.deadline - record.spent, self.rules.max_bytes + HEADER_BYTES):
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
        if failure.reason == "timeout":
            self.hosts.slow(host, failure)
        elif failure.http_status is not None:
            self.hosts.finished(host)
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
        for family, kind, protocol, _, target in self._look_up(*(mapped or (host, port))):
            connection = Bounded(family, kind, protocol)
            try:
                self._check_address(target[0], mapped)
                connection.settimeout(min(self.rules.connect_timeout, seconds_left()))
                connection.connect(target)
                self._check_address(connection.getpeername()[0], mapped)
                return connection
            except (OSError, Failure) as error:
                connection.close()
                refusal = _connect_failure(error, self.rules)
        raise refusal

    def _look_up(self, host: str, port: int) -> list[tuple]:
        """Where a host is: asked once a run. The peer of each connection is checked, so a stale answer does no harm."""
        known = self._addresses.get((host, port))
        if known is None:
            wait = min(self.rules.connect_timeout, seconds_left())
            known = self._addresses[host, port] = _in_time(_resolve, host, port, wait)
        return known

    def _check_address(self, text: str, mapped: tuple[str, int] | None) -> None:
        address = ipaddress.ip_address(text.partition("%")[0])
        if mapped and address == ipaddress.ip_address(mapped[0]):
            return
        if not is_public(address) and not any(address in network for network in self._allow):
            raise Failure("private_address", f"{address}; list its network in allow_addresses if it is wanted")


class Answer:
    """An open response, as `urlopen` gives it, whose body is bounded in size and time."""

    def __init__(self, guard: Guard, line: Line, record: Record, host: str):
        self._guard, self._line, self._record, self._host = guard, line, record, host
        self.headers = line.response.headers

    def __enter__(self) -> "Answer":
        return self

    def __exit__(self, *_: object) -> None:
        self._line.close()

    def read(self) -> bytes:
        """The whole body, its Content-Encoding undone.

        Raises:
            Failure: too large before or after unpacking, too slow, or shorter than the server said.
        """
        with self._guard._watched(self._record, self._host):
            cap = self._guard.rules.max_bytes
            body = _unpacked(self._read(cap), self.headers.get("Content-Encoding"), cap)
            self._guard.hosts.finished(self._host)
            return body

    def _read(self, cap: int) -> bytes:
        response = self._line.response
        expected = response.length
        if expected is not None:
            if expected > cap:
                raise Failure("too_large", f"{expected} bytes; at most {cap} are taken")
            try:
                return response.read()
            except http.client.IncompleteRead:
                raise Failure("truncated", f"fewer than the {expected} bytes announced") from None
        chunks, size = [], 0
        while chunk := response.read1(1 << 16):
            chunks.append(chunk)
            size += len(chunk)
            if size > cap:
                raise Failure("too_large", f"more than the {cap} bytes that are taken")
        return b"".join(chunks)


def _unpacked(body: bytes, encoding: str | None, cap: int) -> bytes:
    """Undo the compression that a server applied unasked; what it grows to is capped like any body."""
    encoding = (encoding or "identity").strip().lower()
    if encoding == "identity" or not body:
        return body
    if encoding not in ENCODINGS:
        raise Failure("encoding", f"Content-Encoding '{encoding[:40]}', which was not asked for")
    unpacker = zlib.decompressobj(ENCODINGS[encoding])
    try:
        plain = unpacker.decompress(body, cap + 1)
    except zlib.error:
        raise Failure("encoding", f"a body that is no {encoding}") from None
    if len(plain) > cap:
        raise Failure("too_large", f"more than the {cap} bytes that are taken, unpacked")
    return plain


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


def host_of(url: str) -> str:
    """The host that a listed URL names, or nothing where it names none."""
    try:
        return _plain(urllib.parse.urlsplit(url.strip()).hostname or "")
    except ValueError:
        return ""


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


def _as_sent(place: str) -> str:
    """A Location header as it can be asked for: http.client hands on raw bytes as Latin-1."""
    place = place.partition("#")[0].strip()
    return urllib.parse.quote(place.encode("latin-1", "replace"), safe=SENT_AS_IS)


def _in_time(look_up: Any, host: str, port: int, seconds: float) -> list[tuple]:
    """`look_up(host, port)` with a limit: the system's resolver has its own, of half a minute for one name."""
    found: list = []

    def ask() -> None:
        try:
            found.append(look_up(host, port))
        except Exception as error:
            found.append(error)

    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    asker.join(seconds)
    answer = found[0] if found else Failure("dns", f"no answer about the name in {seconds:.0f} s")
    if isinstance(answer, Exception):
        raise answer
    return answer


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
