"""Power by hand and by simulation, and the truth table of the verdict."""

import math

import numpy as np
import pytest
import scipy.stats

from vlmpipe.errors import UserError
from vlmpipe.evaluate.power import Power, assumed_variance, decide, decide_by_p, mcnemar_power, power_check
from vlmpipe.evaluate.statistics import bootstrap_mean

FEW = Power(effect=0.02, clusters=100, samples=400, power=0.3, target=0.8, clusters_needed=500, samples_needed=2000)
MANY = Power(effect=0.02, clusters=900, samples=3600, power=0.95, target=0.8, clusters_needed=500, samples_needed=2000)


def test_power_by_hand():
    """(1.6449 + 0.8416)^2 / 0.5^2 = 24.73, and 1.6449^2 / 2 = 1.35."""
    found = power_check(variance=1, clusters=10, samples=40, effect=0.5)
    assert (found.clusters_needed, found.samples_needed, found.enough) == (27, 108, False)
    assert found.power < 0.5
    again = power_check(variance=1, clusters=27, samples=108, effect=0.5)
    assert again.enough and 0.8 <= again.power < 0.82
    assert power_check(1, 10, 40, 0.5, alpha=0.05 / 8).clusters_needed > 40
    assert power_check(0, 10, 10, 0.5).power == 1
    assert power_check(1, 10, 40, 0.5, reach=1) == power_check(1 + 0.5 / 4, 10, 40, 0.5)


def test_the_number_named_gives_the_power_promised():
    """5,000 t-tests on as many clusters of three samples as the check names from an assumed correlation of 0.3."""
    variance = assumed_variance(deviation=1, size=3, correlation=0.3)
    clusters = power_check(variance, 10, 30, effect=0.2).clusters_needed
    generator = np.random.default_rng(0)
    common = math.sqrt(0.3) * generator.normal(size=(5000, clusters, 1))
    means = (common + math.sqrt(0.7) * generator.normal(size=(5000, clusters, 3))).mean(2) - 0.2
    assert means.var() == pytest.approx(variance, rel=0.02)
    shown = scipy.stats.ttest_1samp(means, 0, axis=1, alternative="less").pvalue <= 0.05
    assert shown.mean() == pytest.approx(0.8, abs=0.02)


def test_bootstrap_and_power_check_agree_on_the_variance():
    generator = np.random.default_rng(1)
    codes = np.repeat(np.arange(400), 3)
    differences = math.sqrt(0.3) * generator.normal(size=400)[codes] + math.sqrt(0.7) * generator.normal(size=1200)
    found = bootstrap_mean(differences, codes, 0, 2000)
    assert found.variance == pytest.approx(assumed_variance(1, 3, 0.3), rel=0.15)


@pytest.mark.parametrize("mid_p", [False, True])
def test_mcnemar_power_is_the_share_of_rejections(mid_p):
    found = mcnemar_power(discordance=0.2, drop=0.06, samples=150, mid_p=mid_p)
    generator = np.random.default_rng(2)
    for samples, power in ((150, found.power), (found.samples_needed, 0.8)):
        lost, won, _ = generator.multinomial(samples, [0.13, 0.07, 0.8], 40000).T
        p = scipy.stats.binom.sf(lost - 1, lost + won, 0.5)
        p -= mid_p * scipy.stats.binom.pmf(lost, lost + won, 0.5) / 2
        assert np.mean(p <= 0.05) == pytest.approx(power, abs=0.01)
    asymptotic = (1.6449 * 0.2**0.5 + 0.8416 * (0.2 - 0.06**2) ** 0.5) ** 2 / 0.06**2
    assert asymptotic * 0.97 < found.samples_needed < asymptotic * 1.15


@pytest.mark.parametrize(
    ("low", "high", "floor", "verdict"),
    [
        (-0.01, 0.03, 0.4, "PASS"),
        (-0.08, -0.03, 0.4, "FAIL"),
        (-0.05, 0.01, 0.4, "INCONCLUSIVE"),
        (-0.02, 0.01, 0.4, "INCONCLUSIVE"),  # the bound itself is not above it
        (-0.08, -0.02, 0.4, "INCONCLUSIVE"),
        (-0.01, 0.03, 0.6, "FAIL"),
        (-0.08, -0.03, 0.6, "FAIL"),
        (-0.05, 0.01, 0.6, "FAIL"),
    ],
)
def test_truth_table(low, high, floor, verdict):
    """By interval and by p-values that say the same; the challenger's value is 0.5 and the margin 0.02."""
    found = decide((low + high) / 2, (low, high), 0.02, FEW, value=0.5, floor=floor)
    p_within, p_beyond = 0.05 if low > -0.02 else 0.06, 0.05 if high < -0.02 else 0.06
    assert decide_by_p((low + high) / 2, p_within, p_beyond, 0.02, FEW, value=0.5, floor=floor) == found
    assert found.verdict == verdict
    assert found.samples_needed == (2000 if verdict == "INCONCLUSIVE" else None)


def test_a_gain_is_asked_for_with_a_margin_of_nothing():
    assert decide(0.02, (0.001, 0.04), 0.0, FEW).verdict == "PASS"
    assert decide(0.01, (-0.01, 0.03), 0.0, FEW).verdict == "INCONCLUSIVE"
    assert decide(-0.02, (-0.03, -0.01), 0.0, FEW).verdict == "FAIL"


def test_enough_samples_and_still_near_the_bound_asks_for_what_tells_the_estimate_from_it():
    """Half the planned effect away from the bound takes four times as many; on the bound, no number helps."""
    assert decide(-0.01, (-0.021, 0.0), 0.02, MANY).samples_needed == pytest.approx(8000, abs=1)
    assert decide(-0.02, (-0.03, -0.01), 0.02, MANY).samples_needed is None


def test_reasons_say_what_was_found():
    assert "0.5 is below the floor 0.6" in decide(0, (0, 0), 0.02, FEW, 0.5, 0.6).reason
    assert "400 samples show a drop of 0.02 with probability 0.30, not 0.8" in decide(0, (-1, 1), 0.02, FEW).reason
    assert "400 samples show a gain of 0.02 with probability 0.30, not 0.8" in decide(0, (-1, 1), -0.02, FEW).reason
    assert "-0.05 shown to be worse than a drop of 0.02" in decide(-0.05, (-0.06, -0.04), 0.02, FEW).reason


def test_numbers_that_decide_nothing_are_refused():
    for estimate, interval in ((math.nan, (0, 1)), (0, (math.nan, 1)), (0, (1, -1))):
        with pytest.raises(UserError, match="expected numbers in order"):
            decide(estimate, interval, 0.02, FEW)
    with pytest.raises(UserError, match="p from 0 to 1"):
        decide_by_p(0, math.nan, 0.5, 0.02, FEW)
    assert decide(0, (0, 0), 0.02, FEW, value=math.nan, floor=0.5).verdict == "FAIL"
    assert decide(0, (0, 0), 0.02, FEW, floor=0.5).verdict == "FAIL"
    with pytest.raises(UserError, match="positive"):
        power_check(1, 10, 10, effect=0)
    with pytest.raises(UserError, match="variance nan"):
        power_check(math.nan, 10, 10, effect=0.1)
    with pytest.raises(UserError, match=r"discordance 0\.05"):
        mcnemar_power(0.05, 0.1, 100)
    with pytest.raises(UserError, match="target power"):
        power_check(1, 10, 10, 0.1, target=1)
