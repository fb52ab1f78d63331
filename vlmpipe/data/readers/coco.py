"""COCO captions and instances, and what else is published in their layout (nocaps, Objects365, ...).

Format: https://cocodataset.org/#format-data. One json with `images` and `annotations`, instances with `categories`.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vlmpipe.data.fields import Entry, filled, find, is_number, listed, load, short, unique
from vlmpipe.data.masks import Mask, Polygons, Rle, decompress
from vlmpipe.data.records import Box, CaptionRecord, DetectionRecord
from vlmpipe.images import MAX_PIXELS

# An outline is walked from pixel to pixel to be filled, so that one that is too long takes all memory.
MARGIN = 1  # sides of a picture that it may go beyond it
WALK = 4_000_000  # pixels that it may be long


def read_coco_captions(path: Path) -> list[CaptionRecord]:
    """One record a picture with all its captions, in the order of `images`; () for pictures without any.

    Raises:
        UserError: a file or field is missing or wrong, or a caption is of a picture that is not listed.
    """
    file = find(path, "*captions*.json")
    content = load(file)
    images = _images(content, file)
    captions: dict[str, list[str]] = {image_id: [] for image_id in images}
    for annotation in listed(content, file, "annotations"):
        captions[_image_id(annotation, images)].append(annotation.field("caption", str).strip())
    records = [
        CaptionRecord(image_id, (image.field("file_name", str),), tuple(captions[image_id]))
        for image_id, image in images.items()
    ]
    return filled(records, file, "pictures")


def read_coco_instances(path: Path) -> list[DetectionRecord]:
    """One record a picture with its boxes, category names, crowds and masks; pictures without any have N = 0.

    Boxes are given as (left, top, right, bottom), unclipped; some published ones have no area.

    Raises:
        UserError: a file or field is missing or wrong, or an annotation points nowhere.
    """
    file = find(path, "*instances*.json")
    content = load(file)
    images = _images(content, file)
    names = {entry.name("id"): entry.field("name", str) for entry in listed(content, file, "categories")}
    annotations: dict[str, list[Entry]] = defaultdict(list)
    for annotation in listed(content, file, "annotations"):
        annotations[_image_id(annotation, images)].append(annotation)
    records = [_detections(image, annotations[image_id], names) for image_id, image in images.items()]
    return filled(records, file, "pictures")


def _images(content: object, file: Path) -> dict[str, Entry]:
    seen: set[str] = set()
    return {unique(entry, seen, "id"): entry for entry in listed(content, file, "images")}


def _image_id(annotation: Entry, images: Mapping[str, Entry]) -> str:
    image_id = annotation.name("image_id")
    if image_id not in images:
        raise annotation.wrong("image_id", f"one of the {len(images)} listed pictures")
    return image_id


def _detections(image: Entry, annotations: list[Entry], names: Mapping[str, str]) -> DetectionRecord:
    size = size_of(image)
    for annotation in annotations:
        if annotation.name("category_id") not in names:
            raise annotation.wrong("category_id", f"one of the {len(names)} listed categories")
    return DetectionRecord(
        image.name("id"), image.field("file_name", str), size,
        np.array([box_of(annotation) for annotation in annotations], np.float32).reshape(-1, 4),
        tuple(names[annotation.name("category_id")] for annotation in annotations),
        np.array([bool(annotation.optional("iscrowd", int, bool, default=0)) for annotation in annotations], bool),
        tuple(mask_of(annotation, size) for annotation in annotations),
    )


# --- what referring expressions share ----------------------------------------------------------------------

def size_of(image: Entry) -> tuple[int, int]:
    """(width, height) of an entry of `images`."""
    width, height = image.field("width", int), image.field("height", int)
    if min(width, height) < 1 or width * height > MAX_PIXELS:
        raise image.wrong("width", f"width and height from 1, at most {MAX_PIXELS} pixels", f"{width} x {height}")
    return width, height


def box_of(annotation: Entry) -> Box:
    """(left, top, right, bottom); the files have left, top, width, height."""
    left, top, width, height = annotation.numbers("bbox", 4)
    if width < 0 or height < 0:
        raise annotation.wrong("bbox", "left, top, width and height, none of the last two negative")
    return left, top, left + width, top + height


def mask_of(annotation: Entry, size: tuple[int, int]) -> Mask | None:
    """The `segmentation`: polygons, run lengths as a list or compressed to text; None where there is none."""
    found = annotation.optional("segmentation", list, dict)
    if not found:
        return None
    width, height = size
    if isinstance(found, list):
        return Polygons(height, width, tuple(_outline(annotation, outline, size) for outline in found))
    said = annotation.object("segmentation")
    if said.numbers("size", 2) != (height, width):
        raise said.wrong("size", f"[{height}, {width}], height and width of the picture")
    try:
        return _run_lengths(said.field("counts", list, str), height, width)
    except (ValueError, OverflowError) as error:
        raise said.wrong("counts", "the run lengths of a mask", str(error)) from None


def _outline(annotation: Entry, outline: object, size: tuple[int, int]) -> tuple[float, ...]:
    if not isinstance(outline, list) or len(outline) < 6 or len(outline) % 2 or not all(map(is_number, outline)):
        raise annotation.wrong("segmentation", "polygons of three or more x, y", short(outline))
    xs, ys = outline[::2], outline[1::2]
    for name, places, side in zip("xy", (xs, ys), size, strict=True):
        low, high = -MARGIN * side, (1 + MARGIN) * side
        if min(places) < low or max(places) > high:
            far = min(places) if min(places) < low else max(places)
            raise annotation.wrong("segmentation", f"{name} from {low} to {high}, in or near the picture", f"{far:g}")
    if len(xs) * (1 + 2 * MARGIN) * max(size) > WALK and _length(xs, ys) > WALK:
        raise annotation.wrong("segmentation", f"outlines of at most {WALK} pixels", f"one of {_length(xs, ys):.0f}")
    return tuple(map(float, outline))


def _length(xs: list[float], ys: list[float]) -> float:
    """Pixels from point to point, along the longer axis of each edge, and back to the first."""
    steps = zip(xs, ys, [*xs[1:], xs[0]], [*ys[1:], ys[0]], strict=True)
    return sum(max(abs(right - left), abs(bottom - top)) for left, top, right, bottom in steps)


def _run_lengths(counts: list | str, height: int, width: int) -> Rle:
    if isinstance(counts, list):
        if not all(isinstance(run, int) for run in counts):
            raise ValueError("run lengths that are not whole numbers")
        return Rle.of_runs(height, width, counts)
    return Rle.of_runs(height, width, decompress(counts.encode()))
