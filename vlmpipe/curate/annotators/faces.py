"""Faces counted, and blurred on request; nobody is recognised."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
from PIL import ImageFilter

from vlmpipe.curate.annotators.base import Annotator, Batch, Tools, floats, several
from vlmpipe.errors import UserError
from vlmpipe.images import decode_rgb

BOXES = several(several(pa.int32(), 4))  # left, top, right, bottom in pixels as stored
CASCADE = "haarcascade_frontalface_alt2.xml"
JPEG_QUALITY = 95


class Faces(Annotator):
    """`faces`: how many frontal ones; `face_area`: share of the picture in their boxes; `face_boxes`.

    OpenCV's cascade of Haar features (Viola and Jones, 2001; Lienhart, Kuranov and Pisarevsky, 2003), which comes in
    its package. It misses turned faces and takes some patterns for faces: `neighbours` (detections that must agree)
    trades one for the other. `min_side` is the smallest face's, as a share of the shorter side.
    """

    @dataclass(frozen=True)
    class Config:
        min_side: float = 0.05
        neighbours: int = 4

        def __post_init__(self):
            if not 0 < self.min_side <= 1 or self.neighbours < 1:
                raise UserError(f"found min_side {self.min_side}, neighbours {self.neighbours}; expected a share from "
                                f"above 0 to 1, and at least 1")

    fields: ClassVar = [pa.field("faces", pa.int32()), floats("face_area"), pa.field("face_boxes", BOXES)]

    def __init__(self, config: Config, tools: Tools):
        super().__init__(config, tools)
        file = Path(cv2.data.haarcascades) / CASCADE
        if not file.is_file():
            raise UserError(f"found no {file}; expected the cascades that OpenCV 4 carries; install the locked "
                            f"opencv-python-headless, or turn curation.annotate.faces off")
        self._cascade = cv2.CascadeClassifier(str(file))

    def __call__(self, batch: Batch) -> list[pa.Array]:
        found = [self.find(array) for array in batch.arrays]
        areas = [covered(boxes, array.shape) for boxes, array in zip(found, batch.arrays)]
        return [pa.array(map(len, found), pa.int32()), pa.array(areas, pa.float32()), pa.array(found, BOXES)]

    def find(self, array: np.ndarray) -> list[list[int]]:
        """Boxes of the faces in uint8 [Y, X, 3], sorted."""
        grey = cv2.equalizeHist(cv2.cvtColor(array, cv2.COLOR_RGB2GRAY))
        side = max(20, round(min(grey.shape) * self.config.min_side))
        found = self._cascade.detectMultiScale(grey, 1.1, self.config.neighbours, minSize=(side, side))
        return sorted([int(x), int(y), int(x + w), int(y + h)] for x, y, w, h in found)


def covered(boxes: Sequence[Sequence[int]], shape: Sequence[int]) -> float:
    """Share of a picture [Y, X, ...] inside at least one box."""
    return float(box_mask(boxes, shape).mean())


def box_mask(boxes: Sequence[Sequence[int]], shape: Sequence[int]) -> np.ndarray:
    """bool [Y, X]: inside at least one box."""
    mask = np.zeros(tuple(shape[:2]), bool)
    for left, top, right, bottom in boxes:
        mask[max(top, 0) : bottom, max(left, 0) : right] = True
    return mask


def blur_faces(data: bytes, boxes: Any) -> bytes:
    """An encoded picture with each box blurred until no feature is left; without boxes the same bytes."""
    if not boxes:
        return data
    image = decode_rgb(data)
    for left, top, right, bottom in boxes:
        # A blur over a third of the face leaves no feature; the margin takes hair and chin along.
        margin, radius = (right - left) // 8, max(right - left, bottom - top) / 3
        box = (max(left - margin, 0), max(top - margin, 0), min(right + margin, image.width),
               min(bottom + margin, image.height))
        image.paste(image.crop(box).filter(ImageFilter.GaussianBlur(radius)), box)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
