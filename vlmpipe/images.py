"""From untrusted bytes to an upright RGB picture: the one decoder behind every stage that looks at pixels."""

import functools
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vlmpipe.errors import UserError

MAX_PIXELS = 64_000_000
# What the web serves as pictures. Pillow's other readers (EPS starts Ghostscript, PDF, ...) are attack surface.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "AVIF", "PPM", "ICO", "JPEG2000")


class NotAnImage(ValueError):
    """The bytes can't be decoded. `reason` is the snake_case name that a rejected row carries."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def decode_rgb(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode to RGB: EXIF orientation applied, alpha over white, 16-bit scaled, CMYK converted, first frame.

    Raises:
        NotAnImage: not a picture (`not_an_image`), more than `max_pixels` by its header, so never decoded
            (`decompression_bomb`), or damaged (`broken_image`).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd metadata; what can't be used raises
        try:
            image = Image.open(io.BytesIO(data), formats=_readable())
        except Image.DecompressionBombError as error:
            raise NotAnImage("decompression_bomb", str(error)) from None
        except Exception as error:
            raise NotAnImage("not_an_image", _line(error)) from None
        if image.width * image.height > max_pixels:
            raise NotAnImage("decompression_bomb", f"{image.width}x{image.height} is over {max_pixels} pixels")
        try:
            return to_rgb(ImageOps.exif_transpose(image))
        # Pillow's plugins raise nearly every built-in exception on hostile bytes (struct.error, KeyError, ...).
        except Exception as error:
            raise NotAnImage("broken_image", _line(error)) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB without the surprises of `convert`: 16-bit is scaled, alpha goes over white."""
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image, dtype=np.float32)
        return Image.fromarray((np.clip(values, 0, 65535) / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    rgb = image.convert("RGB")
    rgb.load()
    return rgb


def open_image(path: Path) -> Image.Image:
    """Read a picture that the user named.

    Raises:
        UserError: the file is missing or isn't a picture.
    """
    try:
        return decode_rgb(Path(path).read_bytes())
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"found no file {path}; expected a picture; check the path") from None
    except NotAnImage as error:
        raise UserError(f"{path}: {error}; expected a picture such as jpeg, png or webp") from None


@functools.cache
def _readable() -> list[str]:
    """The wanted formats that this build of Pillow reads."""
    Image.init()
    return [kind for kind in FORMATS if kind in Image.OPEN]


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
