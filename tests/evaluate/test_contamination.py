"""Test pictures that look like training pictures are found, and others are not."""

import io

import numpy as np
import pytest
from PIL import Image

from vlmpipe.data.task import TaskConfig
from vlmpipe.evaluate.contamination import contamination


def picture(seed: int) -> Image.Image:
    """Blocks of colour that no other seed has."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((96, 96), Image.Resampling.NEAREST)


def write(folder, pictures) -> None:
    (folder / "images").mkdir(parents=True)
    for name, image in pictures.items():
        image.save(folder / "images" / name)


def test_the_share_of_test_pictures_with_a_near_twin_in_training(tmp_path):
    write(tmp_path / "train", {f"{seed}.png": picture(seed) for seed in range(20)})
    again = io.BytesIO()
    picture(7).save(again, "jpeg", quality=60)
    pictures = {"new1.png": picture(100), "new2.png": picture(101), "same.png": picture(3)}
    write(tmp_path / "test", pictures | {"coded.png": Image.open(again).resize((80, 80))})
    found = contamination(["vqa", "statements"], tmp_path, TaskConfig())
    assert found["metrics"] == {"contamination.vqa": 0.5, "contamination.statements": 0.5}
    assert found["n"]["contamination.vqa"] == 4
    assert found["details"]["contamination.vqa"] == "coded.png like 7.png; same.png like 3.png"


@pytest.mark.parametrize("tasks, train", [((), True), (("vqa",), False)])
def test_nothing_is_said_where_nothing_can_be_compared(tmp_path, tasks, train):
    write(tmp_path / "test", {"a.png": picture(0)})
    if train:
        write(tmp_path / "train", {"a.png": picture(0)})
    assert contamination(tasks, tmp_path, TaskConfig())["metrics"] == {}


def test_clean_data_has_none(tmp_path):
    write(tmp_path / "train", {f"{seed}.png": picture(seed) for seed in range(20)})
    write(tmp_path / "test", {f"{seed}.png": picture(seed) for seed in range(50, 60)})
    found = contamination(["vqa"], tmp_path, TaskConfig())
    assert found["metrics"] == {"contamination.vqa": 0.0} and found["details"] == {"contamination.vqa": "none"}
