"""From untrusted bytes to an upright RGB picture: the one decoder behind every stage that looks at pixels.

Colours come out as a person sees them: turned as EXIF says, CMYK and Lab through their profiles, transparency on
white, 16 bits scaled to 8. What can't be decoded says why in the words that a rejected row carries.
"""

import functools
import io
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from vlmpipe.errors import UserError

MAX_PIXELS = 89_478_485  # where Pillow itself begins to warn
# What the web serves as pictures. Pillow's other readers (EPS starts Ghostscript, PDF, ...) are attack surface.
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "AVIF", "PPM", "ICO", "JPEG2000")
SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")
# What a file says about its pixels beside the pixels, by Pillow's names.
REMARKS = frozenset({"icc_profile", "exif", "transparency", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"})
ORIENTATION = 0x0112
TURNS = {  # EXIF 2.3, table of tag 0x0112: what makes it upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class NotAnImage(ValueError):
    """The bytes can't be decoded. `reason` is the snake_case name that a rejected row carries."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def decode_rgb(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the first frame of an image file to 8-bit RGB, as `to_rgb` does.

    Raises:
        NotAnImage: as `opened` says.
    """
    with opened(data, max_pixels) as image:
        return to_rgb(image)


@contextmanager
def opened(data: bytes, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """The picture with its header read and its pixels not decoded yet; decode it inside the block.

    Raises:
        NotAnImage: not a picture (`not_an_image`), more than `max_pixels` by its header, so never decoded
            (`decompression_bomb`), or damaged (`broken_image`).
    """
    try:
        with quiet(max_pixels):
            image = Image.open(io.BytesIO(data), formats=_readable())
            if image.width * image.height > max_pixels:
                raise NotAnImage("decompression_bomb", f"{image.width}x{image.height}; at most {max_pixels} pixels")
            yield image
    except NotAnImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        detail = f"the header asks for more than {max_pixels} pixels"
        raise NotAnImage("decompression_bomb", detail) from None
    except Image.UnidentifiedImageError:
        raise _unidentified(data) from None
    except MemoryError:
        raise NotAnImage("broken_image", "decoding it takes too much memory") from None
    # Pillow's plugins raise nearly every built-in exception on hostile bytes (struct.error, KeyError, ...).
    except Exception as error:
        detail = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise NotAnImage("broken_image", detail) from None


@dataclass
class _Quiet:
    """How many threads decode now: the first one's arrival and the last one's leaving change Pillow's settings."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    inside: int = 0
    undo: ExitStack = field(default_factory=ExitStack)


_QUIET = _Quiet()


@contextmanager
def quiet(max_pixels: int = MAX_PIXELS) -> Iterator[None]:
    """Have Pillow refuse what is larger, in frames and embedded files too, and say nothing of odd metadata.

    Those settings are the process's, so threads share them, and one limit: held around many decodes it also saves each
    of them the change.
    """
    with _QUIET.lock:
        if not _QUIET.inside:
            _QUIET.undo.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
            _QUIET.undo.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
        _QUIET.inside += 1
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        yield
    finally:
        with _QUIET.lock:
            _QUIET.inside -= 1
            if not _QUIET.inside:
                _QUIET.undo.close()


@functools.cache
def _readable() -> list[str]:
    """The wanted formats that this build of Pillow reads."""
    Image.init()
    return [kind for kind in FORMATS if kind in Image.OPEN]


def _unidentified(data: bytes) -> NotAnImage:
    if data.startswith(SIGNATURES):
        return NotAnImage("broken_image", "an image's signature before a damaged header")
    if not data:
        return NotAnImage("not_an_image", "an empty body")
    if data[:256].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return NotAnImage("not_an_image", "an html page")
    return NotAnImage("not_an_image", "bytes of no known image format")


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


# --- colours -----------------------------------------------------------------------------------------------

def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any Pillow mode as a person sees it: upright, 8-bit RGB, on white. Twice is the same as once."""
    image.load()  # also finds remarks that stand behind the pixels; TIFF turns itself here
    if image.mode == "RGB" and not image.info.keys() & REMARKS:
        return image
    turn = TURNS.get(orientation(image))
    seen = _through_profile(_on_white(_eight_bits(image)))
    if turn is not None:
        seen = seen.transpose(turn)
    seen = seen.copy() if seen is image else seen
    seen.info = {}
    return seen


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where it says none."""
    try:
        value = image.getexif().get(ORIENTATION)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1
    return value if value in TURNS else 1


def is_plain(image: Image.Image) -> bool:
    """Whether the file's own pixels are what `to_rgb` gives: nothing to turn, to convert or to lay on white."""
    return (image.mode == "RGB" and orientation(image) == 1 and "transparency" not in image.info
            and _open_profile(image.info.get("icc_profile")) is None)


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
    rgba = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    flat.info["icc_profile"] = image.info.get("icc_profile")
    return flat


def _through_profile(image: Image.Image) -> Image.Image:
    """Convert to sRGB by the embedded profile, where there is one that fits; plainly otherwise."""
    image = image.convert("RGB") if image.mode in ("P", "RGBX") else image  # the profile is of the palette's colours
    if image.mode == "LAB":
        source: ImageCms.ImageCmsProfile | None = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    elif image.mode in ("RGB", "CMYK"):
        source = _open_profile(image.info.get("icc_profile"))
    else:
        source = None
    if source is not None:
        try:
            return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError):
            return _plain_rgb(image)  # a profile of another colour space, or a damaged one
    return _plain_rgb(image)


def _open_profile(profile: bytes | None) -> ImageCms.ImageCmsProfile | None:
    """None: there is no usable one, or nothing to convert."""
    if not profile:
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        described = ImageCms.getProfileDescription(source)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    return None if "sRGB" in described else source


def _plain_rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")
