"""Test pictures that look like training pictures are found, and others are not."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from vlmpipe.data.task import TaskConfig
from vlmpipe.evaluate.contamination import contamination

FOLDERS = TaskConfig("folders", images=".")


def picture(seed: int) -> Image.Image:
    """Blocks of colour that no other seed has."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((96, 96), Image.Resampling.NEAREST)


def write(folder, pictures) -> set[str]:
    """As pictures of one class; returns their names."""
    (folder / "c").mkdir(parents=True)
    for name, image in pictures.items():
        image.save(folder / "c" / name)
    return {f"c/{name}" for name in pictures}


def numbered(*seeds: int) -> dict[str, Image.Image]:
    return {f"{seed}.png": picture(seed) for seed in seeds}


def test_the_share_of_test_pictures_with_a_near_twin_in_training(tmp_path):
    write(tmp_path / "train", numbered(*range(20)))
    again = io.BytesIO()
    picture(7).save(again, "jpeg", quality=60)
    pictures = {"new1.png": picture(100), "new2.png": picture(101), "same.png": picture(3)}
    names = write(tmp_path / "test", pictures | {"coded.png": Image.open(again).resize((80, 80))})
    found = contamination({"vqa": names, "statements": {"c/new1.png", "c/new2.png", "c/same.png"}}, tmp_path, FOLDERS)
    assert found["metrics"] == {"contamination.vqa": 0.5, "contamination.statements": pytest.approx(1 / 3)}
    assert found["n"] == {"contamination.vqa": 4, "contamination.statements": 3}
    assert found["details"]["contamination.vqa"] == "c/coded.png like c/7.png; c/same.png like c/3.png"


def test_pictures_that_stand_in_no_record_count_for_nothing(tmp_path):
    """One folder for both, as COCO's is linked: what counts is who is asked about and learned from."""
    said = {"train": {0: "true", 1: "false", 2: "true", 3: None}, "test": {1: "true", 3: "true", 4: "false"}}
    for split, labels in said.items():
        (tmp_path / split / "images").mkdir(parents=True)
        for name, image in numbered(*range(6)).items():
            image.save(tmp_path / split / "images" / name)
        rows = [{"identifier": f"{at}-0", "sentence": "s", "label": label, "image": f"{at}.png"}
                for at, label in labels.items()]
        (tmp_path / split / "statements.json").write_text("\n".join(map(json.dumps, rows)))
    files = TaskConfig("nlvr")
    clean = contamination({"statements": {"3.png", "4.png"}}, tmp_path, files)
    assert clean["metrics"] == {"contamination.statements": 0.0} and clean["n"] == {"contamination.statements": 2}
    found = contamination({"statements": {"1.png", "3.png", "4.png"}}, tmp_path, files)
    assert found["metrics"] == {"contamination.statements": pytest.approx(1 / 3)}
    assert found["details"] == {"contamination.statements": "1.png like 1.png"}


@pytest.mark.parametrize("asked, train", [({}, True), ({"vqa": {"c/0.png"}}, False)])
def test_nothing_is_said_where_nothing_can_be_compared(tmp_path, asked, train):
    write(tmp_path / "test", numbered(0))
    if train:
        write(tmp_path / "train", numbered(0))
    assert contamination(asked, tmp_path, FOLDERS)["metrics"] == {}


def test_clean_data_has_none(tmp_path):
    write(tmp_path / "train", numbered(*range(20)))
    names = write(tmp_path / "test", numbered(*range(50, 60)))
    found = contamination({"vqa": names}, tmp_path, FOLDERS)
    assert found["metrics"] == {"contamination.vqa": 0.0} and found["details"] == {"contamination.vqa": "none"}
