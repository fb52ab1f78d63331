"""Each kind of task against an oracle: who says the truth scores one, and the blind guess is what it claims to be."""

import numpy as np
import pytest
from PIL import Image

from vlmpipe.data.task import TaskConfig
from vlmpipe.data.task_world import TASKS as WORLD
from vlmpipe.data.task_world import write_tasks
from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import segmentation_iou
from vlmpipe.evaluate.tasks import TASKS
from vlmpipe.evaluate.tasks.base import Sample, keys_of
from vlmpipe.evaluate.tasks.captions import score_pairs
from vlmpipe.evaluate.tasks.detection import certain
from vlmpipe.evaluate.tasks.regions import around, best_blind_mask, by_picture, true_mask
from vlmpipe.evaluate.tasks.statements import consistency

KINDS = {
    "vqa": "questions", "classification": "classes", "statements": "statements", "segmentation": "regions",
    "referring": "regions", "detection": "detection",
}
FIRST = {"segmentation": "iou", "detection": "ap"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    write_tasks(root, 40, seed=3, tasks=sorted(set(KINDS.values())))
    return root


def samples_of(world, task: str) -> list[Sample]:
    kind = KINDS[task]
    files = TaskConfig(WORLD[kind].reader, images=WORLD[kind].images)
    found = TASKS[task].read(world / kind / "test", files)
    assert set(TASKS[task].pictures(world / kind / "test", keys_of(found), files)) == keys_of(found)
    return found


def truth(task: str, sample: Sample):
    if task == "segmentation":
        return true_mask(sample.truth)
    if task == "referring":
        return sample.truth.boxes[0]
    return certain(sample.truth) if task == "detection" else sample.answers[0]


@pytest.mark.parametrize("task", KINDS)
def test_the_truth_scores_one_and_another_pictures_truth_less(task, world):
    samples = samples_of(world, task)
    assert all(sample.wrong_image != sample.image for sample in samples)
    of_picture = {sample.image: truth(task, sample) for sample in samples}
    rows = [
        {"right": truth(task, sample), "wrong": of_picture.get(sample.wrong_image, truth(task, sample))}
        for sample in samples
    ]
    scores, name = TASKS[task].score(samples, rows), FIRST.get(task, "accuracy")
    assert scores.metrics[name] == pytest.approx(1.0)
    assert scores.metrics[f"{name}_wrong_image"] < 0.9
    assert scores.metrics[f"{name}_blind"] < 0.9
    assert scores.metrics["gain_over_blind"] == pytest.approx(1 - scores.metrics[f"{name}_blind"])
    assert set(scores.metrics) == set(scores.n) and set(scores.rows) == {sample.id for sample in samples}


def test_consistency_wants_all_of_a_sentence():
    samples = [Sample(str(i), i, i, "s", ("yes",), {"group": str(i // 2)}) for i in range(4)]
    assert consistency(samples, {"0": 1.0, "1": 1.0, "2": 1.0, "3": 0.0}) == 0.5


def test_the_best_blind_mask_beats_all_and_nothing():
    left, top = np.zeros((32, 32), bool), np.zeros((32, 32), bool)
    left[:, :16] = True
    top[:16] = True
    masks = {"a": left, "b": left, "c": top}
    found = best_blind_mask(masks).value
    everything = segmentation_iou(dict.fromkeys(masks, np.ones((32, 32), bool)), masks).value
    assert found >= max(everything, (1 + 1 + 1 / 3) / 3 - 1e-9)


def test_pairs_that_tie_are_lost():
    samples = [Sample(str(i), i, i, "", ("x",)) for i in range(3)]
    rows = [{"match": 1.0, "wrong_match": 0.0}, {"match": 0.0, "wrong_match": 0.0}, {"match": 0.0, "wrong_match": 1.0}]
    assert score_pairs(samples, rows).metrics == {"pair_accuracy": 1 / 3, "pair_accuracy_blind": 0.5}


def test_records_of_another_kind_are_named(world):
    with pytest.raises(UserError, match="found RegionRecord by the reader 'refcoco'; expected ClassRecord"):
        TASKS["classification"].read(world / "regions" / "test", TaskConfig("refcoco"))
    with pytest.raises(UserError, match="found 'refcocco'; did you mean 'refcoco'"):
        TaskConfig("refcocco")


def test_phrases_about_one_picture_are_looked_for_together(world):
    samples = samples_of(world, "referring")[:6]
    pictures = [Image.new("RGB", (64, 64), (len(sample.image), index, 0)) for index, sample in enumerate(samples)]
    asked = []

    def look(picture, phrases):
        asked.append(phrases)
        return [(picture.getpixel((0, 0))[1], phrase) for phrase in phrases]

    rows = by_picture(samples, pictures, pictures, look)
    assert [row["right"][1] for row in rows] == [sample.question for sample in samples]
    assert len(asked) == 2 * len({sample.image for sample in samples})


def test_a_box_lies_around_what_is_marked():
    mask = np.zeros((8, 10), bool)
    mask[2:4, 5:9] = True
    assert around(mask) == (5.0, 2.0, 9.0, 4.0) and around(mask & False) == (0.0, 0.0, 0.0, 0.0)
