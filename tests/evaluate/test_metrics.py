"""Metrics against official numbers and hand-worked cases."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import normalise_answer, perplexity, retrieval_recall, vqa_accuracy

VIZWIZ = Path(__file__).parents[3] / "shared/data/vqa-annotations/vizwiz_val_annotations.json"


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


def test_retrieval_recall_by_hand():
    # Image 0 has captions 0 and 1, image 1 caption 2. Caption 1 is nearer to the wrong image.
    similarity = np.array([[0.9, 0.1, 0.2], [0.3, 0.8, 0.4]])
    result = retrieval_recall(similarity, [0, 0, 1], ks=(1, 2))
    assert result.details == pytest.approx(
        {"image_to_text@1": 0.5, "image_to_text@2": 1.0, "text_to_image@1": 2 / 3, "text_to_image@2": 1.0}
    )
    assert result.per_sample == {0: 1.0, 1: 0.0, 2: 1.0}
    assert result.value == pytest.approx((0.5 + 1 + 2 / 3 + 1) / 4)


def test_constant_similarity_earns_nothing():
    result = retrieval_recall(np.ones((4, 4)), range(4), ks=(1, 3))
    assert result.value == 0.0


@pytest.mark.parametrize(
    "similarity, images, message",
    [
        (np.zeros((0, 0)), [], "shape"),
        (np.ones((2, 3)), [0, 1], "2 captions"),
        (np.array([[np.nan, 1.0], [0.0, 1.0]]), [0, 1], "NaN"),
        (np.ones((2, 2)), [0, 0], "without its partner"),
    ],
)
def test_retrieval_recall_refuses(similarity, images, message):
    with pytest.raises(UserError, match=message):
        retrieval_recall(similarity, images)


def test_perplexity_weighs_by_tokens():
    result = perplexity({"a": 2 * math.log(4), "b": math.log(2)}, {"a": 2, "b": 1})
    assert result.value == pytest.approx(math.exp((2 * math.log(4) + math.log(2)) / 3))
    assert result.per_sample == pytest.approx({"a": 4.0, "b": 2.0})


@pytest.mark.parametrize(
    "nll, tokens",
    [({}, {}), ({"a": 1.0}, {"b": 1}), ({"a": math.nan}, {"a": 1}), ({"a": 1.0}, {"a": 0}), ({"a": 1e6}, {"a": 1})],
)
def test_perplexity_refuses(nll, tokens):
    with pytest.raises(UserError, match="perplexity"):
        perplexity(nll, tokens)
