"""Hostile bytes are decoded in a process of its own, so that a decoder's crash costs one image.

`Decoder` talks to a child process that runs `serve`; what the child does with the bytes is its caller's.
"""

import fcntl
import json
import os
import queue
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmpipe.images import MAX_PIXELS

MEMORY = 3 << 30  # bytes of address space that one decode may add
LENGTHS = struct.Struct(">QQ")
PIPE_BYTES = 1 << 20  # one picture passes without either side waiting for the other


ResizeMode = Literal["keep_ratio_largest", "keep_ratio", "center_crop", "border", "no"]


@dataclass(frozen=True)
class Wanted:
    """What is stored. `resize_mode` as in img2dataset; nothing is enlarged. `reduced`: jpegs are decoded reduced."""

    image_size: int = 384
    resize_mode: ResizeMode = "keep_ratio_largest"
    jpeg_quality: int = 95
    min_size: int = 0
    max_aspect_ratio: float | None = None
    max_pixels: int = MAX_PIXELS
    reduced: bool = True


@dataclass(frozen=True)
class Decoded:
    """A stored jpeg with its size and the size it came in, or the error in their place."""

    image: bytes | None = None
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    error: str | None = None


# --- the child process -------------------------------------------------------------------------------------

def serve(convert: Callable[[bytes], Decoded]) -> None:
    """Answer requests on standard input until it closes. Nothing else reaches the answers' channel."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent closes our input
    with os.fdopen(os.dup(0), "rb") as requests, os.fdopen(os.dup(1), "wb") as answers:
        silence = os.open(os.devnull, os.O_RDWR)
        os.dup2(silence, 0)
        os.dup2(silence, 1)
        answers.write(LENGTHS.pack(0, 0))  # ready
        answers.flush()
        os.dup2(silence, 2)
        _bound_memory()
        while header := requests.read(LENGTHS.size):
            decoded = convert(requests.read(LENGTHS.unpack(header)[0]))
            facts = {key: value for key, value in decoded.__dict__.items() if key != "image"}
            head, body = json.dumps(facts).encode(), decoded.image or b""
            answers.write(LENGTHS.pack(len(head), len(body)) + head + body)
            answers.flush()


def _bound_memory() -> None:
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))


class Decoder:
    """Decodes in a child process. A child that dies or hangs costs its image, and is replaced."""

    def __init__(self, command: Sequence[str], timeout: float, start_timeout: float = 120.0):
        self.command, self.timeout, self.start_timeout = list(command), timeout, start_timeout
        self._child: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the child without waiting for it: it imports while the first images download."""
        here = str(Path(__file__).resolve().parents[2])
        paths = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": paths, "NO_ALBUMENTATIONS_UPDATE": "1", "OMP_NUM_THREADS": "1"}
        self._ready = False
        self._child = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment
        )
        if sys.platform == "linux":
            for pipe in (self._child.stdin, self._child.stdout):
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def decode(self, data: bytes) -> Decoded:
        """Decode one file. A crash is tried once more in a fresh child, in case the child was killed from outside."""
        for _ in range(2):
            try:
                return self._ask(data)
            except EOFError:
                self.close()
            except TimeoutError:
                self.close()
                return Decoded(error=f"decoder_timeout: no result in {self.timeout:g} s")
        return Decoded(error="decoder_crash: the decoder's process died of it, twice")

    def _ask(self, data: bytes) -> Decoded:
        if self._child is None:
            self.start()
        if not self._ready:
            self._wait_ready()
        try:
            pipe = self._child.stdin
            for part in (LENGTHS.pack(len(data), 0), data):
                view = memoryview(part)
                while view:
                    view = view[pipe.write(view):]
        except BrokenPipeError:
            raise EOFError from None
        head, body = LENGTHS.unpack(self._read(LENGTHS.size, time.monotonic() + self.timeout))
        facts = json.loads(self._read(head, time.monotonic() + self.timeout))
        return Decoded(image=self._read(body, time.monotonic() + self.timeout) or None, **facts)

    def _wait_ready(self) -> None:
        try:
            self._read(LENGTHS.size, time.monotonic() + self.start_timeout)
        except (EOFError, TimeoutError):
            code = self._child.poll()
            self.close()
            raise RuntimeError(f"the image decoder did not start (exit {code}); its reason stands above") from None
        self._ready = True

    def _read(self, count: int, deadline: float) -> bytes:
        chunks = []
        while count:
            ready, _, _ = select.select([self._child.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            chunk = os.read(self._child.stdout.fileno(), min(count, 1 << 20))
            if not chunk:
                raise EOFError
            chunks.append(chunk)
            count -= len(chunk)
        return b"".join(chunks)

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.stdin.close()
            self._child.stdout.close()
            self._child.wait()
            self._child = None


class DecoderPool:
    """Several decoders; as many threads as there are may ask at once, further ones wait for their turn."""

    def __init__(self, command: Sequence[str], timeout: float, size: int):
        self.size = size
        self._free: queue.LifoQueue[Decoder] = queue.LifoQueue()
        for _ in range(size):
            decoder = Decoder(command, timeout)
            decoder.start()
            self._free.put(decoder)

    def decode(self, data: bytes) -> Decoded:
        decoder = self._free.get()
        try:
            return decoder.decode(data)
        finally:
            self._free.put(decoder)

    def close(self) -> None:
        while not self._free.empty():
            self._free.get().close()
