"""Hostile bytes in, plain RGB out; in a process of its own, so that a decoder's crash costs one image.

`to_rgb` opens every format and colour mode with Pillow, checks the size in the header before it decodes, and gives
colours as a person sees them: turned as EXIF says, CMYK and Lab through their profiles, transparency on white,
16 bits scaled to 8. `Decoder` talks to a child process that runs `serve`.
"""

import functools
import io
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from vlmpipe.images import FORMATS

MEMORY = 3 << 30  # bytes of address space that one decode may add
SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")
LENGTHS = struct.Struct(">QQ")


class Unusable(Exception):
    """The bytes are no usable image; the text is `reason: detail`."""


@dataclass(frozen=True)
class Decoded:
    """A stored jpeg with its size and the size it came in, or the error in their place."""

    image: bytes | None = None
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    error: str | None = None


# --- colours -----------------------------------------------------------------------------------------------

def to_rgb(data: bytes, max_pixels: int) -> Image.Image:
    """Decode the first frame of an image file to 8-bit RGB.

    Raises:
        Unusable: not_an_image, decompression_bomb (by the header, nothing is decoded) or broken_image.
    """
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=_formats())
            width, height = image.size
            if width * height > max_pixels:
                raise Unusable(f"decompression_bomb: {width}x{height} pixels; at most {max_pixels} are decoded")
            image.load()
            return _as_seen(image)
    except Unusable:
        raise
    except Image.DecompressionBombError:
        raise Unusable(f"decompression_bomb: the header asks for more than {max_pixels} pixels") from None
    except Image.UnidentifiedImageError:
        raise Unusable(_looks_like(data)) from None
    except MemoryError:
        raise Unusable("broken_image: decoding it takes too much memory") from None
    except Exception as error:  # decoders of hostile bytes raise every type there is
        raise Unusable(f"broken_image: {type(error).__name__}: {str(error)[:200]}") from None


@functools.cache
def _formats() -> list[str]:
    """What the web serves and this Pillow reads; never the readers that start programs (EPS) or parse documents."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _looks_like(data: bytes) -> str:
    if data.startswith(SIGNATURES):
        return "broken_image: an image's signature before a damaged header"
    if not data:
        return "not_an_image: an empty body"
    if data[:256].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "not_an_image: an html page"
    return "not_an_image: bytes of no known image format"


def _as_seen(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    image = _on_white(_eight_bits(image))
    image = _through_profile(image)
    return ImageOps.exif_transpose(_with_orientation(image, orientation)) if orientation > 1 else image


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _with_orientation(image: Image.Image, orientation: int) -> Image.Image:
    image = image.copy()
    image.getexif()[0x0112] = orientation
    return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale deep grey modes to 8 bits: by the file's own depth where it says one, else by the values."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    clear = image.info.get("transparency")
    low, high = _grey_range(image, values)
    shares = np.clip((values - low) / (high - low), 0, 1)
    scaled = Image.fromarray(np.rint(shares * 255).astype(np.uint8))
    if isinstance(clear, int):
        alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
        scaled = Image.merge("LA", (scaled, alpha))
    return scaled


def _grey_range(image: Image.Image, values: np.ndarray) -> tuple[float, float]:
    """The values that stand for black and for white."""
    low, top = float(values.min(initial=0.0)), float(values.max(initial=0.0))
    bits = image.tag_v2.get(258, (0,)) if hasattr(image, "tag_v2") else (0,)
    depth = bits[0] if isinstance(bits, tuple) else bits
    if low < 0:  # measurements, not shades
        return low, max(top, low + 1e-9)
    if image.mode != "F" and 8 < depth <= 16:
        return 0.0, 2.0**depth - 1
    if image.mode.startswith("I;16"):
        return 0.0, 65535.0
    return 0.0, next((full for full in (1.0, 255.0, 65535.0) if top <= full), top)


def _on_white(image: Image.Image) -> Image.Image:
    """Lay what is transparent on white."""
    if not (image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info):
        return image
    profile = image.info.get("icc_profile")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, rgba).convert("RGB")
    if profile and image.mode == "RGBA":
        flat.info["icc_profile"] = profile
    return flat


def _through_profile(image: Image.Image) -> Image.Image:
    """Convert to sRGB by the embedded profile, where there is one that fits; plainly otherwise."""
    profile = image.info.get("icc_profile")
    if image.mode == "LAB":
        source: ImageCms.ImageCmsProfile | None = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    elif profile and image.mode in ("RGB", "CMYK"):
        source = _open_profile(profile)
    else:
        source = None
    if source is not None:
        try:
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            return _plain_rgb(image)  # a profile of another colour space, or a damaged one
    return _plain_rgb(image)


def _open_profile(profile: bytes) -> ImageCms.ImageCmsProfile | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        described = ImageCms.getProfileDescription(source)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    return None if "sRGB" in described else source


def _plain_rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def to_ppm(image: Image.Image) -> bytes:
    """An RGB image as the simplest file that OpenCV reads, without loss."""
    return b"P6 %d %d 255\n" % image.size + image.tobytes()


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
