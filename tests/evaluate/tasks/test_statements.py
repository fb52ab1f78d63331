"""Statements: how a model of words is asked, and what its answers say."""

import pytest

from tests.models import tiny
from vlmpipe.data.records import StatementRecord
from vlmpipe.data.task import WORDS
from vlmpipe.evaluate.tasks import EvaluateConfig, Sample, statements
from vlmpipe.evaluate.tasks.statements import JUDGED, judge, predict_statements, score_statements, verdict
from vlmpipe.models.pretrained.processor import HuggingFaceProcessor
from vlmpipe.train.tasks import pairs_of

SENTENCE = "There are two red circles."


@pytest.mark.parametrize("said, expected", [
    ("yes", "yes"), ("Yes.", "yes"), (" YES, it is", "yes"), ("True", "yes"), ("true.", "yes"), ("no", "no"),
    ("No.", "no"), ("False", "no"), ("**False**", "no"), ("Not true", "no"), ("No, it's not true", "no"),
    ("The statement is true", "yes"), ("nothing", "nothing"), ("", ""), ("blue", "blue"),
])
def test_free_text_is_a_verdict_or_itself(said, expected):
    assert verdict(said) == expected and set(JUDGED.values()) == set(WORDS.values())


def answering(monkeypatch, *texts: str) -> list[str]:
    """The questions that the model is asked from now on; it answers with these texts in turn."""
    asked, left = [], list(texts)

    def answer(model, processor, images, questions, limit):
        asked.extend(questions)
        return [left.pop(0) for _ in questions]

    monkeypatch.setattr(statements, "answer", answer)
    return asked


@pytest.mark.parametrize("theirs", [False, True])
def test_it_is_asked_as_in_training(monkeypatch, theirs):
    model, own = tiny.make("prefix")
    processor = HuggingFaceProcessor(None, None, 32, 64) if theirs else own
    asked = answering(monkeypatch, "Yes.", "no")
    assert judge(model, processor, tiny.pictures(2), [SENTENCE] * 2) == ["yes", "no"]
    (pair,) = pairs_of(StatementRecord("a", ("x",), SENTENCE, True, "a"), {"x": 0}, processor)
    assert asked == [pair.question] * 2 and pair.answer == "yes"
    assert pair.question == (f"{SENTENCE} Is this true? Answer with yes or no." if theirs else SENTENCE)


def test_a_model_that_looks_and_talks_scores(monkeypatch):
    samples = [Sample(label, label, "w", SENTENCE, (label,), {"group": label}) for label in ("yes", "no")]
    answering(monkeypatch, "Yes.", "False.", "No.", "True.")
    model, processor = tiny.make("prefix")
    seen = tiny.pictures(2)
    rows = predict_statements(model, processor, samples, seen, seen, EvaluateConfig())
    metrics = score_statements(samples, rows).metrics
    assert metrics["accuracy"] == metrics["consistency"] == 1.0 and metrics["accuracy_wrong_image"] == 0.0
