"""What the pixels alone say: size, quality, hashes."""

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import cv2
import numpy as np
import pyarrow as pa

from vlmpipe.curate.annotators.base import Annotator, Batch, Tools, floats, shrink
from vlmpipe.curate.duplicates import THUMBNAIL, look
from vlmpipe.errors import UserError

DIGEST = 16  # bytes of a sha256 that tell pictures apart
COLOUR_SIDE = 128  # longest side at which colours are counted
LEVELS = 16  # coarse steps of each colour channel


class Geometry(Annotator):
    """Size as stored; aspect is long side by short side, at least 1."""

    fields: ClassVar = [pa.field("width", pa.int32()), pa.field("height", pa.int32()), floats("aspect")]

    def __call__(self, batch: Batch) -> list[pa.Array]:
        sizes_N2 = np.array([image.size for image in batch.images], np.int32)
        aspect_N = sizes_N2.max(axis=1) / sizes_N2.min(axis=1)
        return [pa.array(sizes_N2[:, 0]), pa.array(sizes_N2[:, 1]), pa.array(aspect_N, pa.float32())]


class Quality(Annotator):
    """Sharpness, exposure, content: all at a fixed size, so that thresholds hold for pictures of any size.

    `sharpness`: variance of the Laplacian (4-neighbour kernel) of the luma at longest side 256 (Pech-Pacheco et al.,
    "Diatom autofocusing in brightfield microscopy", 2000). `brightness`, `contrast`: mean and standard deviation of
    that luma, 0 to 1. `entropy`: of its 256-bin histogram, in bits, 0 to 8. `uniform`: share of the pixels within
    `tolerance` grey levels, in each channel, of the most common of 4,096 coarse colours: 1 for a blank picture.
    `border`: share of the area in frames of one colour: lines from the edge inwards within `tolerance` of the edge's.
    """

    @dataclass(frozen=True)
    class Config:
        tolerance: int = 16

        def __post_init__(self):
            if not 0 <= self.tolerance <= 255:
                raise UserError(f"found tolerance {self.tolerance}; expected 0 to 255 grey levels")

    fields: ClassVar = [
        floats(name) for name in ("sharpness", "brightness", "contrast", "entropy", "uniform", "border")
    ]

    def __call__(self, batch: Batch) -> list[pa.Array]:
        rows = []
        for array, luma in zip(batch.arrays, batch.lumas):
            colours = shrink(array, COLOUR_SIDE)
            tolerance = self.config.tolerance
            rows.append((*light(luma), uniform_share(colours, tolerance), border_share(colours, tolerance)))
        return [pa.array(column, pa.float32()) for column in zip(*rows)]


def light(luma: np.ndarray) -> tuple[float, float, float, float]:
    """(sharpness, brightness, contrast, entropy) of a luma picture, uint8 [Y, X]."""
    _, deviation = cv2.meanStdDev(cv2.Laplacian(luma, cv2.CV_16S))
    counts = np.bincount(luma.reshape(-1), minlength=256)
    share = counts / luma.size
    level = np.arange(256) / 255
    brightness = float(share @ level)
    contrast = float(np.sqrt(share @ (level - brightness) ** 2))
    seen = share[share > 0]
    return float(deviation[0, 0]) ** 2, brightness, contrast, max(0.0, float(-(seen * np.log2(seen)).sum()))


def uniform_share(colours: np.ndarray, tolerance: int) -> float:
    """Share of pixels near the most common coarse colour of a picture, uint8 [Y, X, 3].

    Near its mean, not in its bin: a flat area whose colour lies on the edge of two bins is still one.
    """
    pixels = colours.reshape(-1, 3)
    coarse = (pixels // (256 // LEVELS)).astype(np.int32) @ np.array([LEVELS * LEVELS, LEVELS, 1], np.int32)
    common = pixels[coarse == np.bincount(coarse).argmax()].mean(axis=0)
    low, high = np.ceil(common - tolerance).clip(0, 255), np.floor(common + tolerance).clip(0, 255)
    near = cv2.inRange(colours, tuple(low.tolist()), tuple(high.tolist()))
    return cv2.countNonZero(near) / len(pixels)


def border_share(colours: np.ndarray, tolerance: int) -> float:
    """Share of the area in frames of one colour around a picture, uint8 [Y, X, 3]."""
    height, width = colours.shape[:2]
    top, bottom = _frame(colours, tolerance), _frame(colours[::-1], tolerance)
    if top == height:
        return 1.0
    inner = colours[top : height - bottom].transpose(1, 0, 2)
    left, right = _frame(inner, tolerance), _frame(inner[::-1], tolerance)
    return 1 - (height - top - bottom) * (width - left - right) / (height * width)


def _frame(lines: np.ndarray, tolerance: int) -> int:
    """How many first lines of [L, P, 3] are all within `tolerance` of the first line's mean colour."""
    colour = lines[0].mean(axis=0)
    low, high = lines.min(axis=1), lines.max(axis=1)
    same = ((low >= colour - tolerance) & (high <= colour + tolerance)).all(axis=1)
    return len(lines) if same.all() else int(same.argmin())


class Hashes(Annotator):
    """`phash` and `thumbnail`: see `duplicates.look`. `pixel_hash`: sha256 of size and RGB pixels, first 128 bits.

    Equal pixel hashes are equal pictures, whatever file they came in; `pixels: false` leaves them out.
    """

    @dataclass(frozen=True)
    class Config:
        pixels: bool = True

    def __init__(self, config: Config, tools: Tools):
        super().__init__(config, tools)
        self.fields = [pa.field("phash", pa.uint64()), pa.field("thumbnail", pa.binary(THUMBNAIL))]
        self.fields += [pa.field("pixel_hash", pa.binary(DIGEST))] if config.pixels else []

    def __call__(self, batch: Batch) -> list[pa.Array]:
        looks = look(batch.images)
        thumbnails = [row.tobytes() for row in looks.thumbnails]
        found = [pa.array(looks.hashes), pa.array(thumbnails, pa.binary(THUMBNAIL))]
        if self.config.pixels:
            found.append(pa.array([pixel_hash(array) for array in batch.arrays], pa.binary(DIGEST)))
        return found


def pixel_hash(array: np.ndarray) -> bytes:
    """Of uint8 [Y, X, 3]; the size is in it, as a 2x8 and a 4x4 picture can have the same bytes."""
    digest = hashlib.sha256(b"%d %d " % array.shape[:2])
    digest.update(np.ascontiguousarray(array))
    return digest.digest()[:DIGEST]
