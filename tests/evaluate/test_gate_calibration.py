"""The simulation of benchmarks/gate_calibration.py: drops as planted, few false alarms, few data no verdict."""

import numpy as np
import pytest

from benchmarks.gate_calibration import MARGINS, draw, measured, simulate


@pytest.mark.parametrize("name", ["accuracy", "count", "night", "recall", "caption"])
def test_a_drop_is_as_large_as_planted(name):
    """On 40,000 images, to within six standard errors of independent samples."""
    index, margin = list(MARGINS).index(name), MARGINS[name]
    drop = draw(40_000, {name: margin}, np.random.default_rng(0))
    members = drop.members_NK[:, index]
    values = drop.differences_NK[members, index]
    assert values.mean() == pytest.approx(-margin, abs=6 * values.std() / len(values) ** 0.5)


def test_equal_models_seldom_alarm_and_few_images_settle_nothing():
    found = simulate(120, {}, 40, 400, "A/A")
    assert sum(one.worse_holm.any() for one in found) <= 4
    assert sum(one.worse.any() for one in found) > sum(one.worse_holm.any() for one in found)
    assert all(one.verdict == "INCONCLUSIVE" for one in found)
    assert sum(one.plain.any() for one in found) > 20


def test_a_large_drop_is_shown_by_its_rule():
    index = list(MARGINS).index("caption")
    found = simulate(300, {"caption": 0.4}, 10, 400, "drop")
    assert all(one.worse_holm[index] and one.verdict == "FAIL" for one in found)


def test_rules_and_bootstraps_stand_in_one_order():
    one = draw(50, {}, np.random.default_rng(1))
    assert len(measured(one, 0, 50)) == len(MARGINS)
    both_right = np.full(50, True)
    perfect = one.f1(np.ones((1, 50)))
    assert perfect.shape == (1,)
    same = type(one)(one.images_N, one.differences_NK, one.members_NK, both_right, np.stack([both_right] * 2))
    assert same.f1(np.ones((1, 50))) == [0]
