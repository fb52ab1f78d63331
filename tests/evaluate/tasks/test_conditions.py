"""Robustness and the blind twin: a task asked again with other pictures, against models whose answers are known."""

import pytest
from PIL import Image

from tests.models import tiny
from vlmpipe.config import parse
from vlmpipe.data.queries import Query
from vlmpipe.data.task import TaskConfig
from vlmpipe.data.task_world import TASKS as WORLD
from vlmpipe.data.task_world import write_tasks
from vlmpipe.evaluate.tasks import TASKS, EvaluateConfig, Sample
from vlmpipe.evaluate.tasks import conditions as module
from vlmpipe.evaluate.tasks.base import decode_all, keys_of
from vlmpipe.evaluate.tasks.conditions import Asked, Base, plain
from vlmpipe.evaluate.tasks.questions import score_answers
from vlmpipe.evaluate.tasks.regions import by_picture
from vlmpipe.evaluate.tasks.robustness import predict_robustness, score_robustness
from vlmpipe.evaluate.tasks.text_prior import blank, predict_prior, score_prior

CONFIG = parse(EvaluateConfig, {
    "robustness": {"corruptions": ["brightness"], "severities": [1, 5], "resolutions": [0.25]}, "answer_tokens": 3,
}, "test")
GREY = (100, 100, 100)


def sample(name: str, answer: str) -> Sample:
    return Sample(name, name, "other", "how bright is it", (answer,) * 10, {"question_type": "light"},
                  truth=Asked("QuestionRecord"))


@pytest.fixture
def seeing(monkeypatch):
    """An oracle that says how bright the picture is, and knows nothing of small ones."""
    def predict(model, processor, batch, right, wrong, config):
        assert all(one.truth is None for one in batch)
        look = lambda seen: "small" if seen.width < 32 else str(seen.getpixel((0, 0))[0])  # noqa: E731
        return [{"right": look(a), "wrong": look(b)} for a, b in zip(right, wrong, strict=True)]

    monkeypatch.setitem(module.BY_NAME, "QuestionRecord", Base(None, predict, score_answers))


def test_accuracy_under_each_condition_and_its_drop(seeing):
    samples = [sample("a", "100"), sample("b", "100"), sample("c", "255"), sample("d", "0")]
    right = [Image.new("RGB", (64, 64), color) for color in (GREY, GREY, (255,) * 3, (9,) * 3)]
    wrong = [Image.new("RGB", (64, 64), GREY)] * 4
    scores = score_robustness(samples, predict_robustness(None, None, samples, right, wrong, CONFIG))
    metrics = scores.metrics
    assert metrics["accuracy"] == 0.75 and metrics["accuracy_wrong_image"] == metrics["accuracy_blind"] == 0.5
    # Brighter, only white stays what it is; small, nothing is known.
    assert metrics["accuracy.brightness_1"] == metrics["accuracy.brightness_5"] == 0.25
    assert metrics["accuracy.brightness"] == 0.25 and metrics["accuracy.resolution_0.25"] == 0.0
    assert metrics["accuracy.corrupted"] == pytest.approx(0.5 / 3)
    assert metrics["drop.brightness"] == pytest.approx(1 - 0.25 / 0.75) and metrics["drop.resolution_0.25"] == 1.0
    assert metrics["drop"] == pytest.approx(1 - metrics["accuracy.corrupted"] / 0.75)
    assert scores.rows["a"]["prediction"] == "100" and set(metrics) == set(scores.counts)


def test_noise_goes_by_the_picture_whatever_the_batch(monkeypatch):
    def look(picture, phrases):
        return [picture.tobytes()] * len(phrases)

    def predict(model, processor, batch, right, wrong, config):
        return by_picture(batch, right, wrong, look)

    monkeypatch.setitem(module.BY_NAME, "RegionRecord", Base(None, predict, None))
    config = parse(EvaluateConfig, {"robustness": {"corruptions": ["noise"], "severities": [1]}}, "test")
    samples = [Sample(name, image, "w", "it", (), truth=Asked("RegionRecord", Query(image, (16, 16), "it")))
               for name, image in (("1", "a"), ("2", "a"), ("3", "b"))]
    shown = [Image.new("RGB", (16, 16), GREY)] * 3
    whole = predict_robustness(None, None, samples, shown, shown, config)
    assert whole == [predict_robustness(None, None, [one], shown[:1], shown[:1], config)[0] for one in samples]
    assert whole[0] == whole[1] and whole[0]["under"]["noise_1"] != whole[2]["under"]["noise_1"]


def test_a_model_that_is_never_right_has_no_drop(seeing):
    rows = [{"right": "?", "wrong": "?", "under": {"noise_3": "?"}}]
    metrics = score_robustness([sample("a", "100")], rows).metrics
    assert metrics["accuracy"] == metrics["accuracy.noise"] == 0.0 and not any("drop" in name for name in metrics)


def test_the_blind_twin_sees_the_mean_colour(seeing):
    model, processor = tiny.make("prefix")
    mean = round(255 * model.config.vision.mean[0])
    samples = [sample("a", str(mean)), sample("b", "100")]
    right = [Image.new("RGB", (40, 60), (value,) * 3) for value in (mean, 100)]
    rows = predict_prior(model, processor, samples, right, right[::-1], CONFIG)
    assert [row["under"] for row in rows] == [{"blank": str(mean)}] * 2
    metrics = score_prior(samples, rows).metrics
    assert metrics["accuracy"] == 1.0 and metrics["accuracy_blank"] == metrics["accuracy_blank.light"] == 0.5
    assert metrics["accuracy_wrong_image"] == 0.0 and metrics["gain_over_blank"] == 0.5
    assert [seen.size for seen in blank(model, tuple(right))] == [(40, 60)] * 2


def test_a_blank_picture_is_zero_to_the_model():
    model, _ = tiny.make("prefix")
    assert set(blank(model, tiny.pictures(1)[0]).getdata()) == {
        tuple(round(255 * value) for value in model.config.vision.mean)
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("conditions")
    write_tasks(root, 16, 0, tasks=("questions", "classes", "statements", "regions"))
    return root


@pytest.mark.parametrize("name", ["questions", "classes", "statements", "regions"])
@pytest.mark.parametrize("task", ["robustness", "text_prior"])
def test_every_base_task_is_read_and_scored(world, task, name):
    files, split = TaskConfig(WORLD[name].reader, images=WORLD[name].images), world / name / "test"
    samples = TASKS[task].read(split, files)
    encoded = TASKS[task].pictures(split, keys_of(samples), files)
    assert isinstance(decode_all(encoded, samples[0].image), Image.Image | tuple)
    truth = [one.truth.boxes[0] if name == "regions" else one.answers[0] for one in plain(samples)[1]]
    rows = [{"right": text, "wrong": text, "sure": 0.5, "under": {"blank": text, "noise_3": text}} for text in truth]
    metrics = TASKS[task].score(samples, rows).metrics
    assert metrics["accuracy"] == pytest.approx(1.0)
    assert metrics["drop" if task == "robustness" else "gain_over_blank"] == pytest.approx(0.0)


def test_a_model_of_words_is_asked_under_conditions():
    model, processor = tiny.make("prefix")
    samples, shown = [sample("a", "red"), sample("b", "two")], tiny.pictures(2)
    rows = predict_robustness(model, processor, samples, shown, shown[::-1], CONFIG)
    assert list(rows[0]["under"]) == ["brightness_1", "brightness_5", "resolution_0.25"]
    assert all(isinstance(text, str) for row in rows for text in (row["right"], row["wrong"], *row["under"].values()))
