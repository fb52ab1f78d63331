"""Quality and hashes of pictures whose answers can be worked out by hand."""

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.curate.made_pools import picture
from vlmpipe.curate.annotators.base import Batch, NoConfig, Tools
from vlmpipe.curate.annotators.picture import Geometry, Hashes, Quality, border_share, light, pixel_hash, uniform_share


def quality(image: Image.Image) -> dict[str, float]:
    annotator = Quality(Quality.Config(), Tools())
    arrays = annotator(Batch([image], [""]))
    return {field.name: array[0].as_py() for field, array in zip(annotator.fields, arrays, strict=True)}


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_a_blank_picture_is_all_uniform_and_all_border():
    found = quality(Image.new("RGB", (40, 30), (51, 51, 51)))
    expected = {"sharpness": 0, "brightness": 0.2, "contrast": 0, "entropy": 0, "uniform": 1, "border": 1}
    assert found == pytest.approx(expected, abs=1e-6)


def test_half_black_half_white_is_one_bit():
    array = np.zeros((40, 40), np.uint8)
    array[:, 20:] = 255
    found = quality(Image.fromarray(array).convert("RGB"))
    assert (found["brightness"], found["contrast"], found["entropy"]) == pytest.approx((0.5, 0.5, 1.0))
    assert found["uniform"] == 0.5
    uniform = light(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert uniform[3] == pytest.approx(8.0)


def test_sharpness_is_the_variance_of_the_laplacian_and_falls_with_blur():
    luma = np.random.default_rng(1).integers(0, 256, (20, 30)).astype(np.uint8)
    edged = np.pad(luma.astype(float), 1, mode="reflect")
    laplacian = edged[:-2, 1:-1] + edged[2:, 1:-1] + edged[1:-1, :-2] + edged[1:-1, 2:] - 4 * edged[1:-1, 1:-1]
    assert light(luma)[0] == pytest.approx(laplacian.var(), rel=1e-6)
    assert light(cv2.GaussianBlur(luma, (0, 0), 2))[0] < light(luma)[0] / 50


def test_sharpness_does_not_grow_with_the_picture():
    small = picture(1, (512, 512))
    large = small.resize((1024, 1024), Image.Resampling.NEAREST)
    assert quality(large)["sharpness"] == pytest.approx(quality(small)["sharpness"], rel=0.01)


def test_a_frame_is_measured_on_every_side():
    framed = np.full((100, 100, 3), 250, np.uint8)
    framed[10:90, 10:90] = noise(80, 80)
    assert border_share(framed, 16) == pytest.approx(1 - 0.8 * 0.8)
    letterbox = np.zeros((100, 100, 3), np.uint8)
    letterbox[20:90] = noise(70, 100)
    assert border_share(letterbox, 16) == pytest.approx(0.3)
    assert border_share(noise(50, 50), 16) == 0


def test_a_flat_area_on_the_edge_of_two_coarse_colours_is_one_colour():
    array = np.full((10, 10, 3), 127, np.uint8)
    array[::2] = 128
    assert uniform_share(array, 4) == 1
    array[:3] = 255
    assert uniform_share(array, 4) == pytest.approx(0.7)


def test_pixel_hash_sees_pixels_and_size_only():
    array = noise(4, 6)
    assert pixel_hash(array) == pixel_hash(np.asfortranarray(array)) and len(pixel_hash(array)) == 16
    assert pixel_hash(array) != pixel_hash(array.reshape(6, 4, 3))
    changed = array.copy()
    changed[0, 0, 0] ^= 1
    assert pixel_hash(array) != pixel_hash(changed)
    hashes = Hashes(Hashes.Config(), Tools())(Batch([picture(1), picture(1), picture(2)], [""] * 3))[2].to_pylist()
    assert hashes[0] == hashes[1] != hashes[2]


def test_aspect_is_at_least_one():
    widths, heights, aspects = Geometry(NoConfig(), Tools())(Batch([picture(1, (20, 60))], [""]))
    assert (widths[0].as_py(), heights[0].as_py(), aspects[0].as_py()) == (20, 60, 3.0)
