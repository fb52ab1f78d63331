"""Answers to questions against official numbers and hand-worked cases."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import answerability, normalise_answer, ranked_precision, vqa_accuracy
from vlmpipe.evaluate.metrics.vqa import average_precision

VIZWIZ = Path(__file__).parents[4] / "shared/data/vqa-annotations/vizwiz_val_annotations.json"


def ten(**counts: int) -> list[str]:
    answers = [answer for answer, count in counts.items() for _ in range(count)]
    return answers + [f"other {i}" for i in range(10 - len(answers))]


@pytest.mark.parametrize("matches, score", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_by_number_of_matches(matches, score):
    assert vqa_accuracy({1: "red"}, {1: ten(red=matches)}).value == pytest.approx(score)


@pytest.mark.parametrize(
    "raw, normal",
    [
        ("a/b", "b"),
        ("none", "0"),
        ("t-shirt", "t shirt"),
        ("U.S.A.", "usa"),
        ("3.5", "3.5"),
        ("1,000", "1000"),
        ("1,000 a/b", "1000 ab"),
        ("yes , sir", "yes sir"),
        ("The Ten dogs!", "10 dogs"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("x" + "." * 40, "x" + "." * 8),
        ("  two\tcats ", "2 cats"),
    ],
)
def test_official_normalisation(raw, normal):
    assert normalise_answer(raw) == normal


def test_official_mode_normalises_only_where_answers_differ():
    same, mixed = {1: ["yes"] * 10}, {1: ["yes"] * 9 + ["no"]}
    assert vqa_accuracy({1: "Yes"}, same).value == 0.0
    assert vqa_accuracy({1: "Yes"}, mixed).value == 1.0
    assert vqa_accuracy({1: "Yes"}, same, mode="plain").value == 1.0


def test_official_mode_leaves_out_equal_records_together():
    records = [{"answer": "cat", "answer_confidence": "yes"}] * 9 + [{"answer": "dog", "answer_confidence": "yes"}]
    # Only where "dog" is left out do the nine equal "cat" records stand.
    assert vqa_accuracy({1: "cat"}, {1: records}).value == pytest.approx(0.1)
    numbered = [record | {"answer_id": i} for i, record in enumerate(records)]
    assert vqa_accuracy({1: "cat"}, {1: numbered}).value == 1.0
    assert vqa_accuracy({1: "cat"}, {1: records}, mode="plain").value == 1.0


def test_vqa_accuracy_matches_the_official_evaluator_on_vizwiz():
    if not VIZWIZ.exists():
        pytest.skip(f"no {VIZWIZ}: the real annotations are not part of the project")
    annotations = json.loads(VIZWIZ.read_text())["annotations"]
    answers = {row["question_id"]: row["answers"] for row in annotations}
    texts = {sample: [record["answer"] for record in records] for sample, records in answers.items()}
    first = vqa_accuracy({sample: given[0] for sample, given in texts.items()}, answers)
    majority = vqa_accuracy({sample: Counter(given).most_common(1)[0][0] for sample, given in texts.items()}, answers)
    assert len(first.per_sample) == 4319
    assert round(100 * first.value, 2) == 54.62
    assert round(100 * majority.value, 2) == 67.06


@pytest.mark.parametrize(
    "predictions, answers, message",
    [
        ({}, {}, "no samples"),
        ({1: "a"}, {1: ["a"] * 10, 2: ["b"] * 10}, "no prediction for .*2"),
        ({1: "a", 3: "b"}, {1: ["a"] * 10}, "unknown samples .*3"),
        ({1: None}, {1: ["a"] * 10}, "None"),
        ({1: float("nan")}, {1: ["a"] * 10}, "nan"),
        ({1: "a"}, {1: ["a"]}, "1 answers"),
    ],
)
def test_vqa_accuracy_refuses(predictions, answers, message):
    with pytest.raises(UserError, match=message):
        vqa_accuracy(predictions, answers)


def test_vqa_accuracy_refuses_an_unknown_mode():
    with pytest.raises(UserError, match="offical"):
        vqa_accuracy({1: "a"}, {1: ["a"] * 10}, mode="offical")


def test_answerability_looks_for_what_cannot_be_answered():
    answerable = {"a": 1, "b": 1, "c": 0, "d": 0}
    # By falling doubt: a (no), c (yes), b (no), d (yes). Three of them are doubted by more than half.
    result = answerability({"a": 0.1, "b": 0.4, "c": 0.35, "d": 0.8}, answerable)
    assert result.value == pytest.approx(0.5 * 1 / 2 + 0.5 * 2 / 4)
    assert result.details["f1"] == pytest.approx(2 * 1 / (3 + 2))
    assert answerability({"a": 1, "b": 0.9, "c": 0, "d": 0.2}, answerable).value == 1.0


def test_equal_doubt_comes_in_together():
    # All alike: one step, whose precision is the share of what can't be answered.
    assert answerability(dict.fromkeys(range(4), 0.5), {0: 1, 1: 1, 2: 1, 3: 0}).value == pytest.approx(1 / 4)
    assert answerability(dict.fromkeys(range(4), 0.5), {0: 1, 1: 1, 2: 1, 3: 0}).details["f1"] == 0.0


def test_average_precision_of_the_textbook_case():
    # The example in scikit-learn's documentation of average_precision_score.
    value = average_precision(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
    assert value == pytest.approx(0.8333333333333333)


@pytest.mark.parametrize(
    "probabilities, answerable, message",
    [
        ({}, {}, "no samples"),
        ({1: 0.5}, {1: 1, 2: 0}, "no prediction for .*2"),
        ({1: float("nan")}, {1: 0}, "nan"),
        ({1: 1.5}, {1: 0}, "1.5"),
        ({1: "0.5"}, {1: 0}, "0.5"),
        ({1: 0.5}, {1: 2}, "found 2"),
        ({1: 0.5}, {1: 1}, "no question that can't be answered"),
    ],
)
def test_answerability_refuses(probabilities, answerable, message):
    with pytest.raises(UserError, match=message):
        answerability(probabilities, answerable)


def test_ranked_precision_of_draws_is_the_average_precision_of_copies():
    random = np.random.default_rng(0)
    scores, wanted = random.random(12).round(1), random.random(12) < 0.4
    weights = random.integers(0, 3, (20, 12))
    found = ranked_precision(weights, np.stack([scores, wanted], axis=1))
    for row, value in zip(weights, found, strict=True):
        drawn = np.repeat(np.arange(12), row)
        expected = average_precision(scores[drawn], wanted[drawn]) if wanted[drawn].any() else np.nan
        assert value == pytest.approx(expected, nan_ok=True)
