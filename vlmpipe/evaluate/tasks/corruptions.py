"""Pictures made worse as ImageNet-C makes them (arXiv 1903.12261), or smaller.

Severities 1 to 5 are those of its published code for pictures of 224 pixels. Blur is a share of the picture here, so
that small ones stay as legible as large ones; the rest doesn't depend on the size, or, as JPEG, belongs to the pixels.

Shapes: Y and X pixels; colours are 0 to 1.
"""

import io
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vlmpipe.config import nearest
from vlmpipe.errors import UserError

SIDE = 224  # of ImageNet-C's pictures
SMALLEST = 8  # pixels of a side that are left at a low resolution
SEVERITIES = {
    "noise": (0.08, 0.12, 0.18, 0.26, 0.38),  # deviation of Gaussian noise
    "blur": (1, 2, 3, 4, 6),  # deviation of a Gaussian in pixels of 224
    "jpeg": (25, 18, 15, 10, 7),  # quality
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),  # added to the value of HSV
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),  # left of the distance from the mean
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),  # left of the sides
}


@dataclass(frozen=True)
class RobustnessConfig:
    """Under what a task is asked again: each corruption at each severity (1 to 5), and each resolution, a share of the
    picture's sides."""

    corruptions: tuple[str, ...] = tuple(SEVERITIES)
    severities: tuple[int, ...] = (3,)
    resolutions: tuple[float, ...] = (0.5, 0.25)

    def __post_init__(self) -> None:
        for name in self.corruptions:
            if name not in SEVERITIES:
                known = ", ".join(SEVERITIES)
                raise UserError(f"corruptions: found '{name}'{nearest(name, SEVERITIES)}; expected some of {known}")
        if not all(1 <= severity <= 5 for severity in self.severities):
            raise UserError(f"severities: found {list(self.severities)}; expected numbers from 1 to 5")
        if not all(0 < share < 1 for share in self.resolutions):
            raise UserError(f"resolutions: found {list(self.resolutions)}; expected shares between 0 and 1")
        if not self.conditions:
            raise UserError("robustness: found no corruption and no resolution; expected at least one")

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names such as noise_3 and resolution_0.5."""
        worse = [f"{name}_{severity}" for name in self.corruptions for severity in self.severities]
        return *worse, *(f"resolution_{share:g}" for share in self.resolutions)


def worsen(picture: Image.Image, condition: str, key: str) -> Image.Image:
    """The picture under a condition of `RobustnessConfig.conditions`, RGB; `key` alone decides what noise it gets."""
    name, _, amount = condition.rpartition("_")
    if name == "resolution":
        return smaller(picture, float(amount))
    rng = np.random.default_rng(zlib.crc32(f"{condition} {key}".encode()))
    return CORRUPTIONS[name](picture, SEVERITIES[name][int(amount) - 1], rng)


def smaller(picture: Image.Image, share: float) -> Image.Image:
    size = tuple(max(SMALLEST, round(side * share)) for side in picture.size)
    return picture.resize(size, Image.Resampling.BICUBIC)


# --- corruptions: picture, amount, chance ------------------------------------------------------------------

def noise(picture: Image.Image, deviation: float, rng: np.random.Generator) -> Image.Image:
    pixels_YX3 = _colours(picture)
    return _picture(pixels_YX3 + rng.normal(0, deviation, pixels_YX3.shape))


def blur(picture: Image.Image, deviation: float, rng: np.random.Generator) -> Image.Image:
    """By the Gaussian itself: Pillow's three boxes do nothing below half a pixel. Edges go on as they are."""
    deviation *= min(picture.size) / SIDE
    reach = math.ceil(4 * deviation)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    pixels_YX3 = _colours(picture)
    for _ in range(2):  # down, then across
        wide = np.pad(pixels_YX3, ((reach, reach), (0, 0), (0, 0)), "edge")
        shifted = (weight * wide[at : at + len(pixels_YX3)] for at, weight in enumerate(weights / weights.sum()))
        pixels_YX3 = sum(shifted).swapaxes(0, 1)
    return _picture(pixels_YX3)


def jpeg(picture: Image.Image, quality: int, rng: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def brightness(picture: Image.Image, more: float, rng: np.random.Generator) -> Image.Image:
    """Hue and saturation stay: all colours of a pixel grow by the same factor, and black becomes grey."""
    pixels_YX3 = _colours(picture)
    value_YX1 = pixels_YX3.max(axis=2, keepdims=True)
    brighter_YX1 = np.minimum(value_YX1 + more, 1)
    black = value_YX1 == 0
    return _picture(np.where(black, brighter_YX1, pixels_YX3 * brighter_YX1 / np.where(black, 1, value_YX1)))


def contrast(picture: Image.Image, left: float, rng: np.random.Generator) -> Image.Image:
    pixels_YX3 = _colours(picture)
    mean_3 = pixels_YX3.mean(axis=(0, 1))
    return _picture((pixels_YX3 - mean_3) * left + mean_3)


def pixelate(picture: Image.Image, left: float, rng: np.random.Generator) -> Image.Image:
    few = tuple(max(1, int(side * left)) for side in picture.size)
    return picture.resize(few, Image.Resampling.BOX).resize(picture.size, Image.Resampling.BOX)


CORRUPTIONS: dict[str, Callable[[Image.Image, float, np.random.Generator], Image.Image]] = {
    "noise": noise, "blur": blur, "jpeg": jpeg, "brightness": brightness, "contrast": contrast, "pixelate": pixelate,
}


def _colours(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"), np.float64) / 255


def _picture(pixels_YX3: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(np.clip(pixels_YX3, 0, 1) * 255).astype(np.uint8))
