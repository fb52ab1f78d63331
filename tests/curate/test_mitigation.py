"""mitigation.py: the pass rates that it reaches, whom it leaves alone, and what it says that it costs."""

import numpy as np
import pyarrow as pa
import pytest

from tests.curate.made_pools import made_rows
from vlmpipe.curate.bias import BiasConfig
from vlmpipe.curate.bias import impact as impact_of
from vlmpipe.curate.filters import SelectConfig, decide
from vlmpipe.errors import UserError

LEXICON = {"woman": ["woman", "women"], "man": {"en": ["man", "men"], "de": ["Mann"]}}


def skewed(rows: int = 600, seed: int = 0):
    """A third each speak of women, men, nobody; women's scores are a standard deviation lower; ten have none."""
    generator = np.random.default_rng(seed)
    who = np.arange(rows) % 3
    scores = generator.normal(0.3, 0.05, rows) - np.where(who == 0, 0.05, 0)
    scores[:10] = np.nan
    words = np.array(["a woman", "a man", "a dog"])[who]
    return who, scores, made_rows(rows, clip_score=scores, caption=list(words), group=list(words))


def selected(rows, **settings):
    """(kept [N], table, the step of the rule)."""
    config = SelectConfig(order=("downloaded", "decoded", "fair"), rules={"fair": {"kind": "fair_score", **settings}})
    decisions, steps = decide(rows, config.ordered())
    decisions.funnel(steps)
    return decisions.code == 0, pa.concat_tables(decisions.tables()).to_pylist(), steps[-1]


@pytest.mark.parametrize("groups", [{"lexicon": LEXICON}, {"by": "group"}])
def test_a_lower_threshold_lifts_the_group_and_drops_nobody_else(groups):
    who, scores, rows = skewed()
    kept, table, step = selected(rows, min=0.3, ratio=0.9, **groups)
    plain = scores >= 0.3
    rates = [kept[who == g].sum() / np.isfinite(scores[who == g]).sum() for g in range(3)]
    assert rates[0] >= 0.9 * max(rates) and plain[who == 0].mean() < 0.5 * plain[who == 1].mean()
    assert (kept | ~plain).all() and (kept == plain)[who > 0].all()
    cost = step["mitigation"]
    assert cost["rows_gained"] == kept.sum() - plain.sum() > 0 and cost["rows_lost"] == 0
    assert cost["kept_before"] == plain.sum() and cost["kept_after"] == kept.sum()
    assert cost["mean_score_before"] == pytest.approx(scores[plain].mean())
    assert cost["mean_score_after"] == pytest.approx(scores[kept].mean())
    assert cost["mean_score_after"] < cost["mean_score_before"]
    assert cost["impact_ratio_before"] < 0.5 and cost["impact_ratio_after"] >= 0.9
    name = "woman" if "lexicon" in groups else "a woman"
    low = cost["groups"][name]["threshold"]
    assert low < 0.3 == step["threshold"]
    for entry, group in zip(table, who):
        if not entry["kept"] and entry["value"] is not None:
            assert entry["threshold"] == (low if group == 0 else 0.3) and entry["value"] < entry["threshold"]
    assert sum(entry["reason"] == "fair:missing" for entry in table) == 10


def test_quotas_lose_rows_and_no_score():
    who, scores, rows = skewed()
    kept, _, step = selected(rows, min=0.3, ratio=0.9, method="quota", by="group")
    plain, cost = scores >= 0.3, step["mitigation"]
    assert (plain | ~kept).all() and (kept == plain)[who == 0].all()
    rates = [kept[who == g].sum() / np.isfinite(scores[who == g]).sum() for g in range(3)]
    assert min(rates) >= 0.9 * max(rates)
    for group in (1, 2):  # the best of each stay
        mine = who == group
        assert np.nanmin(scores[mine & kept]) > np.nanmax(scores[mine & plain & ~kept])
    assert (cost["rows_gained"], cost["rows_lost"]) == (0, plain.sum() - kept.sum())
    assert cost["mean_score_after"] > cost["mean_score_before"]


def test_a_top_fraction_is_that_of_all_and_then_the_groups_are_compared():
    _, scores, rows = skewed()
    kept, _, step = selected(rows, top_fraction=0.3, ratio=1.0, by="group")
    assert step["threshold"] == pytest.approx(np.sort(scores[np.isfinite(scores)])[-177])  # ceil(590 * .3)
    rates = [group["pass_rate_after"] for group in step["mitigation"]["groups"].values()]
    assert min(rates) == pytest.approx(max(rates), abs=1 / 190)
    assert kept.sum() > 177


def test_without_a_skew_and_with_small_groups_nothing_changes():
    scores = np.linspace(0, 1, 200)
    rows = made_rows(200, clip_score=scores, group=["a", "b"] * 98 + ["rare"] * 4)
    for method in ("per_group_threshold", "quota"):
        kept, _, step = selected(rows, min=0.5, by="group", method=method, ratio=0.9)
        assert (kept == (scores >= 0.5)).all() and step["mitigation"]["rows_gained"] == 0
        assert set(step["mitigation"]["groups"]) == {"a", "b"}


def test_a_row_of_two_groups_passes_by_the_milder_threshold():
    who, scores, _ = skewed()
    both = made_rows(600, clip_score=scores, caption=["a woman and a man" if g == 0 else "a man" for g in who])
    kept, _, step = selected(both, min=0.3, ratio=1.0, lexicon={"woman": ["woman"], "man": ["man"]})
    low = step["mitigation"]["groups"]["woman"]["threshold"]
    assert low < step["mitigation"]["groups"]["man"]["threshold"] <= 0.3
    assert (kept[who == 0] == (scores >= low)[who == 0]).all()


def test_the_audit_finds_no_breach_where_it_found_one():
    who, scores, rows = skewed(3000)
    kept, _, _ = selected(rows, min=0.3, by="group", ratio=0.95)
    total = np.bincount(who)
    for chosen, breach in ((scores >= 0.3, True), (kept, False)):
        found = impact_of(["woman", "man", "dog"], np.bincount(who[chosen], minlength=3), total, BiasConfig())
        assert found["breach"] is breach


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"by": "group"}, "found neither min nor top_fraction"),
        ({"min": 0.3}, "found by and lexicon, or neither"),
        ({"min": 0.3, "by": "group", "lexicon": LEXICON}, "found by and lexicon, or neither"),
        ({"min": 0.3, "by": "group", "ratio": 0}, "found ratio 0"),
        ({"min": 0.3, "by": "group", "method": "quotas"}, "'quota'"),
        ({"min": 0.9, "by": "group", "method": "quota"}, "found no row of group 'a woman' that passes"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, expected):
    scores = [0.1, 0.95] * 100
    rows = made_rows(200, clip_score=scores, group=["a woman", "a man"] * 100)
    with pytest.raises(UserError, match=expected):
        selected(rows, **settings)
