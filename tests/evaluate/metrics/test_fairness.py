"""Fairness metrics against hand-worked cases and brute force."""

import math

import numpy as np
import pytest

from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import association, max_skew, ndkl, worst_group

HALVES = {"a": 0.5, "b": 0.5}


def test_max_skew_by_hand():
    result = max_skew(["a", "a", "b", "a"], {"a": 0.25, "b": 0.75}, 3)
    assert result.value == pytest.approx(math.log((2 / 3) / 0.25))
    assert result.details["group"] == "a"
    assert result.details["skew"]["b"] == pytest.approx(math.log((1 / 3) / 0.75))
    assert max_skew(["a", "b"], HALVES, 2).value == 0
    assert max_skew(["a", "b"], HALVES, 1).details["skew"]["b"] == -math.inf


def test_ndkl_by_hand():
    third = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    weights = [1 / math.log2(place + 1) for place in range(1, 5)]
    expected = (weights[0] * math.log(2) + weights[1] * math.log(2) + weights[2] * third) / sum(weights)
    assert ndkl(["a", "a", "b", "b"], HALVES).value == pytest.approx(expected)
    assert ndkl(["a"] * 5, HALVES).value == pytest.approx(math.log(2))
    assert ndkl(["a", "b"] * 4, HALVES).value < ndkl(["a", "a", "b", "b"] * 2, HALVES).value


@pytest.mark.parametrize(
    "ranking, shares, k, message",
    [
        ([], HALVES, 1, "0 results"),
        (["c"], HALVES, 1, "unknown groups"),
        (["a"], {"a": 1.0, "b": 0.0}, 1, "above 0"),
        (["a"], {"a": 0.5, "b": 0.4}, 1, "sum 1"),
        (["a"], HALVES, 2, "k 2 for 1"),
    ],
)
def test_skew_refuses(ranking, shares, k, message):
    with pytest.raises(UserError, match=message):
        max_skew(ranking, shares, k)


def test_association_by_hand_over_all_splits():
    result = association({1: 3.0, 2: 4.0}, {3: 1.0, 4: 2.0})
    assert result.value == pytest.approx(2 / np.std([1, 2, 3, 4], ddof=1))
    assert result.details == {"p": pytest.approx(1 / 6), "p_two_sided": pytest.approx(2 / 6), "splits": 6,
                              "exact": True}
    other = association({1: 1.0, 2: 2.0}, {3: 3.0, 4: 4.0})
    assert other.value == -result.value and other.details["p"] == 1.0


def test_association_by_random_splits_comes_near_the_exact_p_and_is_never_zero():
    random = np.random.default_rng(0)
    first, second = (dict(enumerate(random.normal(mean, size=7))) for mean in (0.7, 0.0))
    exact, drawn = association(first, second), association(first, second, permutations=3000)
    assert exact.details["exact"] and not drawn.details["exact"] and drawn.details["splits"] == 3000
    assert drawn.details["p"] == pytest.approx(exact.details["p"], abs=0.03)
    assert drawn.value == exact.value
    far = association(dict(enumerate([5.0] * 9 + [6.0])), dict(enumerate([0.0] * 10)), permutations=500)
    assert 0 < far.details["p"] < 0.01


@pytest.mark.parametrize(
    "first, second, message",
    [
        ({1: 1.0}, {1: 1.0, 2: 2.0}, "at least 2 each"),
        ({1: 1.0, 2: 1.0}, {1: 1.0, 2: 1.0}, "one value"),
        ({1: 1.0, 2: float("nan")}, {1: 1.0, 2: 2.0}, "NaN"),
    ],
)
def test_association_refuses(first, second, message):
    with pytest.raises(UserError, match=message):
        association(first, second)


def grouped(**of_group):
    scores, groups = {}, {}
    for name, values in of_group.items():
        for number, value in enumerate(values):
            scores[f"{name}{number}"], groups[f"{name}{number}"] = float(value), name
    return scores, groups


def test_the_worst_group_and_the_gap_with_groups_too_small_named():
    scores, groups = grouped(a=[1] * 45 + [0] * 5, b=[1] * 20 + [0] * 20, c=[0] * 5)
    result = worst_group(scores, groups, 30)
    assert result.value == 0.5 and result.details["worst_group"] == "b" and result.details["best_group"] == "a"
    assert result.details["gap"] == pytest.approx(0.4) and result.details["small"] == {"c": 5}
    assert 0 < result.details["gap_low"] < 0.4 < result.details["gap_high"] < 0.8
    assert result.details["low"] < 0.5 < result.details["high"]
    assert result.details["groups"]["a"]["n"] == 50
    assert result == worst_group(scores, groups, 30)


def test_the_gap_of_equal_groups_has_zero_within_its_interval_nearly_always():
    random, found = np.random.default_rng(1), 0
    for seed in range(60):
        scores, groups = grouped(**{name: random.random(60) < 0.7 for name in "abcd"})
        found += worst_group(scores, groups, seed=seed, replicates=400).details["gap_low"] > 0
    assert found <= 6  # 5% of 60 are 3


def test_samples_of_one_picture_make_the_interval_wider():
    scores, groups = grouped(a=[1, 1, 1, 1, 0, 0, 0, 0] * 10, b=[1] * 80)
    clusters = {key: f"{key[0]}{int(key[1:]) // 4}" for key in scores}
    alone, together = (worst_group(scores, groups, clusters=of).details for of in (None, clusters))
    assert together["low"] < alone["low"] and together["gap_high"] > alone["gap_high"]


def test_a_groups_interval_is_one_of_rates_also_where_all_are_right_or_wrong():
    scores, groups = grouped(a=[1] * 40, b=[0] * 40)
    result = worst_group(scores, groups)
    assert result.value == 0 == result.details["low"] < result.details["groups"]["b"]["high"] < 0.25
    assert result.details["groups"]["a"]["high"] == 1 > result.details["groups"]["a"]["low"] > 0.75
    assert 0.5 < result.details["gap_low"] < result.details["gap"] == 1 == result.details["gap_high"]


def test_fewer_than_two_groups_are_no_comparison():
    scores, groups = grouped(a=[1, 0] * 30, b=[1] * 3)
    with pytest.raises(UserError, match="two groups of at least 30"):
        worst_group(scores, groups)
    with pytest.raises(UserError, match="no prediction for"):
        worst_group(scores, {"a0": "a"})
