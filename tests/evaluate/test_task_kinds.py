"""Each kind of task against an oracle: who says the truth scores one, and the blind guess is what it claims to be."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.models import joined, tiny
from vlmpipe.compose import compose
from vlmpipe.data.records import ClassRecord, QuestionRecord
from vlmpipe.data.task import TaskConfig
from vlmpipe.data.task_world import TASKS as WORLD
from vlmpipe.data.task_world import write_tasks
from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import detection_map, segmentation_iou
from vlmpipe.evaluate.tasks import TASKS, EvaluateConfig, choose_samples
from vlmpipe.evaluate.tasks.base import Sample, Scores, keys_of, means
from vlmpipe.evaluate.tasks.captions import score_pairs
from vlmpipe.evaluate.tasks.classes import classify
from vlmpipe.evaluate.tasks.detection import certain
from vlmpipe.evaluate.tasks.fairness import group_gaps
from vlmpipe.evaluate.tasks.options import FairnessConfig
from vlmpipe.evaluate.tasks.questions import predict_answers
from vlmpipe.evaluate.tasks.regions import around, best_blind_mask, by_picture, true_mask
from vlmpipe.evaluate.tasks.statements import consistency
from vlmpipe.models.generate import answer
from vlmpipe.models.generate.rows import with_room
from vlmpipe.train.tasks import TaskSource

CONFIGS = Path(__file__).parents[2] / "configs"
KINDS = {
    "vqa": "questions", "classification": "classes", "statements": "statements", "segmentation": "regions",
    "referring": "regions", "detection": "detection", "generalisation": "combinations",
}
# What an evaluation says of the model itself, and the gate of what it costs.
OF_ALL = {"checkpoint.round_trip", "cost.seconds_ratio", "cost.throughput_ratio", "cost.memory_ratio"}
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


def scored(task: str, samples: list[Sample]) -> Scores:
    """Of a model that says the truth about whatever picture it is shown."""
    of_picture = {sample.image: truth(task, sample) for sample in samples}
    rows = [
        {"right": truth(task, sample), "wrong": of_picture.get(sample.wrong_image, truth(task, sample)), "sure": 1.0}
        for sample in samples
    ]
    return TASKS[task].score(samples, rows)


@pytest.mark.parametrize("task", KINDS)
def test_the_truth_scores_one_and_another_pictures_truth_less(task, world):
    samples = samples_of(world, task)
    assert all(sample.wrong_image != sample.image for sample in samples)
    scores, name = scored(task, samples), FIRST.get(task, "accuracy")
    assert scores.metrics[name] == pytest.approx(1.0)
    assert scores.metrics[f"{name}_wrong_image"] < 0.9
    assert scores.metrics[f"{name}_blind"] < 0.9
    assert scores.metrics["gain_over_blind"] == pytest.approx(1 - scores.metrics[f"{name}_blind"])
    assert set(scores.metrics) == set(scores.n) and set(scores.rows) == {sample.id for sample in samples}
    # A difference of two average precisions is no sum.
    assert set(scores.metrics) - set(scores.counts) == ({"gain_over_blind"} if task == "detection" else set())
    for metric, counts in scores.counts.items():
        assert counts.value == pytest.approx(scores.metrics[metric], abs=1e-12), metric
        assert len(counts.samples) == scores.n[metric] and set(counts.samples) <= set(scores.rows)


def test_the_blind_guess_of_a_chosen_few_is_what_other_pictures_show(world):
    samples = samples_of(world, "detection")
    chosen, shown = choose_samples(samples, EvaluateConfig(limit=2)), {s.image: certain(s.truth) for s in samples}
    assert not {sample.wrong_image for sample in chosen} <= {sample.image for sample in chosen}
    blind = detection_map({s.id: shown[s.wrong_image] for s in chosen}, {s.id: s.truth for s in chosen}).value
    assert scored("detection", chosen).metrics["ap_blind"] == blind < 0.9


def said_of(task: str, world) -> set[str]:
    """The names of a task's metrics, of captioning those of a model of words."""
    if task == "hallucination":
        samples = [Sample(label, label, "", "is it", (label,)) for label in ("yes", "no")]
        return set(TASKS[task].score(samples, [{"right": "yes", "wrong": "no"}] * 2).metrics)
    if task == "compositionality":
        samples = [Sample(str(number), number, 1 - number, "", ("a",), {"group": "g"}, choices=("a", "b"))
                   for number in range(2)]
        return set(TASKS[task].score(samples, [{"right": [1.0, 0.0], "wrong": [1.0, 0.0]}] * 2).metrics)
    if task == "fairness":  # what it says of the other task of configs/task/groups.yaml
        samples = [Sample(str(at), at, 0, "", (), {"size": str(at % 2), "place": str(at % 2)}) for at in range(8)]
        scores = Scores.of({"accuracy": means({sample.id: 1.0 for sample in samples})}, {})
        config = FairnessConfig(("size", "place"), minimum=2)
        gaps = group_gaps("classification", samples, scores, {sample.id: sample.id for sample in samples}, config)
        return {name.removeprefix("fairness.") for name in gaps["metrics"]}
    if task == "retrieval":
        samples = [Sample(str(number), number, (), "", ("a",), truth=(("b",),)) for number in range(2)]
        row = {"image_to_text": [0], "text_to_image": [1], "said": "a"}
        return set(TASKS[task].score(samples, [row] * 2).metrics)
    if task != "captioning":
        return set(scored(task, samples_of(world, task)).metrics)
    samples = [Sample(str(number), number, 1 - number, "", ("a",)) for number in range(2)]
    return set(TASKS[task].score(samples, [{"said": "a", "nll": 1.0, "tokens": 1, "wrong_nll": 2.0}] * 2).metrics)


@pytest.mark.parametrize("choice", sorted(path.stem for path in (CONFIGS / "task").glob("*.yaml")))
def test_gates_ask_for_what_the_evaluation_of_a_task_gives(choice, world):
    params = compose("scenes", [f"task={choice}"], CONFIGS)
    tasks = params["evaluate"]["finetune"]["tasks"]
    given = {f"{task}.{name}" for task in tasks for name in said_of(task, world)} | OF_ALL
    given |= {f"contamination.{task}" for task in tasks if not TASKS[task].packed}
    asked = {rule["metric"] for rule in params["gates"]["finetune"]["rules"].values() if rule}
    assert asked and asked <= given


@pytest.mark.parametrize("record", [ClassRecord("a", "a", "red"), QuestionRecord("a", ("a",), "what is it", ("red",))])
def test_a_model_that_only_matches_is_refused_before_training(record):
    model, processor = joined.make("single_stream", answers=None, statement=None)
    images = np.zeros((1, 3, 32, 32), np.uint8)
    with pytest.raises(UserError, match=r"found a model without heads.language_model, answers and projection; "):
        TaskSource(("a",), [b""], (record,)).lessons(images, model, processor, 1)


def test_a_model_that_only_matches_is_refused_when_asked():
    model, processor = joined.make("single_stream", answers=None, statement=None)
    for ask in (lambda shown: answer(model, processor, shown, ["what is it"]),
                lambda shown: classify(model, processor, shown, ["red"], ["{}"])):
        with pytest.raises(UserError, match="expected one of them to answer questions or name classes"):
            ask(tiny.pictures(1))


def test_what_is_asked_of_one_batch_does_not_shorten_the_next(world):
    model, processor = tiny.make("prefix")
    limit, seen = processor.text_limit, tiny.pictures(3)
    several = Sample("a", ("x", "y", "z"), ("z", "y", "x"), "what color is it", ("red",))
    row = predict_answers(model, processor, [several], [tuple(seen)], [tuple(seen[::-1])], EvaluateConfig())
    assert len(row) == 1 and with_room(model, processor, 3).text_limit < limit == processor.text_limit


def test_consistency_wants_all_of_a_sentence():
    samples = [Sample(str(i), i, i, "s", ("yes",), {"group": str(i // 2)}) for i in range(4)]
    assert consistency(samples, {"0": 1.0, "1": 1.0, "2": 1.0, "3": 0.0}).value == 0.5


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
