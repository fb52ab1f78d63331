"""A skew that a filter plants stops the run at the gate, by name; pools without one pass (benchmarks/bias.py)."""

import pytest

from benchmarks.bias import TARGET, draw, repeat, rules, shipped
from vlmpipe.curate import groups


@pytest.fixture(scope="module")
def config():
    return shipped()


def test_a_planted_skew_is_caught_and_the_filter_named(config):
    for one in repeat(0.6, 2, 2500, config):
        assert ("gender", "clip", "woman") in one["named"]
        assert {"gender_rule_gap_lower", "rules"} <= set(one["failed"])
        assert not [name for name in one["failed"] if name.startswith(("language", "url_region"))]


def test_pools_without_a_skew_pass(config):
    """20 pools with some 80 tests each: uncorrected, nearly every one would give an alarm."""
    found = repeat(0.0, 20, 1000, config)
    assert min(one["tests"] for one in found) > 40
    assert sum(bool(one["failed"]) for one in found) <= TARGET * len(found)


def test_every_bound_of_the_gate_was_measured(config):
    """A rule on a metric that does not exist would fail and count as an alarm."""
    assert repeat(0.0, 1, 2500, config)[0]["failed"] == []
    assert len(rules().rules) == 20


def test_the_shipped_lists_tell_the_drawn_captions_apart(config):
    import numpy as np

    pool = draw(400, 0.0, np.random.default_rng(0))
    found = groups.mentions(pool.captions, config.lexicons["gender"], pool.languages)
    women, men = set(found["woman"]), set(found["man"])
    captions = pool.captions.to_pylist()
    for row, caption in enumerate(captions):
        assert (row in women) == caption.startswith(("a woman", "eine Frau", "une femme", "una mujer")), caption
        assert (row in men) == caption.startswith(("a man", "ein Mann", "un homme", "un hombre")), caption
