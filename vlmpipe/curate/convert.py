"""From the bytes that a server sent to the jpeg that a pool stores. Runs in the decoder's process (`pixels`).

The sizes are those of img2dataset's Resizer with `resize_only_if_bigger`. What differs: colours come out as `images`
says; a jpeg is decoded at half, a quarter or an eighth of its size where that is still large enough (libjpeg
does it in the frequency domain for half the time); and a jpeg that needs no change is stored as it came.
"""

import io
import json
import re
import sys

import cv2
import numpy as np
from PIL import Image

from vlmpipe.curate.pixels import Decoded, Wanted, serve
from vlmpipe.images import NotAnImage, is_plain, opened, orientation, to_rgb

# After a reduced decode less than this is left to shrink, and a cubic filter is sharper than area averaging.
CUBIC_BELOW = 1.5
NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)  # ITU T.81, B.1.1.2: neither stuffing nor restart
START, END, SCAN = 0xD8, 0xD9, 0xDA
REMARKS = {*range(0xE1, 0xF0), 0xFE} - {0xEE}  # APPn and comments, but for what says how to read the colours


def convert(data: bytes, wanted: Wanted) -> Decoded:
    """The stored jpeg of an image file, or why there is none."""
    try:
        with opened(data, wanted.max_pixels) as image:
            return _convert(data, image, wanted)
    except NotAnImage as error:
        return Decoded(error=str(error))


def _convert(data: bytes, image: Image.Image, wanted: Wanted) -> Decoded:
    size, is_jpeg = image.size, image.format in ("JPEG", "MPO")
    turned = is_jpeg and orientation(image) >= 5
    upright = None if is_jpeg else to_rgb(image)  # others may say only behind their pixels that they are turned
    size = size[::-1] if turned else size if is_jpeg else upright.size
    if error := _size_error(size, wanted):
        return Decoded(error=error)
    target = fitted(size, wanted)
    if target == size and wanted.resize_mode not in ("center_crop", "border") and is_jpeg and is_plain(image):
        image.load()  # damaged ones end here
        if bare := bare_jpeg(data):
            return Decoded(bare, *size, *size)
    if is_jpeg and wanted.reduced and target != size:
        image.draft(None, target[::-1] if turned else target)
    reduced = is_jpeg and image.size != (size[::-1] if turned else size)
    pixels = _framed(_resized(np.asarray(upright or to_rgb(image)), target, reduced), size, wanted)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=wanted.jpeg_quality)
    return Decoded(buffer.getvalue(), pixels.shape[1], pixels.shape[0], *size)


def _size_error(size: tuple[int, int], wanted: Wanted) -> str | None:
    if min(size) < wanted.min_size:
        return "too_small: image too small"
    if wanted.max_aspect_ratio is not None and max(size) / min(size) > wanted.max_aspect_ratio:
        return "aspect_ratio: aspect ratio too large"
    return None


def fitted(size: tuple[int, int], wanted: Wanted) -> tuple[int, int]:
    """Width and height after resizing, before a crop or border (as albumentations' MaxSize transforms round)."""
    side = {"keep_ratio_largest": max, "border": max, "keep_ratio": min, "center_crop": min}.get(wanted.resize_mode)
    if side is None or side(size) <= wanted.image_size:
        return size
    scale = wanted.image_size / side(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _resized(pixels_HWC: np.ndarray, target: tuple[int, int], reduced: bool) -> np.ndarray:
    height, width = pixels_HWC.shape[:2]
    if (width, height) == target:
        return pixels_HWC
    slight = reduced and max(width / target[0], height / target[1]) < CUBIC_BELOW
    return cv2.resize(pixels_HWC, target, interpolation=cv2.INTER_CUBIC if slight else cv2.INTER_AREA)


def _framed(pixels_HWC: np.ndarray, original: tuple[int, int], wanted: Wanted) -> np.ndarray:
    """Crop or pad to a square where the mode says so; what was small enough from the start stays as it is."""
    size, (height, width) = wanted.image_size, pixels_HWC.shape[:2]
    if wanted.resize_mode == "center_crop" and min(original) > size:
        top, left = (height - size) // 2, (width - size) // 2
        return np.ascontiguousarray(pixels_HWC[top : top + size, left : left + size])
    if wanted.resize_mode == "border" and max(original) > size:
        top, left = (size - height) // 2, (size - width) // 2
        square = np.full((size, size, 3), 255, np.uint8)
        square[top : top + height, left : left + width] = pixels_HWC
        return square
    return pixels_HWC


def bare_jpeg(data: bytes) -> bytes | None:
    """The same compressed picture, bit for bit, without remarks (EXIF with its places, comments) and what follows it.

    None: the markers don't add up, so the file is better encoded anew.
    """
    at, parts = 2, [data[:2]]
    while data[at : at + 1] == b"\xff" and at + 1 < len(data):
        code = data[at + 1]
        if code == END:
            return b"".join([*parts, data[at : at + 2]])
        if code == 0xFF:  # fill byte
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        end = at + 2 + length
        if code == SCAN and (following := NEXT_MARKER.search(data, end)):
            end = following.start()
        if length < 2 or end > len(data) or code == START:
            return None
        if code not in REMARKS:
            parts.append(data[at:end])
        at = end
    return None


if __name__ == "__main__":
    cv2.setNumThreads(1)
    settings = Wanted(**json.loads(sys.argv[1]))
    serve(lambda data: convert(data, settings))
