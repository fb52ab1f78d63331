"""Generalisation: which combinations are new, and accuracy with and without them."""

import json

import pytest

from vlmpipe.data.readers.clevr import read_clevr_scenes
from vlmpipe.data.scenes import LEFT_OUT
from vlmpipe.data.task import TaskConfig
from vlmpipe.data.task_world import read_task, write_tasks
from vlmpipe.errors import UserError
from vlmpipe.evaluate.tasks import Sample
from vlmpipe.evaluate.tasks.generalisation import looks, read_combinations, score_combinations

FILES = TaskConfig("clevr")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("combinations")
    write_tasks(root, 80, 0, tasks=("combinations",))
    return root / "combinations"


def test_training_leaves_combinations_out_and_half_of_the_tests_show_them(world):
    train = looks(read_clevr_scenes(world / "train"))
    assert not train & LEFT_OUT
    assert {color for color, _ in train} == {color for color, _ in LEFT_OUT}
    assert {shape for _, shape in LEFT_OUT} <= {shape for _, shape in train}
    new = [bool(looks([scene]) & LEFT_OUT) for scene in read_clevr_scenes(world / "test")]
    assert sum(new) == len(new) // 2


def test_samples_say_whether_their_picture_shows_a_new_combination(world):
    samples = read_combinations(world / "test", FILES)
    shown = {scene.image: looks([scene]) for scene in read_clevr_scenes(world / "test")}
    known = looks(read_clevr_scenes(world / "train"))
    for sample in samples:
        assert (sample.slices["combination"] == "seen") == (shown[sample.image] <= known)
    assert len(samples) == len(read_task(world.parent, "combinations", "test")[0])


def test_both_conditions_may_stand_side_by_side(world, tmp_path):
    (tmp_path / "train").symlink_to(world / "train")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "images").symlink_to(world / "test" / "images")
    for kind in ("questions", "scenes"):
        content = (world / "test" / f"CLEVR_test_{kind}.json").read_text()
        for condition in "AB":
            (tmp_path / "test" / f"CLEVR_val{condition}_{kind}.json").write_text(content)
    samples = read_combinations(tmp_path / "test", FILES)
    assert len({sample.id for sample in samples}) == len(samples) == 2 * len(read_combinations(world / "test", FILES))


def test_accuracy_by_combination_and_the_gap():
    said = [("a", "seen", "red"), ("b", "seen", "red"), ("c", "unseen", "red"), ("d", "unseen", "blue")]
    samples = [Sample(name, name, "w", "what color", ("red",) * 10, {"combination": slice}) for name, slice, _ in said]
    scores = score_combinations(samples, [{"right": text, "wrong": "no"} for *_, text in said])
    assert scores.metrics == {
        "accuracy": 0.75, "accuracy.seen": 1.0, "accuracy.unseen": 0.5, "gap": 0.5, "accuracy_wrong_image": 0.0,
        "accuracy_blind": 1.0, "gain_over_blind": -0.25,
    }
    assert "gap" not in score_combinations(samples[:2], [{"right": "red", "wrong": "no"}] * 2).metrics


def test_what_can_not_be_told_is_refused(world, tmp_path):
    with pytest.raises(UserError, match="found 'vqav2'; expected 'clevr'"):
        read_combinations(world / "test", TaskConfig("vqav2"))
    with pytest.raises(UserError, match=r"found no \*scenes.json"):
        read_combinations(tmp_path / "test", FILES)
    (tmp_path / "train").symlink_to(world / "train")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "images").symlink_to(world / "test" / "images")
    for name in ("questions", "scenes"):
        content = json.loads((world / "test" / f"CLEVR_test_{name}.json").read_text())
        if name == "scenes":
            content["scenes"] = content["scenes"][1:]
        (tmp_path / "test" / f"a_{name}.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"found no scene of CLEVR_test_100001\.png"):
        read_combinations(tmp_path / "test", FILES)
