"""Hallucination: POPE's numbers by strategy, CHAIR's of captions."""

import pytest

from tests.models import tiny
from vlmpipe.data.task import TaskConfig
from vlmpipe.data.task_world import write_tasks
from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import chair, pope
from vlmpipe.evaluate.tasks import EvaluateConfig, Sample
from vlmpipe.evaluate.tasks.hallucination import Things, predict_polls, read_polls, score_polls
from vlmpipe.evaluate.tasks.resume import fingerprint

VOCABULARY = {"dog": "dog", "puppy": "dog", "cat": "cat"}


def asked(name: str, label: str, strategy: str = "random") -> Sample:
    return Sample(name, name, "other", "Is there a dog in the image?", (label,), {"strategy": strategy})


def captioned(name: str, *present: str) -> Sample:
    return Sample(name, name, "other", "", present, truth=Things(present, VOCABULARY))


def score(said: list[tuple[Sample, str | None]], wrong: str | None = "no"):
    return score_polls([sample for sample, _ in said], [{"right": text, "wrong": wrong} for _, text in said])


def test_popes_numbers_are_the_metrics():
    said = [(asked("a", "yes"), "yes"), (asked("b", "no"), "Yes, there is."), (asked("c", "no"), "No."),
            (asked("d", "yes", "popular"), "no, not there"), (asked("e", "no", "popular"), "no")]
    scores = score(said)
    found = pope({s.id: text for s, text in said}, {s.id: s.answers == ("yes",) for s, _ in said})
    assert {name: scores.metrics[name] for name in found.details} == pytest.approx(found.details)
    assert scores.metrics["accuracy.random"] == pytest.approx(2 / 3) and scores.metrics["accuracy.popular"] == 0.5
    assert scores.metrics["f1.popular"] == 0.0 and scores.metrics["yes_ratio.random"] == pytest.approx(2 / 3)
    assert "precision.popular" not in scores.metrics and "chair.s" not in scores.metrics
    # Always no is right three times of five; so is every answer about the wrong picture here.
    assert scores.metrics["accuracy_blind"] == scores.metrics["accuracy_wrong_image"] == pytest.approx(0.6)
    assert scores.metrics["gain_over_blind"] == pytest.approx(0.0)
    assert scores.n["accuracy.popular"] == 2 and scores.rows["b"]["score"] == 0.0


def test_chairs_numbers_are_the_metrics():
    said = [(captioned("a", "dog"), "A puppy and a cat, and another cat"), (captioned("b", "cat"), "two cats"),
            (captioned("c", "cat"), "nothing")]
    scores = score(said, wrong="a dog")
    found = chair({s.id: text for s, text in said}, {s.id: s.truth.present for s, _ in said}, VOCABULARY)
    assert scores.metrics["chair.s"] == pytest.approx(found.value) == pytest.approx(1 / 3)
    assert scores.metrics["chair.i"] == pytest.approx(found.details["i"]) == 0.5
    assert scores.metrics["chair.s_wrong_image"] == pytest.approx(2 / 3)


def test_captions_that_name_nothing_have_no_number():
    assert score([(captioned("a", "dog"), "hm"), (asked("b", "yes"), "yes")], wrong="hm").metrics.keys() == {
        "accuracy", "yes_ratio", "precision", "recall", "f1", "accuracy_wrong_image", "accuracy_blind",
        "gain_over_blind", *(f"{name}.random" for name in ("accuracy", "yes_ratio", "precision", "recall", "f1")),
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("objects")
    write_tasks(root, 40, 0, tasks=("objects", "questions"))
    return root


@pytest.mark.parametrize("reader", ["pope", "coco_instances"])
def test_the_world_is_asked_by_popes_files_and_by_boxes(world, reader):
    samples = read_polls(world / "objects" / "test", TaskConfig(reader))
    present = {sample.image: sample.truth.present for sample in samples if not sample.question}
    polls = [sample for sample in samples if sample.question]
    assert fingerprint(samples) == fingerprint(read_polls(world / "objects" / "test", TaskConfig(reader)))
    assert {sample.slices["strategy"] for sample in polls} == {"random", "popular", "adversarial"}
    for sample in polls:
        named = sample.question.removeprefix("Is there a").removeprefix("n").strip().removesuffix(" in the image?")
        assert (named in present[sample.image]) == (sample.answers == ("yes",))
    truth = [sample.answers[0] if sample.question else f"a {', a '.join(sample.answers)}" for sample in samples]
    metrics = score_polls(samples, [{"right": said, "wrong": "no"} for said in truth]).metrics
    assert metrics["accuracy"] == metrics["f1"] == metrics["f1.adversarial"] == 1.0
    assert metrics["chair.s"] == metrics["chair.i"] == 0.0 and metrics["accuracy_blind"] == 0.5


def test_synonyms_beside_the_boxes_are_words_too(world):
    file = world / "objects" / "test" / "synonyms.txt"
    file.write_text("red circle, scarlet disc, red dot\nblue star\n")
    samples = read_polls(world / "objects" / "test", TaskConfig("pope"))
    file.unlink()
    words = next(sample.truth.vocabulary for sample in samples if not sample.question)
    assert words["scarlet disc"] == words["red circle"] == "red circle"


def test_things_whose_labels_are_synonyms_are_there(world):
    file = world / "objects" / "test" / "synonyms.txt"
    file.write_text("scarlet disc, red circle\n")
    samples = [sample for sample in read_polls(world / "objects" / "test", TaskConfig("pope")) if not sample.question]
    file.unlink()
    assert any("scarlet disc" in sample.truth.present for sample in samples)
    assert not any("red circle" in sample.truth.present for sample in samples)
    said = [f"a {', a '.join(sample.answers)}".replace("scarlet disc", "red circle") for sample in samples]
    metrics = score_polls(samples, [{"right": text, "wrong": "no"} for text in said]).metrics
    assert metrics["chair.s"] == metrics["chair.i"] == 0.0


def test_other_questions_are_refused(world):
    with pytest.raises(UserError, match="expected yes or no for the task 'hallucination'"):
        read_polls(world / "questions" / "test", TaskConfig("vqav2"))


@pytest.mark.parametrize("kind", ["prefix", "dual"])
def test_questions_and_captions_stand_in_one_batch(kind):
    model, processor = tiny.make(kind)
    batch = [captioned("a", "dog"), asked("b", "yes"), captioned("c", "cat"), asked("d", "no")]
    config = EvaluateConfig(answer_tokens=2, caption_tokens=3)
    rows = predict_polls(model, processor, batch, tiny.pictures(4), tiny.pictures(4, 1), config)
    assert [row["right"] is None for row in rows] == [kind == "dual", False, kind == "dual", False]
    assert score_polls(batch, rows).n["accuracy"] == 2
