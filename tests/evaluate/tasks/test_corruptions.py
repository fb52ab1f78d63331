"""Corruptions: what each does to pictures whose outcome is known."""

import numpy as np
import pytest
from PIL import Image

from vlmpipe.errors import UserError
from vlmpipe.evaluate.tasks.corruptions import CORRUPTIONS, SEVERITIES, RobustnessConfig, worsen

RNG = np.random.default_rng(0)
SHARP = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 200).astype(np.uint8)).convert("RGB")


def flat(*color: int, size: int = 64) -> Image.Image:
    return Image.new("RGB", (size, size), color)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(float)


def test_noise_has_the_deviation_that_its_severity_says():
    for severity, deviation in enumerate(SEVERITIES["noise"][:2], 1):
        found = pixels(worsen(flat(128, 128, 128, size=128), f"noise_{severity}", "a")) - 128
        assert found.std() == pytest.approx(255 * deviation, rel=0.02) and abs(found.mean()) < 1
    assert worsen(SHARP, "noise_1", "a") == worsen(SHARP, "noise_1", "a") != worsen(SHARP, "noise_1", "b")


def test_brightness_adds_to_the_value_and_keeps_the_hue():
    # Value 128 of 255 becomes 128 + 0.2 x 255 = 179; the other colours grow by as much times.
    assert worsen(flat(128, 64, 0), "brightness_2", "").getpixel((0, 0)) == (179, 90, 0)
    assert worsen(flat(0, 0, 0), "brightness_1", "").getpixel((0, 0)) == (26, 26, 26)
    assert worsen(flat(250, 0, 0), "brightness_5", "").getpixel((0, 0)) == (255, 0, 0)


def test_contrast_keeps_the_mean_of_each_colour():
    found = pixels(worsen(SHARP, "contrast_1", ""))
    assert set(np.unique(found)) == {60.0, 140.0}  # 100 -/+ 0.4 x 100
    assert worsen(flat(10, 20, 30), "contrast_5", "").getpixel((3, 3)) == (10, 20, 30)


def test_pixelate_leaves_few_colours_in_blocks():
    half = Image.fromarray(np.repeat([[0, 255]], 32, axis=0).repeat(32, axis=1).astype(np.uint8)).convert("RGB")
    assert worsen(half, "pixelate_5", "") == half  # its blocks of 4 fit the edge
    assert np.ptp(pixels(worsen(SHARP, "pixelate_5", ""))) == 0  # a fine board is one grey


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_each_is_worse_the_more_severe_and_leaves_size_and_mode(name):
    rng = np.random.default_rng(1)
    picture = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).resize((240, 224), Image.Resampling.BICUBIC)
    away = []
    for severity in (1, 3, 5):
        found = worsen(picture, f"{name}_{severity}", "k")
        assert found.size == (240, 224) and found.mode == "RGB"
        away.append(np.abs(pixels(found) - pixels(picture)).mean())
    assert 0 < away[0] < away[1] < away[2]


def test_blur_is_a_share_of_the_picture():
    small, large = (worsen(SHARP.resize((side, side), Image.Resampling.NEAREST), "blur_3", "") for side in (64, 256))
    assert np.abs(pixels(large.resize((64, 64), Image.Resampling.BOX)) - pixels(small)).mean() < 6


def test_resolutions_make_pictures_smaller():
    assert worsen(flat(1, 2, 3, size=64), "resolution_0.25", "").size == (16, 16)
    assert worsen(flat(1, 2, 3, size=16), "resolution_0.25", "").size == (8, 8)


@pytest.mark.parametrize(("config", "said"), [
    ({"corruptions": ("nose",)}, "found 'nose'; did you mean 'noise'"),
    ({"severities": (0,)}, "expected numbers from 1 to 5"),
    ({"resolutions": (1.0,)}, "expected shares between 0 and 1"),
    ({"corruptions": (), "resolutions": ()}, "found no corruption and no resolution"),
])
def test_what_can_not_be_is_refused(config, said):
    with pytest.raises(UserError, match=said):
        RobustnessConfig(**config)


def test_conditions_have_names():
    config = RobustnessConfig(("noise", "jpeg"), (1, 5), (0.5,))
    assert config.conditions == ("noise_1", "noise_5", "jpeg_1", "jpeg_5", "resolution_0.5")
