"""A small web on loopback whose paths misbehave on demand, counting every request."""

import io
import socket
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (40, 30), kind: str = "JPEG") -> bytes:
    """An encoded image whose pixels depend on `seed`."""
    pixels = np.random.default_rng(seed).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size, Image.BILINEAR).save(buffer, kind)
    return buffer.getvalue()


class FaultyWeb(ThreadingHTTPServer):
    """`/ok/<n>.jpg`, `/status/<code>`, `/slow`, `/endless`, … ; `hits` counts requests by path."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.hits: Counter = Counter()
        self.times: dict[str, list[float]] = {}
        self.files: dict[str, bytes] = {}
        self.peers: dict[tuple, list[str]] = {}  # connection -> paths of `/kept/`
        self.pause = 0.0
        self.lock = threading.Lock()

    @property
    def port(self) -> int:
        return self.server_address[1]

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def handle_error(self, request, address):
        """Clients that hang up on purpose are what this server is for."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        with self.server.lock:
            self.server.hits[self.path] += 1
            self.server.times.setdefault(self.path, []).append(time.monotonic())
            count = self.server.hits[self.path]
        kind, _, rest = self.path.lstrip("/").partition("/")
        getattr(self, f"give_{kind}", self.give_files)(rest, count)

    def send(self, code=200, body=b"", headers=(), length=None):
        self.send_response(code)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def give_files(self, rest, count):
        body = self.server.files.get(self.path)
        self.send(200, body) if body is not None else self.send(404)

    def give_ok(self, rest, count):
        time.sleep(self.server.pause)
        self.send(200, picture(int(rest.partition(".")[0])))

    def give_status(self, rest, count):
        self.send(int(rest.partition("/")[0]))

    def give_once(self, rest, count):
        """`/once/<code>/<wait>/…`: that status with Retry-After the first time, an image later."""
        code, wait, *_ = rest.split("/")
        if count == 1:
            self.send(int(code), headers=[("Retry-After", wait)])
        else:
            self.send(200, picture(1))

    def give_wait(self, rest, count):
        self.send(429, headers=[("Retry-After", rest.partition("/")[0])])

    def give_to(self, rest, count):
        self.send(302, headers=[("Location", rest.replace("!", "://", 1))])

    def give_loop(self, rest, count):
        self.send(302, headers=[("Location", self.path + "x")])

    def give_robots(self, rest, count):
        self.send(200, picture(2), headers=[("X-Robots-Tag", unquote(rest))])

    def give_packed(self, rest, count):
        """`/packed/<encoding>/…`: the body of `files` behind it, said to be encoded so."""
        self.send(200, self.server.files[self.path], headers=[("Content-Encoding", rest.partition("/")[0])])

    def give_reserved(self, rest, count):
        self.send(200, picture(2), headers=[("TDM-Reservation", rest.partition("/")[0])])

    def give_agent(self, rest, count):
        self.send(200, self.headers["User-Agent"].encode())

    def give_many(self, rest, count):
        """`/many/<headers>/<bytes of each>`"""
        number, size = map(int, rest.split("/"))
        self.send(200, picture(1), headers=[(f"X-{i}", "a" * size) for i in range(number)])

    def give_kept(self, rest, count):
        """On a connection that stays open, but for `/kept/drop/…`, which says so and closes it."""
        body = picture(int(rest.rpartition("/")[2].partition(".")[0]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.server.peers.setdefault(self.client_address, []).append(self.path)
        self.close_connection = rest.startswith("drop")

    def give_endless(self, rest, count):
        self.send_response(200)
        self.end_headers()
        self._drip(b"x" * 50)

    def give_headers(self, rest, count):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-A: ")
        self._drip(b"a")

    def _drip(self, piece):
        try:
            while True:
                self.wfile.write(piece)
                time.sleep(0.02)
        except OSError:
            self.close_connection = True

    def give_flood(self, rest, count):
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x" * 65536)
        except OSError:
            self.close_connection = True

    def give_large(self, rest, count):
        self.send(200, b"", length=int(rest))

    def give_short(self, rest, count):
        body = picture(3)
        self.send(200, body[: len(body) // 2], length=len(body))

    def give_reset(self, rest, count):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_):
        pass


@contextmanager
def faulty_web():
    """Run a FaultyWeb for the length of the block."""
    server = FaultyWeb()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
