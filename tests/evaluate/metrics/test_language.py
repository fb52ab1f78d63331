"""Perplexity and calibration against hand-worked cases."""

import math

import pytest

from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import calibration_counts, calibration_error, perplexity
from vlmpipe.evaluate.store import Counts


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


def test_calibration_error_by_hand():
    confidences, correct = {1: 0.9, 2: 0.8, 3: 0.3, 4: 1.0}, {1: True, 2: False, 3: False, 4: 1}
    result = calibration_error(confidences, correct, bins=5)
    # (0.2, 0.4]: one, off by 0.3. (0.6, 0.8]: one, off by 0.8. (0.8, 1.0]: two, off by 0.05.
    assert result.value == pytest.approx((0.3 + 0.8 + 2 * 0.05) / 4)
    assert result.details["max"] == pytest.approx(0.8)
    assert [row["count"] for row in result.details["bins"]] == [1, 1, 2]


def test_a_confidence_on_an_edge_belongs_below():
    confidences = {1: 0.0, 2: 0.5, 3: 0.5000001, 4: 1.0}
    result = calibration_error(confidences, dict.fromkeys(confidences, True), bins=2)
    assert [(row["low"], row["count"]) for row in result.details["bins"]] == [(0.0, 2), (0.5, 2)]


def test_calibration_of_the_calibrated():
    correct = {i: i < 75 for i in range(100)}
    assert calibration_error(dict.fromkeys(correct, 0.75), correct).value == pytest.approx(0.0)
    assert calibration_error(dict.fromkeys(correct, 1.0), correct).value == pytest.approx(0.25)


@pytest.mark.parametrize(
    "confidences, correct, bins, message",
    [
        ({}, {}, 15, "no samples"),
        ({1: 0.5}, {1: True, 2: True}, 15, "no prediction for"),
        ({1: math.nan}, {1: True}, 15, "nan"),
        ({1: -0.1}, {1: True}, 15, "-0.1"),
        ({1: 0.5}, {1: "yes"}, 15, "yes"),
        ({1: 0.5}, {1: True}, 0, "0 bins"),
    ],
)
def test_calibration_error_refuses(confidences, correct, bins, message):
    with pytest.raises(UserError, match=message):
        calibration_error(confidences, correct, bins)


def test_calibration_counts_add_up_to_the_error_of_any_samples():
    confidences, correct = {1: 0.9, 2: 0.8, 3: 0.3, 4: 1.0, 5: 0.85}, {1: True, 2: False, 3: False, 4: 1, 5: False}
    counts = calibration_counts(confidences, correct, bins=5)
    for chosen in ((1, 2, 3, 4, 5), (1, 4), (2,)):
        sure, right = ({key: values[key] for key in chosen} for values in (confidences, correct))
        expected = calibration_error(sure, right, 5)
        assert Counts("calibration", {key: counts[key] for key in chosen}).value == pytest.approx(expected.value)
