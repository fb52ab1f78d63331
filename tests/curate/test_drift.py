"""drift.py: limits by hand, and how often noise crosses them."""

import numpy as np
import pytest

from vlmpipe import shards
from vlmpipe.config import parse
from vlmpipe.curate.drift import Drift, limits, quantiles, read_reference
from vlmpipe.errors import UserError

BEFORE = {
    "metrics": {"annotations.score_p50": 0.3, "download.success_rate": 0.9, "selection.kept": 400,
                "selection.kept_fraction": 0.4, "selection.language.en": 1.0, "bias.breaches": 0},
    "n": {"download.success_rate": 1000, "selection.kept_fraction": 1000},
}


def test_limits_by_hand():
    found = limits(BEFORE, {"selection.kept": 100, "selection.language.de": 0.1}, 1000, Drift())
    assert found["annotations.score_p50"] == pytest.approx((0.25, 0.35))
    wide = 0.1 + 3 * (0.9 * 0.1 * 2 / 1000) ** 0.5
    assert found["download.success_rate"] == pytest.approx((0.9 - wide, 0.9 + wide))
    assert found["selection.language.en"] == pytest.approx((0.9, 1.1))
    assert found["selection.language.de"] == pytest.approx((-0.1, 0.1))  # the champion's data had none
    assert set(found) == {*BEFORE["metrics"], "selection.language.de"} - {"selection.kept", "bias.breaches"}


def test_two_samples_of_one_population_are_no_drift():
    generator = np.random.default_rng(0)
    for before, now in generator.binomial(60, 0.5, (500, 2)):
        reference = {"metrics": {"download.success_rate": before / 60}, "n": {"download.success_rate": 60}}
        low, high = limits(reference, {}, 60, Drift())["download.success_rate"]
        assert low <= now / 60 <= high


def test_quantiles_leave_out_what_is_no_number():
    found = quantiles(np.array([0.1, np.nan, 0.3, 0.2]))
    assert found["annotations.score_p50"] == pytest.approx(0.2) and len(found) == 5
    assert quantiles(np.array([np.nan])) == {}


def test_a_reference_is_the_champions_or_none(tmp_path):
    path = tmp_path / "champion.json"
    assert read_reference(None) is None and read_reference(path) is None
    shards.write_json(path, {"version": "v1", "metrics": {}})
    assert read_reference(path) is None  # from before audits were kept
    shards.write_json(path, {"version": "v1", "audit": BEFORE})
    assert read_reference(path) == ("v1", BEFORE)
    shards.write_json(path, [])
    with pytest.raises(UserError, match="found no 'version'"):
        read_reference(path)


def test_margins_are_more_than_nothing():
    with pytest.raises(UserError, match="scores: found 0"):
        parse(Drift, {"scores": 0}, "audit.expectations.drift")
