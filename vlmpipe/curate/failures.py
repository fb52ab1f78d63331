"""Why a URL gave no image: one vocabulary for urllib, sockets, TLS, HTTP and img2dataset.

A reason is a snake_case name; whether a later run may try again depends on it alone.
"""

import email.utils
import http.client
import re
import ssl
import time
from collections.abc import Mapping

# A later try may succeed. Every other reason is final: the row is refused and never asked for again.
RETRIABLE = {
    "dns", "connection_refused", "unreachable", "connect_timeout", "timeout", "reset", "truncated", "tls_error",
    "protocol", "offline", "download_error", "unreadable", "changed", "http_408", "http_425", "http_429",
    "http_500", "http_502", "http_503", "http_504", "http_520", "http_522", "http_524", "http_529",
}
ASKS_TO_WAIT = {429, 503}
BUSY = "the server asks to wait"  # the same words however it came out, so that runs give equal bytes


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


def hopeless(reason: str, detail: str) -> Failure:
    """A Failure of a host that is given up."""
    failure = Failure(reason, detail, int(reason[5:]) if reason.startswith("http_") else None)
    failure.hopeless = True
    return failure


def explain(error: BaseException, deadline: float) -> Failure:
    """The Failure that an exception of urllib, http.client, ssl or socket stands for; `deadline`: its limit in s."""
    if isinstance(error, Failure):
        return error
    for kinds, reason, detail in _EXPLANATIONS:
        if isinstance(error, kinds):
            return Failure(reason, detail or str(error))
    if isinstance(error, TimeoutError):
        return Failure("timeout", f"no complete answer in {deadline:g} s")
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


def http_failure(status: int, headers: Mapping[str, str]) -> Failure:
    """What an answer that is no success stands for. Of a redirect: that it was one too many, or leads nowhere."""
    if 300 <= status < 400:
        return Failure("redirect", "too many redirects, or to nowhere", status)
    wait = retry_after(headers.get("Retry-After")) if status in ASKS_TO_WAIT else None
    detail = BUSY if status in ASKS_TO_WAIT else http.client.responses.get(status, "")
    return Failure(f"http_{status}", detail, status, wait)


def retry_after(text: str | None) -> float | None:
    """Seconds of a Retry-After header, given as seconds or as a date (RFC 9110, 10.2.3)."""
    if text is None:
        return None
    if text.strip().isdigit():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None
