"""A loopback HTTP server of photograph-like JPEGs, in a process of its own, for benchmarks/download.py.

    python benchmarks/picture_server.py        prints its port, then serves /<n>.jpg until its input closes

The pictures have the 1/f spectrum of photographs (Field 1987), so they take as many bytes and as long to decode as
photographs do: 640x480 at quality 88 is about 120 kB; COCO's training pictures have 155 kB on average. The server
keeps connections open where the client does, and answers from memory.
"""

import asyncio
import functools
import sys
import threading
import time

import cv2
import numpy as np

DISTINCT = 120
SIZES = ((640, 480), (640, 427), (480, 640), (500, 375), (640, 480), (800, 600))  # width, height; of web photographs
QUALITY = 88


def picture(seed: int) -> bytes:
    """A JPEG with the spectrum of a photograph, colours correlated as in one."""
    width, height = SIZES[seed % len(SIZES)]
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / max(width, height)) ** random.uniform(1.1, 1.4)
    planes = []
    for _ in range(3):
        plane = np.fft.irfft2(amplitude * np.exp(2j * np.pi * random.random(amplitude.shape)), (height, width))
        planes.append(plane / plane.std())
    shades = [planes[0], 0.85 * planes[0] + 0.5 * planes[1], 0.85 * planes[0] + 0.5 * planes[2]]
    pixels = np.clip(128 + 48 * np.stack(shades, -1), 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()


class Connection(asyncio.Protocol):
    """Answers `GET /<n>.jpg`; `/since` tells the time of the first picture asked for since it was last asked."""

    first: float | None = None

    def __init__(self, bodies: list[bytes]):
        self.bodies, self.received = bodies, b""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        if b"\r\n\r\n" not in self.received:
            return
        request, self.received = self.received.lower(), b""
        path = request.split(b" ", 2)[1]
        if path == b"/since":
            body, Connection.first = str(Connection.first).encode(), None
        else:
            Connection.first = Connection.first or time.time()
            body = self.bodies[int(path[1:].partition(b".")[0]) % len(self.bodies)]
        close = b"\r\nconnection: close" in request
        head = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n%s\r\n" % (
            len(body), b"Connection: close\r\n" if close else b"")
        self.transport.writelines([head, body])
        if close:
            self.transport.close()


async def _serve(bodies: list[bytes]) -> None:
    server = await asyncio.get_running_loop().create_server(
        functools.partial(Connection, bodies), "0.0.0.0" if sys.platform == "linux" else "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    threading.Thread(target=lambda: (sys.stdin.read(), loop.call_soon_threadsafe(ended.set)), daemon=True).start()
    await ended.wait()


if __name__ == "__main__":
    asyncio.run(_serve([picture(seed) for seed in range(DISTINCT)]))
