"""bias.py against hand-computed tables, planted skew and chance."""

import numpy as np
import pyarrow as pa
import pytest

from vlmpipe.config import parse
from vlmpipe.curate import bias, groups
from vlmpipe.curate.bias import BiasConfig
from vlmpipe.errors import UserError


def members(labels: list[str]) -> groups.Members:
    return groups.values(pa.array(labels))


def measure(labels, outcome, reasons=("rule",), scores=None, **config):
    scores = np.full(len(labels), np.nan, np.float32) if scores is None else scores
    config = BiasConfig(columns=("side",), **config)
    return bias.measure({}, {"side": members(labels)}, {}, np.asarray(outcome), list(reasons), scores, config)


# --- one grouping by hand ----------------------------------------------------------------------------------

@pytest.fixture
def by_hand():
    """a: 100 rows, 40 kept, 50 by size, 10 by score. b: 100 rows, 80 kept, 10 by size, 10 by score. c: 10, 5 kept."""
    labels = ["a"] * 100 + ["b"] * 100 + ["c"] * 10
    outcome = [0] * 40 + [1] * 50 + [2] * 10 + [0] * 80 + [1] * 10 + [2] * 10 + [0] * 5 + [1] * 5
    scores = np.array([0.1] * 100 + [0.2] * 50 + [0.1] * 50 + [0.3] * 10, np.float32)
    found = measure(labels, outcome, ["size", "score"], scores)["groupings"]["side"]
    return found, {group["group"]: group for group in found["groups"]}


def test_group_table_by_hand(by_hand):
    found, groups = by_hand
    a = groups["a"]
    assert (a["total"], a["kept"], a["retention"], a["rest_retention"]) == (100, 40, 0.4, 85 / 110)
    assert a["share_before"] == pytest.approx(100 / 210) and a["share_after"] == pytest.approx(40 / 125)
    assert a["amplification"] == pytest.approx((40 / 125) / (100 / 210))
    assert a["amplification_low"] < a["amplification"] < a["amplification_high"] < 1
    assert a["gap"] == pytest.approx(0.4 - 85 / 110) and a["gap_high"] < 0
    assert found["unknown"] == 0 and found["rows"] == 210


def test_rules_explain_the_whole_gap(by_hand):
    _, groups = by_hand
    for group in groups.values():
        assert sum(rule["excess"] for rule in group["reasons"]) == pytest.approx(-group["gap"])
    worst = max(groups["a"]["reasons"], key=lambda rule: rule["excess"])
    assert worst["reason"] == "size" and worst["rate"] == 0.5 and worst["rest_rate"] == pytest.approx(15 / 110)


def test_small_group_is_reported_and_not_tested(by_hand):
    found, groups = by_hand
    small = groups["c"]
    assert small["retention"] == 0.5 and not small["tested"]
    assert small["p"] is None and small["q"] is None and small["scores"]["q"] is None
    assert all(rule["q"] is None for rule in small["reasons"])
    assert found["impact"]["groups"] == 2


def test_impact_and_steps_by_hand(by_hand):
    found, _ = by_hand
    impact = found["impact"]
    assert impact["ratio"] == pytest.approx(0.5) and (impact["worst"], impact["best"]) == ("a", "b")
    assert impact["low"] < 0.5 < impact["high"] < 0.8 and impact["breach"]
    size, score = found["steps"]
    assert size["reason"] == "size" and size["alone"]["ratio"] == pytest.approx(50 / 90)
    # Of those that reach the second rule 40 of 50 pass in a, 80 of 90 in b.
    assert score["alone"]["ratio"] == pytest.approx((40 / 50) / (80 / 90))
    assert score["cumulative"] == impact
    assert score["retention"] == {"a": 0.4, "b": 0.8, "c": 0.5}


def test_score_gap_by_hand(by_hand):
    _, groups = by_hand
    # a is all 0.1; of the rest 50 of 110 are 0.1.
    assert groups["a"]["scores"]["ks"] == pytest.approx(60 / 110)
    assert groups["a"]["scores"]["mean"] == pytest.approx(0.1)


def test_null_rows_are_no_group():
    labels = ["a"] * 60 + ["b"] * 60 + [None] * 30
    found = measure(labels, [0] * 150)["groupings"]["side"]
    assert found["unknown"] == 30 and [group["share_before"] for group in found["groups"]] == [0.5, 0.5]


def test_associations_before_and_after():
    kept = np.array([True, True, False, False, True, True, True, True])
    inside, rows = np.array([0, 1, 2, 3]), np.array([2, 3])
    (record,) = bias.associations({"gender": {"women": inside}}, {"nurse": rows}, kept, BiasConfig())
    assert record["before"] == pytest.approx(0.5) and record["together_before"] == 2
    assert record["after"] is None and record["together_after"] == 0


@pytest.mark.parametrize("kept", [0, 1])
def test_all_or_nothing_kept_is_no_bias(kept):
    found = measure(["a"] * 60 + ["b"] * 60, [1 - kept] * 120)
    impact = found["groupings"]["side"]["impact"]
    assert not impact["breach"] and impact["high"] == 1 and not found["findings"]


def test_equal_groups_are_not_compared_with_themselves():
    impact = bias.impact(["a", "b", "c"], np.array([50, 50, 50]), np.array([100, 100, 100]), BiasConfig())
    assert impact["ratio"] == 1 and (impact["worst"], impact["best"]) == ("a", "c")


def test_one_group_has_nothing_to_be_compared_with():
    impact = measure(["a"] * 60, [0] * 30 + [1] * 30)["groupings"]["side"]["impact"]
    assert impact == {"groups": 1, "ratio": None, "low": 0.0, "high": 1.0, "worst": None, "best": None, "breach": False}


# --- planted skew, and chance ------------------------------------------------------------------------------

def draw(seed: int, rates: dict[str, float], n: int = 300):
    generator = np.random.default_rng(seed)
    labels = [name for name in rates for _ in range(n)]
    kept = generator.random(len(labels)) < np.repeat(list(rates.values()), n)
    outcome = np.where(kept, 0, generator.integers(1, 4, len(labels)))
    return labels, outcome, generator.normal(0.25, 0.05, len(labels)).astype(np.float32)


def test_planted_skew_is_found_and_named():
    for seed in range(20):
        labels, outcome, scores = draw(seed, {"a": 0.6, "b": 0.6, "c": 0.3, "d": 0.6})
        found = measure(labels, outcome, ["x", "y", "z"], scores)
        impact = found["groupings"]["side"]["impact"]
        assert impact["breach"] and impact["worst"] == "c" and impact["low"] < 0.5 < impact["high"]
        assert found["findings"][0]["group"] == "c"
        assert any((one["group"], one["kind"]) == ("c", "retention") for one in found["findings"])


def test_without_skew_nothing_is_reported():
    """20 repeats with 4 groups, 3 rules and scores: 20 tests each, so uncorrected p <= .05 would fire in most."""
    uncorrected = reported = breaches = 0
    for seed in range(20):
        labels, outcome, scores = draw(seed, dict.fromkeys("abcd", 0.5))
        found = measure(labels, outcome, ["x", "y", "z"], scores)
        groups = found["groupings"]["side"]["groups"]
        p = [record["p"] for group in groups for record in (group, group["scores"], *group["reasons"])]
        assert found["tests"] == len(p) == 20
        uncorrected += min(p) <= 0.05
        reported += bool(found["findings"])
        breaches += found["groupings"]["side"]["impact"]["breach"]
    assert uncorrected >= 5
    assert reported <= 1
    assert breaches == 0


def test_many_small_groups_differ_by_chance_and_do_not_breach():
    """Ten groups of 60 at one rate: the observed min/max is far below four fifths, and says nothing."""
    ratios, claims = [], 0
    for seed in range(200):
        kept = np.random.default_rng(seed).binomial(60, 0.4, 10)
        impact = bias.impact(list("abcdefghij"), kept, np.full(10, 60), BiasConfig())
        ratios.append(impact["ratio"])
        claims += impact["high"] < 1
        assert not impact["breach"]
    assert np.mean(ratios) < 0.7
    assert claims <= 0.05 * 200


def test_impact_interval_covers_at_the_limit():
    """At a true ratio of exactly the limit a breach may be claimed in at most 5% of repeats."""
    breaches = 0
    for seed in range(200):
        kept = np.random.default_rng(seed).binomial(400, [0.4, 0.5, 0.5])
        breaches += bias.impact(list("abc"), kept, np.full(3, 400), BiasConfig())["breach"]
    assert breaches <= 0.05 * 200


# --- config ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "mapping, expected",
    [
        ({"lexicons": {"gender": {"women": []}}}, "lexicons.gender.women"),
        ({"attributes": {"work": ["nurse", " "]}}, "attributes.work"),
        ({"lexicons": {"language": {"x": ["y"]}}}, "'language' is the name of a lexicon too"),
        ({"minimum_group": 0}, "minimum_group: found 0"),
        ({"limit": 1.5}, "limit: found 1.5"),
        ({"lexicon": {}}, "did you mean 'lexicons'"),
    ],
)
def test_config_errors_name_the_key(mapping, expected):
    with pytest.raises(UserError, match=expected):
        parse(BiasConfig, mapping, "params.yaml: audit.bias")
