"""Compositionality: the true sentence must score higher than the swapped one, strictly."""

import numpy as np
import pytest

from tests.models import joined, tiny
from vlmpipe.data.task import TaskConfig
from vlmpipe.data.task_world import write_tasks
from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import choice_accuracy
from vlmpipe.evaluate.tasks import TASKS, EvaluateConfig, Sample
from vlmpipe.evaluate.tasks.captions import caption_loss
from vlmpipe.evaluate.tasks.compositionality import predict_contrasts, read_contrasts, score_contrasts

SAID = ("a red circle above a blue square", "a blue circle above a red square")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("swaps")
    write_tasks(root, 40, 0, tasks=("swaps", "pairs"))
    return root


def pair(name: str, group: str = "g", turned: bool = False) -> Sample:
    said = SAID[::-1] if turned else SAID
    return Sample(name, name, "other", "", said[:1], {"swap": "swap_att", "group": group}, choices=said)


def scored(*scores: tuple[float, float], wrong: tuple[float, float] = (0.0, 1.0)):
    """Of two pictures of a group: (true, false) of each."""
    samples = [pair("a"), pair("b", turned=True)]
    return score_contrasts(samples, [{"right": list(own), "wrong": list(wrong)} for own in scores])


def test_equal_scores_are_lost():
    scores = scored((1.0, 0.5), (0.5, 0.5))
    assert scores.metrics["accuracy"] == scores.metrics["accuracy.swap_att"] == 0.5
    assert scores.metrics["accuracy_wrong_image"] == 0.0 and scores.metrics["accuracy_blind"] == 0.5
    assert scores.rows["a"]["prediction"] == SAID[0] and scores.rows["b"]["score"] == 0.0
    assert scores.rows["b"]["prediction"] == SAID[0]  # false of the second picture


@pytest.mark.parametrize(("scores", "text", "image"), [
    (((0.9, 0.1), (0.9, 0.1)), 1.0, 1.0),
    # Both sentences fit the first picture better: each picture has its own, each sentence the first.
    (((0.9, 0.8), (0.3, 0.2)), 1.0, 0.0),
    # The first sentence fits both pictures better, its own most: each sentence has its picture.
    (((0.9, 0.1), (0.2, 0.8)), 0.0, 1.0),
])
def test_groups_are_winogrounds(scores, text, image):
    found = scored(*scores)
    assert (found.metrics["text"], found.metrics["image"]) == (text, image)
    assert found.metrics["group"] == text * image and found.n["group"] == 1


def test_pictures_without_a_counterpart_have_no_groups():
    scores = score_contrasts([pair("a", "g"), pair("b", "h")], [{"right": [1.0, 0.0], "wrong": [1.0, 0.0]}] * 2)
    assert "group" not in scores.metrics and scores.metrics["accuracy"] == 1.0
    assert set(scores.metrics) == set(scores.n) == set(scores.counts)


def test_a_score_that_is_no_number_is_refused():
    with pytest.raises(UserError, match="expected two or more finite numbers"):
        choice_accuracy({"a": [float("nan"), 0.0]})
    with pytest.raises(UserError, match="no samples"):
        choice_accuracy({})


@pytest.mark.parametrize(("task", "reader"), [("swaps", "sugarcrepe"), ("pairs", "winoground")])
def test_the_world_has_both_formats(world, task, reader):
    samples = read_contrasts(world / task / "test", TaskConfig(reader))
    assert all(sample.image != sample.wrong_image and len(set(sample.choices)) == 2 for sample in samples)
    groups = [sample.slices["group"] for sample in samples]
    assert len(set(groups)) == len(samples) // (2 if task == "pairs" else 1)
    rows = [{"right": [1.0, 0.0], "wrong": [0.0, 1.0]} for _ in samples]
    metrics = TASKS["compositionality"].score(samples, rows).metrics
    assert metrics["accuracy"] == 1.0 and metrics["gain_over_blind"] == 0.5
    assert ("group" in metrics) == (task == "pairs")


@pytest.mark.parametrize("make", [lambda: tiny.make("prefix"), lambda: tiny.make("dual"),
                                  lambda: joined.make("single_stream")])
def test_every_kind_of_model_gives_scores(make):
    model, processor = make()
    right, wrong = tiny.pictures(2), tiny.pictures(2, seed=1)
    samples = [pair("a"), pair("b", turned=True)]
    rows = predict_contrasts(model, processor, samples, right, wrong, EvaluateConfig())
    assert np.isfinite([row[which] for row in rows for which in ("right", "wrong")]).all()
    assert rows[0]["right"] != rows[0]["wrong"] and rows[0]["right"][0] != rows[0]["right"][1]
    if model.language_model is not None:
        (nll, tokens), = caption_loss(model, processor, right[:1], SAID[:1])
        assert rows[0]["right"][0] == pytest.approx(-nll / tokens, abs=1e-4)
