"""Judgements and namings against hand-worked cases."""

import numpy as np
import pytest

from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import chair, matching_accuracy, nlvr_consistency, pope, roc_area, says_yes


def test_nlvr_consistency_wants_every_example_of_a_sentence():
    labels = {"a": True, "b": False, "c": True, "d": False}
    result = nlvr_consistency(labels | {"d": True}, labels, {"a": "s", "b": "s", "c": "t", "d": "t"})
    assert result.value == 0.5
    assert result.per_sample == {"s": 1.0, "t": 0.0}
    assert result.details == {"accuracy": 0.75, "sentences": 2}


@pytest.mark.parametrize(
    "predictions, labels, sentences, message",
    [
        ({}, {}, {}, "no samples"),
        ({1: True}, {1: True, 2: True}, {1: 1, 2: 1}, "no prediction for"),
        ({1: True}, {1: True}, {}, "no prediction for"),
        ({1: None}, {1: True}, {1: 1}, "None"),
        ({1: float("nan")}, {1: True}, {1: 1}, "nan"),
        ({1: "yes"}, {1: True}, {1: 1}, "yes"),
    ],
)
def test_nlvr_consistency_refuses(predictions, labels, sentences, message):
    with pytest.raises(UserError, match=message):
        nlvr_consistency(predictions, labels, sentences)


def test_pope_by_hand():
    labels = {1: True, 2: True, 3: True, 4: False, 5: False, 6: False}
    said = {1: "Yes, there is.", 2: True, 3: "No.", 4: "yes", 5: False, 6: "There is not"}
    result = pope(said, labels)
    assert result.details == pytest.approx(
        {"accuracy": 4 / 6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 0.5}
    )
    assert result.value == pytest.approx(4 / 6)
    assert [result.per_sample[i] for i in labels] == [1, 1, 0, 0, 1, 1]


def test_pope_of_a_model_that_always_says_the_same():
    labels = {1: True, 2: False}
    assert pope({1: "yes", 2: "yes"}, labels).details == pytest.approx(
        {"accuracy": 0.5, "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "yes_ratio": 1.0}
    )
    never = {"accuracy": 0.5, "precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.0}
    assert pope({1: "no", 2: "no"}, labels).details == never


@pytest.mark.parametrize(
    ("answer", "yes"),
    [("Yes", True), ("No, not it", False), ("it is not. yes", False), ("Yes. No", True), ("Nope", True), ("", True)],
)
def test_how_pope_reads_an_answer(answer, yes):
    assert says_yes(answer) is yes


@pytest.mark.parametrize(
    "predictions, labels, message",
    [
        ({}, {}, "no samples"),
        ({1: True}, {1: True, 2: False}, "no prediction for"),
        ({1: float("nan")}, {1: True}, "nan"),
        ({1: True}, {1: "no"}, "no"),
        ({1: True}, {1: False}, "no question whose answer is yes"),
    ],
)
def test_pope_refuses(predictions, labels, message):
    with pytest.raises(UserError, match=message):
        pope(predictions, labels)


WORDS = {
    "dog": "dog", "puppy": "dog", "hot dog": "hot dog", "seat": "chair", "toilet": "toilet", "toilet seat": "toilet",
    "knife": "knife", "man": "person", "men": "person",
}


def test_chair_by_hand():
    objects = {"a": ["dog"], "b": {"hot dog", "person"}, "c": ["toilet"], "d": []}
    captions = {
        "a": "Two puppies and a dog, next to a knife and another knife.",
        "b": "Men eat a hot dog.",
        "c": "A toilet seat.",
        "d": "Nothing to see",
    }
    result = chair(captions, objects, WORDS)
    assert result.per_sample == {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0}
    assert result.value == result.details["s"] == 0.25
    assert result.details["mentions"] == 7 and result.details["i"] == pytest.approx(2 / 7)
    assert result.details["wrong"] == {"a": ["knife", "knife"]}


def test_chair_knows_regular_plurals_and_takes_the_longest_phrase():
    result = chair({1: "hot dogs, knives and seats"}, {1: ["hot dog", "knife", "chair"]}, WORDS)
    assert result.value == 0.0 and result.details["mentions"] == 3


@pytest.mark.parametrize(
    "captions, objects, message",
    [
        ({}, {}, "no samples"),
        ({1: "a dog"}, {1: ["dog"], 2: []}, "no prediction for"),
        ({1: None}, {1: ["dog"]}, "None"),
        ({1: "a dog"}, {1: ["puppy"]}, "puppy"),
        ({1: "a picture"}, {1: ["dog"]}, "no word of the vocabulary"),
    ],
)
def test_chair_refuses(captions, objects, message):
    with pytest.raises(UserError, match=message):
        chair(captions, objects, WORDS)


def test_matching_accuracy_by_hand():
    result = matching_accuracy({1: 2.0, 2: 0.5, 3: -1.0}, {1: -2.0, 2: 0.5, 3: -3.0})
    assert result.per_sample == {1: 1.0, 2: 0.5, 3: 0.5} and result.value == pytest.approx(2 / 3)
    # Of nine pairs: 3 below 2.0, 2 and a tie below 0.5, 2 below -1.
    assert result.details["auc"] == pytest.approx((3 + 2.5 + 2) / 9)
    assert result.details["true_positive_rate"] == 2 / 3 and result.details["false_positive_rate"] == 1 / 3


@pytest.mark.parametrize(
    "true, swapped, message",
    [({}, {}, "no samples"), ({1: 0.0}, {2: 0.0}, "no prediction for"), ({1: float("nan")}, {1: 0.0}, "NaN")],
)
def test_matching_accuracy_refuses(true, swapped, message):
    with pytest.raises(UserError, match=message):
        matching_accuracy(true, swapped)


def test_roc_area_of_draws_is_the_auc_of_copies():
    random = np.random.default_rng(0)
    counts, weights = random.normal(size=(10, 2)).round(1), random.integers(0, 3, (20, 10))
    for row, value in zip(weights, roc_area(weights, counts), strict=True):
        drawn = enumerate(np.repeat(np.arange(10), row))
        true, swapped = zip(*[(counts[place, 0], counts[place, 1]) for _, place in drawn], strict=True)
        found = matching_accuracy(dict(enumerate(true)), dict(enumerate(swapped)))
        assert value == pytest.approx(found.details["auc"])
