"""Few-shot: the same examples of training before every question."""

import pytest

from tests.models import tiny
from vlmpipe.config import parse
from vlmpipe.data.readers import READERS
from vlmpipe.data.task import TaskConfig
from vlmpipe.data.task_world import write_tasks
from vlmpipe.errors import UserError
from vlmpipe.evaluate.tasks import TASKS, EvaluateConfig, Sample
from vlmpipe.evaluate.tasks.base import MOST_SHOTS, decode_all, keys_of
from vlmpipe.evaluate.tasks.few_shot import predict_shots, read_shots, score_shots
from vlmpipe.models.generate import Example, answer

FILES = TaskConfig("vqav2")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("shots")
    write_tasks(root, 16, 0, tasks=("questions",))
    return root / "questions"


def test_examples_are_of_training_and_of_several_kinds(world):
    samples = read_shots(world / "test", FILES)
    assert len({sample.truth for sample in samples}) == 1 and len(samples[0].truth) == MOST_SHOTS
    train = {(record.images[0], record.question, record.answers[0]): record.slices["question_type"]
             for record in READERS["vqav2"](world / "train")}
    shown = [(name.removeprefix("train/"), *said)
             for name, said in zip(samples[0].image, samples[0].truth, strict=False)]
    assert len({train[one] for one in shown}) >= 4 and len({name for name, *_ in shown}) == MOST_SHOTS
    assert all(sample.image[:-1] == sample.wrong_image[:-1] for sample in samples)
    assert all(sample.image[-1] != sample.wrong_image[-1] for sample in samples)


def test_pictures_are_those_of_both_splits(world):
    samples = read_shots(world / "test", FILES)
    encoded = TASKS["few_shot"].pictures(world / "test", keys_of(samples), FILES)
    assert len(decode_all(encoded, samples[0].image)) == MOST_SHOTS + 1
    assert len(encoded) == MOST_SHOTS + len({sample.image[-1] for sample in samples})


def test_too_few_examples_are_named(world, tmp_path):
    write_tasks(tmp_path, 8, 0, tasks=("questions",))
    (tmp_path / "questions" / "train").rename(tmp_path / "questions" / "gone")
    with pytest.raises(UserError, match="found"):
        read_shots(tmp_path / "questions" / "test", FILES)


def sample(name: str, answers: tuple[str, ...], said=(("what color is the circle?", "red"), ("how many?", "two"))):
    return Sample(name, ("x", "y", name), ("x", "y", "w"), "how many shapes are there?", answers, truth=said)


def test_each_number_of_examples_is_asked():
    model, processor = tiny.make("prefix")
    one, two, *own = tiny.pictures(4)
    samples = [sample("a", ("red",) * 10), sample("b", ("two",) * 10)]
    config = parse(EvaluateConfig, {"shots": [0, 1], "answer_tokens": 3}, "test")
    rows = predict_shots(model, processor, samples, [(one, two, picture) for picture in own],
                         [(one, two, picture) for picture in own[::-1]], config)
    questions = [one.question for one in samples]
    assert [row["right"]["0"] for row in rows] == answer(model, processor, own, questions, 3)
    shown = [Example(one, "what color is the circle?", "red")]
    assert [row["right"]["1"] for row in rows] == answer(model, processor, own, questions, 3, examples=shown)
    assert [row["wrong"] for row in rows] == answer(model, processor, own[::-1], questions, 3, examples=shown)


def test_accuracy_by_the_number_of_examples():
    samples = [sample("a", ("red",) * 10), sample("b", ("two",) * 10)]
    rows = [{"right": {"0": "red", "4": "red"}, "wrong": "blue"}, {"right": {"0": "red", "4": "two"}, "wrong": "two"}]
    scores = score_shots(samples, rows)
    assert scores.metrics == {
        "accuracy": 1.0, "accuracy.k0": 0.5, "accuracy.k4": 1.0, "accuracy_wrong_image": 0.5, "accuracy_blind": 0.5,
        "gain": 0.5,
    }
    assert scores.rows["b"]["prediction"] == "two" and set(scores.counts) == set(scores.metrics)


def test_a_dual_encoder_reads_no_examples():
    model, processor = tiny.make("dual")
    seen = [tuple(tiny.pictures(3))]
    with pytest.raises(UserError, match="found a model without heads"):
        predict_shots(model, processor, [sample("a", ("red",))], seen, seen, EvaluateConfig())


@pytest.mark.parametrize("shots", [[], [2, 0], [0, MOST_SHOTS + 1], [1, 1]])
def test_numbers_of_examples_rise(shots):
    with pytest.raises(UserError, match="shots: found"):
        parse(EvaluateConfig, {"shots": shots}, "test")
