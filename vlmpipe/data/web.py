"""A small web on loopback: many host names, one port, with the faults of the real one.

It runs in a process of its own, so that serving takes nothing from the downloader's interpreter, and ends with the
process that started it. Pictures are made when the world is built; here they are only sent.

    with serve("scenes", Path("data/scenes/world/scenes")) as hosts:
        hosts["images.scenes.test"]     # ("127.0.0.1", 40123)
"""

import asyncio
import functools
import json
import mimetypes
import os
import socket
import subprocess
import sys
import threading
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vlmpipe import process
from vlmpipe.errors import UserError
from vlmpipe.shards import read_json, write_table

LOOPBACK = "127.0.0.1"
PAGES = "web"  # folder of a world, with a parquet file of pages a pool, or with
FOLDERS = "folders.json"  # host -> folder
REQUEST_BYTES = 1 << 15
IDLE_S = 30.0
DRIP_S = 0.1  # an endless body sends a few bytes this often
RETRY_AFTER_S = 1


@dataclass(frozen=True)
class Page:
    """What a URL answers.

    status: of every contact; `first_status` of the first one where it differs (429, 503: then it works). Both
    carry Retry-After where they ask to wait. location: of a redirect. robots: an X-Robots-Tag. delay: seconds
    before the answer. claimed: a false Content-Length, the connection closes after the body. endless: the body
    never ends. listens: false for a host where every connection is refused.
    """

    url: str
    body: bytes = b""
    status: int = 200
    first_status: int | None = None
    content_type: str = "image/jpeg"
    location: str | None = None
    robots: str | None = None
    delay: float = 0.0
    claimed: int | None = None
    endless: bool = False
    listens: bool = True


SCHEMA = pa.schema({
    "url": pa.string(), "body": pa.binary(), "status": pa.int32(), "first_status": pa.int32(),
    "content_type": pa.string(), "location": pa.string(), "robots": pa.string(), "delay": pa.float64(),
    "claimed": pa.int64(), "endless": pa.bool_(), "listens": pa.bool_(),
})


def write_pages(path: Path, pages: Iterable[Page]) -> None:
    """Write pages as one parquet file, for `serve("scenes", …)`."""
    write_table(path, pa.Table.from_pylist([asdict(page) for page in pages], SCHEMA))


@contextmanager
def serve(kind: str, path: Path, hosts: Sequence[str] = ()) -> Iterator[dict[str, tuple[str, int]]]:
    """Serve while the block runs; yield host -> (address, port).

    Args:
        kind: "scenes" for the pages of a built world in `path`; "folder" for files.
        hosts: for folders, `host` or `host=folder` entries; a folder is relative to `path`, which is the default.
            None: those that a world in `path` lists.

    Raises:
        UserError: there is nothing to serve at `path`, or a host entry names no folder.
    """
    _site(kind, path, hosts, check_only=True)
    child = process.start(
        [sys.executable, "-m", "vlmpipe.data.web", kind, str(Path(path).absolute()), *hosts],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (_root(), os.environ.get("PYTHONPATH"))))},
    )
    try:
        yield _announced(child)
    finally:
        process.stop(child)


def _root() -> str:
    return str(Path(__file__).parents[2])


def _announced(child: subprocess.Popen) -> dict[str, tuple[str, int]]:
    said = []
    for line in child.stdout:
        if line.startswith("{"):
            # What else it says are errors; unread they would fill the pipe and block it.
            threading.Thread(target=lambda: sys.stderr.writelines(child.stdout), daemon=True).start()
            return {host: (LOOPBACK, port) for host, port in json.loads(line).items()}
        said.append(line)
    raise RuntimeError(f"the loopback web ended at its start: {''.join(said).strip()}")


# --- what is at a URL --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Site:
    """`find` gives the page at (host, path and query); `listening` and `silent` are host names."""

    find: Callable[[str, str], Page | None]
    listening: tuple[str, ...]
    silent: tuple[str, ...] = ()


def _site(kind: str, path: Path, hosts: Sequence[str], check_only: bool = False) -> Site | None:
    if kind == "folder":
        return _folder_site(Path(path), hosts)
    if kind != "scenes":
        raise UserError(f"serve.kind: found '{kind}'; expected scenes or folder")
    files = sorted((Path(path) / PAGES).glob("*.parquet"))
    if not files:
        raise UserError(f"found no pages in {Path(path) / PAGES}; expected a built world; run the world stage")
    return None if check_only else _world_site(files)


def _world_site(files: Sequence[Path]) -> Site:
    pages: dict[tuple[str, str], Page] = {}
    for file in files:
        for row in pq.read_table(file).to_pylist():
            parts = urllib.parse.urlsplit(row["url"])
            pages[parts.hostname, parts.path] = Page(**row)
    listening = {host for (host, _), page in pages.items() if page.listens}
    silent = {host for host, _ in pages} - listening
    return Site(lambda host, path: pages.get((host, path)), tuple(sorted(listening)), tuple(sorted(silent)))


def _folder_site(path: Path, hosts: Sequence[str]) -> Site:
    listed = path / PAGES / FOLDERS
    if hosts or not listed.exists():
        entries = (entry.partition("=") for entry in hosts or ("localhost",))
        folders = {host: path / folder for host, _, folder in entries}
    else:
        folders = {host: Path(folder) for host, folder in read_json(listed).items()}
    roots = {host: folder.resolve() for host, folder in folders.items()}
    for host, folder in folders.items():
        if not folder.is_dir():
            raise UserError(f"serve: found no folder {folder} for host '{host}'; expected one to serve; "
                            f"set serve.path and serve.hosts")
    return Site(functools.partial(_file_page, roots), tuple(roots))


def _file_page(roots: dict[str, Path], host: str, path: str) -> Page | None:
    if host not in roots:
        return None
    name = urllib.parse.unquote(urllib.parse.urlsplit(path).path).lstrip("/")
    try:
        # Resolved first: neither `..` nor a link leads out of the folder.
        file = (roots[host] / name).resolve()
        if not file.is_relative_to(roots[host]) or not file.is_file():
            return None
        content_type = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        return Page(path, file.read_bytes(), content_type=content_type)
    except (OSError, ValueError):  # a name too long, with a null byte, or not readable
        return None


# --- the server --------------------------------------------------------------------------------------------

class Connection(asyncio.Protocol):
    """One request, one answer, then closed: what a downloader of single pictures asks for."""

    def __init__(self, site: Site, contacts: Counter):
        self.site, self.contacts = site, contacts
        self.received = b""
        self.answered = False

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.loop = asyncio.get_running_loop()
        self.idle = self.loop.call_later(IDLE_S, transport.abort)

    def connection_lost(self, error: Exception | None) -> None:
        self.idle.cancel()

    def data_received(self, data: bytes) -> None:
        self.received += data
        if self.answered or (b"\r\n\r\n" not in self.received and len(self.received) < REQUEST_BYTES):
            return
        self.answered = True
        self.idle.cancel()
        try:
            method, host, path = _parse_request(self.received)
        except ValueError:
            self._answer(Page("", b"", status=400), True)
            return
        page = self.site.find(host, path) if method in ("GET", "HEAD") else Page("", status=405)
        page = page or Page("", b"not found", status=404, content_type="text/plain")
        self.contacts[host, path] += 1
        first = self.contacts[host, path] == 1
        if page.delay:
            self.loop.call_later(page.delay, self._answer, page, method == "GET", first)
        else:
            self._answer(page, method == "GET", first)

    def _answer(self, page: Page, with_body: bool, first: bool = False) -> None:
        if self.transport.is_closing():
            return
        status = page.first_status if first and page.first_status else page.status
        body = page.body if status == page.status else b""
        self.transport.write(_head(page, status, len(body)) + (body if with_body else b""))
        if page.endless and with_body:
            self._drip()
        else:
            self.transport.close()

    def _drip(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(b"\0" * 16)
            self.loop.call_later(DRIP_S, self._drip)


def _parse_request(data: bytes) -> tuple[str, str, str]:
    """(method, host without port, path) of an HTTP/1 request; ValueError where it is none."""
    lines = data.split(b"\r\n\r\n", 1)[0].decode("latin-1").split("\r\n")
    method, path, version = lines[0].split(" ")
    headers = dict(line.lower().split(":", 1) for line in lines[1:])
    if not version.startswith("HTTP/1.") or "host" not in headers:
        raise ValueError(lines[0])
    return method, headers["host"].strip().partition(":")[0], path


def _head(page: Page, status: int, size: int) -> bytes:
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", "Connection: close"]
    lines.append(f"Content-Type: {page.content_type}")
    if not page.endless:
        claimed = size if page.claimed is None else page.claimed
        lines.append(f"Content-Length: {claimed}")
    if status in (429, 503):
        lines.append(f"Retry-After: {RETRY_AFTER_S}")
    lines += [f"Location: {page.location}"] if page.location else []
    lines += [f"X-Robots-Tag: {page.robots}"] if page.robots else []
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


async def _run(site: Site) -> None:
    contacts: Counter = Counter()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(site, contacts), LOOPBACK, 0, backlog=1024)
    port = server.sockets[0].getsockname()[1]
    # Bound and not listening: connections are refused, and nobody else can take the port.
    with socket.socket() as silent:
        silent.bind((LOOPBACK, 0))
        ports = dict.fromkeys(site.listening, port) | dict.fromkeys(site.silent, silent.getsockname()[1])
        print(json.dumps(ports), flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_run(_site(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])))
