"""intervals.py against published tables, definitions, coverage and chance."""

import numpy as np
import pytest
from scipy import stats

from vlmpipe.curate import intervals

Z95 = 1.959963984540054


def test_wilson_of_newcombes_table():
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3."""
    low, high = intervals.wilson(np.array([81, 15, 0, 1]), np.array([263, 148, 20, 29]), Z95)
    np.testing.assert_allclose(low, [0.2553, 0.0624, 0.0, 0.0061], atol=5e-5)
    np.testing.assert_allclose(high, [0.3662, 0.1605, 0.1611, 0.1718], atol=5e-5)


def test_difference_of_newcombes_table():
    """Newcombe 1998, "Interval estimation for the difference", table II, method 10: 56/70 - 48/80 and 9/10 - 3/10."""
    low, high = intervals.difference_interval([56, 9], [70, 10], [48, 3], [80, 10], Z95)
    np.testing.assert_allclose(low, [0.0524, 0.1705], atol=5e-5)
    np.testing.assert_allclose(high, [0.3339, 0.8090], atol=5e-5)


def test_ratio_interval_is_where_the_difference_of_scaled_shares_touches_zero():
    """MOVER: theta is a limit of a/b when the MOVER interval of a - theta b ends at 0."""
    a, b = 30 / 100, 60 / 120
    (low_a, high_a), (low_b, high_b) = intervals.wilson(30, 100, Z95), intervals.wilson(60, 120, Z95)
    low, high = intervals.ratio_interval(30, 100, 60, 120, Z95)
    assert a - high * b + np.hypot(high_a - a, high * (b - low_b)) == pytest.approx(0, abs=1e-9)
    assert a - low * b - np.hypot(a - low_a, low * (high_b - b)) == pytest.approx(0, abs=1e-9)
    assert low < 0.6 < high


def test_ratio_interval_at_the_edges():
    low, high = intervals.ratio_interval([0, 10, 10], [50, 10, 50], [25, 10, 0], [50, 10, 50], Z95)
    assert low[0] == 0 and 0 < high[0] < 0.3
    assert low[1] < 1 < high[1] and np.isfinite(high[1])
    assert np.isinf(high[2]) and low[2] > 1


def test_ratio_interval_covers():
    generator = np.random.default_rng(0)
    left, right = generator.binomial(80, 0.4, 4000), generator.binomial(120, 0.5, 4000)
    low, high = intervals.ratio_interval(left, 80, right, 120, Z95)
    assert 0.935 < ((low <= 0.8) & (high >= 0.8)).mean() < 0.965


def test_benjamini_hochberg_by_hand():
    """p * m / rank, made monotone from the largest down."""
    found = intervals.benjamini_hochberg([0.04, 0.01, 0.03, 0.9])
    np.testing.assert_allclose(found, [0.16 / 3, 0.04, 0.16 / 3, 0.9])
    assert intervals.benjamini_hochberg([]).tolist() == []


def test_npmi_known_answers():
    """Of 8 rows: 2 together, 4 left, 2 right -> ln((2/8)/((4/8)(2/8))) / -ln(2/8) = ln 2 / ln 4 = 1/2."""
    assert intervals.npmi(2, 4, 2, 8) == pytest.approx(0.5)
    assert intervals.npmi(2, 4, 4, 8) == pytest.approx(0.0)
    assert intervals.npmi(4, 4, 4, 8) == pytest.approx(1.0)
    assert intervals.npmi(0, 4, 4, 8) == -1.0
    assert intervals.npmi(8, 8, 8, 8) == 1.0
    assert np.isnan(intervals.npmi(0, 0, 4, 8))


def test_exact_limits_are_those_of_the_binomial_tail():
    """At the lower limit 7 or more of 20 have probability 2.5%, at the upper one 7 or fewer."""
    low, high = intervals.exact(np.array([7, 0, 20]), np.array([20, 20, 20]), 0.95)
    assert stats.binom.sf(6, 20, low[0]) == pytest.approx(0.025) == stats.binom.cdf(7, 20, high[0])
    assert (low[1], high[2]) == (0, 1)
    assert high[1] == pytest.approx(1 - 0.025 ** (1 / 20)) and low[2] == pytest.approx(0.025 ** (1 / 20))
    assert [limit.tolist() for limit in intervals.exact([0], [0], 0.95)] == [[0], [1]]


def test_distance_lower_is_below_the_true_distance_nearly_always():
    """Normal samples 1 apart: the distance is 2 Phi(1/2) - 1 = .383; equal ones: 0."""
    generator, true, wrong, claims = np.random.default_rng(0), 2 * stats.norm.cdf(0.5) - 1, 0, 0
    for _ in range(200):
        one, two, three = generator.normal(size=(3, 150))
        wrong += intervals.distance_lower(stats.ks_2samp(one, two + 1).statistic, 150, 150, 0.95) > true
        claims += intervals.distance_lower(stats.ks_2samp(one, three).statistic, 150, 150, 0.95) > 0
    assert wrong == 0 and claims <= 0.05 * 200
    assert intervals.distance_lower(0.383, 4000, 4000, 0.95) > 0.3


def test_npmi_of_cells_is_npmi():
    assert intervals.npmi_of(np.array([[2, 2, 0, 4], [1, 3, 1, 3]])) == pytest.approx([0.5, 0.0])


def test_npmi_shift_without_selection_effect_is_rarely_called():
    """Half of the rows dropped at random, 200 times: p <= .05 in about 5%, and the interval holds 0 as often."""
    generator, cells, called, held = np.random.default_rng(0), np.array([25, 175, 60, 740]), 0, 0
    for _ in range(200):
        kept = generator.binomial(cells, 0.5)
        low, high, p = intervals.npmi_shift(kept, cells - kept, Z95, draws=200)
        called += p <= 0.05
        held += low <= 0 <= high
    assert called <= 0.08 * 200 and held >= 0.92 * 200


def test_npmi_shift_of_a_filter_on_the_pair_is_called():
    low, high, p = intervals.npmi_shift(np.array([10, 160, 55, 700]), np.array([40, 40, 5, 40]), Z95)
    assert high < 0 and p < 1e-5
    before, after = intervals.npmi_of(np.array([50, 200, 60, 740])), intervals.npmi_of(np.array([10, 160, 55, 700]))
    assert low < after - before < high
