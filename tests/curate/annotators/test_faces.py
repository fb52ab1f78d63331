"""Faces found in a drawn portrait, and blurred beyond finding."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from tests.curate.made_pools import jpeg
from vlmpipe.curate.annotators.base import Batch, Tools
from vlmpipe.curate.annotators.faces import Faces, blur_faces
from vlmpipe.errors import UserError

# (box in the face's own units, colour): what the cascade looks for is dark eyes under a light forehead.
PARTS = (
    ((0.1, -0.1, 0.9, 1.1), (224, 180, 150)), ((0.2, 0.28, 0.44, 0.34), (70, 50, 40)),
    ((0.56, 0.28, 0.8, 0.34), (70, 50, 40)), ((0.22, 0.36, 0.42, 0.48), (120, 90, 75)),
    ((0.58, 0.36, 0.78, 0.48), (120, 90, 75)), ((0.27, 0.38, 0.38, 0.47), (30, 25, 20)),
    ((0.62, 0.38, 0.73, 0.47), (30, 25, 20)), ((0.44, 0.42, 0.56, 0.7), (235, 195, 165)),
    ((0.42, 0.64, 0.48, 0.69), (130, 90, 75)), ((0.52, 0.64, 0.58, 0.69), (130, 90, 75)),
    ((0.33, 0.76, 0.67, 0.86), (150, 70, 70)), ((0.36, 0.79, 0.64, 0.81), (90, 40, 40)),
)


def portrait(left: int = 40, top: int = 40, size: int = 80) -> Image.Image:
    image = Image.new("RGB", (160, 160), (90, 120, 150))
    draw = ImageDraw.Draw(image)
    for box, colour in PARTS:
        corners = [offset + share * size for offset, share in zip((left, top, left, top), box)]
        draw.ellipse(corners, fill=colour)
    return image.filter(ImageFilter.GaussianBlur(size / 50))


def found(*images: Image.Image) -> list[dict]:
    annotator = Faces(Faces.Config(), Tools())
    arrays = annotator(Batch(list(images), [""] * len(images)))
    return [dict(zip(("faces", "face_area", "face_boxes"), row)) for row in zip(*(a.to_pylist() for a in arrays))]


def test_a_face_is_counted_with_its_place():
    face, nothing = found(portrait(), Image.new("RGB", (160, 160), "green"))
    assert face["faces"] == 1 and nothing == {"faces": 0, "face_area": 0, "face_boxes": []}
    left, top, right, bottom = face["face_boxes"][0]
    assert abs((left + right) / 2 - 80) < 12 and abs((top + bottom) / 2 - 80) < 16
    assert face["face_area"] == pytest.approx((right - left) * (bottom - top) / 160**2)


def test_a_blurred_face_is_none_and_the_rest_stays():
    data = jpeg(portrait(), 95)
    boxes = found(Image.open(io.BytesIO(data)))[0]["face_boxes"]
    blurred = Image.open(io.BytesIO(blur_faces(data, boxes)))
    assert found(blurred)[0]["faces"] == 0
    before, after = (np.asarray(Image.open(io.BytesIO(d)), np.int16) for d in (data, blur_faces(data, boxes)))
    outside = np.ones((160, 160), bool)
    left, top, right, bottom = boxes[0]
    outside[top - 24 : bottom + 24, left - 24 : right + 24] = False
    assert np.abs(before - after)[outside].max() <= 6


def test_a_picture_without_faces_keeps_its_bytes():
    data = jpeg(portrait())
    assert blur_faces(data, []) is data and blur_faces(data, None) is data


def test_config_refuses_nonsense():
    with pytest.raises(UserError, match="min_side 0"):
        Faces.Config(min_side=0)
