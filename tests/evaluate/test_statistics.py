"""Bootstrap, McNemar and Holm on numbers whose answer is known."""

import numpy as np
import pytest
import scipy.stats

from vlmpipe.errors import UserError
from vlmpipe.evaluate import statistics
from vlmpipe.evaluate.statistics import (
    bootstrap_corpus,
    bootstrap_mean,
    bootstrap_means,
    by_indices,
    design_effect,
    holm,
    mcnemar,
)


def pairs(lost: int, won: int, same: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong for the champion and the challenger."""
    champion = np.repeat([True, False, True, False], [lost, won, same, same])
    return champion, np.repeat([False, True, True, False], [lost, won, same, same])


def correlated(clusters: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Differences of mean 0 in clusters of one to five, half of their variance common to the cluster."""
    codes = np.repeat(np.arange(clusters), generator.integers(1, 6, clusters))
    return generator.normal(size=clusters)[codes] + generator.normal(size=len(codes)), codes


@pytest.mark.parametrize(("lost", "won"), [(1, 7), (16, 6), (4, 4), (0, 5), (0, 0), (300, 250)])
def test_mcnemar_is_the_binomial_test(lost, won):
    for alternative, side in (("two-sided", "two-sided"), ("worse", "greater"), ("better", "less")):
        found = mcnemar(*pairs(lost, won), alternative)
        expected = scipy.stats.binomtest(lost, lost + won, 0.5, side).pvalue if lost + won else 1.0
        assert (found.lost, found.won) == (lost, won)
        assert found.p == pytest.approx(expected)


def test_mid_p_counts_the_observed_table_half():
    """1 against 7 of 8: 2 * 9 / 256 exactly, less 8 / 256 (the example of Fagerland et al. 2013: 0.0703, 0.0391)."""
    assert mcnemar(*pairs(1, 7)).p == pytest.approx(18 / 256)
    assert mcnemar(*pairs(1, 7), mid_p=True).p == pytest.approx(10 / 256)
    assert mcnemar(*pairs(7, 1), "worse", mid_p=True).p == pytest.approx(5 / 256)
    assert mcnemar(*pairs(4, 4), mid_p=True).p == pytest.approx(1)


def test_holm_by_hand():
    """Sorted: 4 x 0.005, 3 x 0.01, 2 x 0.03, then 1 x 0.04 raised to its predecessor."""
    adjusted, rejected = holm([0.01, 0.04, 0.03, 0.005])
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert rejected.tolist() == [True, False, False, True]
    assert holm([0.5, 0.9])[0].tolist() == [1, 1]


@pytest.mark.parametrize("method", statistics.METHODS)
def test_intervals_cover_as_often_as_they_say(method):
    """90% intervals of the mean of 25 clusters cover 0 in 90% of 1,000 data sets (standard error 1 point)."""
    covered = 0
    for seed, generator in enumerate(np.random.default_rng(11).spawn(1000)):
        low, high = bootstrap_mean(*correlated(25, generator), seed, 400).interval(0.1, method)
        covered += low < 0 < high
    assert 0.87 <= covered / 1000 <= 0.93


def test_copies_in_a_cluster_do_not_narrow_the_interval():
    differences = np.random.default_rng(0).normal(size=50)
    once = bootstrap_mean(differences, np.arange(50), 1)
    copied = bootstrap_mean(np.repeat(differences, 4), np.repeat(np.arange(50), 4), 1)
    assert copied.interval() == pytest.approx(once.interval())
    low, high = bootstrap_mean(np.repeat(differences, 4), np.arange(200), 1).interval()
    assert (high - low) / np.diff(once.interval()) == pytest.approx(0.5, abs=0.05)
    assert design_effect(np.repeat(differences, 4), np.repeat(np.arange(50), 4)) == pytest.approx(199 / 49)
    assert design_effect(differences, np.arange(50)) == pytest.approx(1)


def test_bca_agrees_with_scipy_on_skewed_data():
    differences = np.random.default_rng(3).lognormal(sigma=1, size=300)
    found = bootstrap_mean(differences, np.arange(300), 1, 20000)
    expected = scipy.stats.bootstrap((differences,), np.mean, n_resamples=5000, rng=2).confidence_interval
    assert found.interval() == pytest.approx(tuple(expected), abs=0.03)
    low, high = found.interval(method="percentile")
    assert found.interval()[0] > low + 0.005 and found.interval()[1] > high + 0.01  # skewed to the right


def test_standard_error_is_that_of_the_mean():
    differences = np.random.default_rng(5).normal(2, 3, 400)
    found = bootstrap_mean(differences, np.arange(400), 1, 20000)
    assert found.estimate == pytest.approx(differences.mean())
    assert found.standard_error == pytest.approx(differences.std() / 20, rel=0.03)
    assert found.variance == pytest.approx(400 * found.standard_error**2)


@pytest.mark.parametrize("method", statistics.METHODS)
def test_p_values_are_the_intervals_turned_round(method):
    found = bootstrap_mean(*correlated(80, np.random.default_rng(1)), 3, 20000)
    low, high = found.interval(0.1, method)
    assert found.p_at_most(low, method) == pytest.approx(0.05, abs=0.002)
    assert found.p_at_least(high, method) == pytest.approx(0.05, abs=0.002)
    assert found.p_equal(low, method) == pytest.approx(0.1, abs=0.004)
    assert found.p_at_most(low - 0.5, method) < 0.01 < 0.99 < found.p_at_most(high + 0.5, method)


def test_p_is_that_of_the_t_test_for_few_normal_clusters():
    differences = np.random.default_rng(2).normal(0.5, 1, 12)
    expected = scipy.stats.ttest_1samp(differences, 0, alternative="greater").pvalue
    found = bootstrap_mean(differences, np.arange(12), 1, 50000).p_at_most(0, "percentile")
    assert found == pytest.approx(expected, rel=0.25)


def test_a_corpus_metric_over_indices_is_the_mean_when_it_is_the_mean(monkeypatch):
    differences, codes = correlated(20, np.random.default_rng(4))
    mean = bootstrap_mean(differences, codes, 9, 200)
    corpus = bootstrap_corpus(by_indices(lambda indices: differences[indices].mean()), codes, 9, 200)
    assert corpus.replicates == pytest.approx(mean.replicates)
    assert (corpus.estimate, corpus.acceleration) == pytest.approx((mean.estimate, mean.acceleration))
    monkeypatch.setattr(statistics, "_BLOCK", 100)  # memory bounds the blocks, never the numbers
    assert bootstrap_mean(differences, codes, 9, 200).replicates == pytest.approx(mean.replicates)
    assert bootstrap_corpus(by_indices(lambda indices: differences[indices].mean()), codes, 9, 200).interval() \
        == pytest.approx(corpus.interval())


def test_a_slice_is_its_own_samples_only():
    """Samples of other slices change nothing; clusters without a sample of the slice are not counted."""
    differences = np.array([1.0, 0, -1, 0, 1, 1, 5, 5])
    clusters = np.array(["a", "b", "c", "d", "e", "a", "b", "f"])
    members = np.stack([np.arange(8) < 6, np.ones(8, bool)], axis=1)
    part, whole = bootstrap_means(np.stack([differences] * 2, 1), clusters, 0, 500, members)
    other = np.where(members[:, 0], differences, np.nan)
    again, _ = bootstrap_means(np.stack([other, differences], 1), clusters, 0, 500, members)
    assert (part.estimate, part.clusters, part.samples) == (pytest.approx(2 / 6), 5, 6)
    assert (whole.estimate, whole.clusters, whole.samples) == (12 / 8, 6, 8)
    assert np.array_equal(part.replicates, again.replicates) and part.acceleration == again.acceleration


def test_equal_models_prove_only_what_their_number_can():
    """300 images without a difference: the drop is under 1 - 0.05^(1/300), 1% ("rule of three"); 20 prove 14%."""
    for images, bound in ((300, 0.00994), (20, 0.1391)):
        found = bootstrap_mean(np.zeros(images), np.arange(images), 0, 100, reach=1)
        assert found.interval(0.1) == pytest.approx((-bound, bound), abs=1e-4)
        assert found.p_at_most(-bound) == pytest.approx(0.05, abs=1e-3)
        assert found.p_at_least(0) == found.p_at_most(0) == 1
        assert found.variance == pytest.approx(bound, abs=1e-4)
    trusting = bootstrap_mean(np.full(20, 0.1), np.arange(20), 0, 100)
    assert trusting.interval() == pytest.approx((0.1, 0.1))
    assert trusting.p_at_most(0) == pytest.approx(1 / 101)
    assert bootstrap_mean(np.full(20, -1.0), np.arange(20), 0, 100, reach=1).p_at_most(-1.5) == 0


def test_what_cannot_be_compared_is_refused():
    for differences, clusters, words in (
        ([0.1, np.nan], [1, 2], "1 of 2 NaN"),
        ([0.1, 0.2], [1, 1], "found 1 clusters"),
        ([0.1, 0.2], [1], "1 clusters for 2 samples"),
    ):
        with pytest.raises(UserError, match=words):
            bootstrap_mean(np.array(differences), np.array(clusters), 0, 10)
    fine = bootstrap_mean(np.array([0.1, 0.2, 0.4]), np.arange(3), 0, 50)
    with pytest.raises(UserError, match="method 'bc'"):
        fine.interval(0.05, "bc")
    with pytest.raises(UserError, match="alpha"):
        fine.interval(0)
    with pytest.raises(UserError, match="replicates of the corpus metric"):
        bootstrap_corpus(lambda weights: np.full(len(weights), np.nan), np.arange(3), 0, 10)
    with pytest.raises(UserError, match="p-values"):
        holm([0.1, np.nan])
    with pytest.raises(UserError, match="expected 0 to 1"):
        holm([0.1, 1.2])
    with pytest.raises(UserError, match="2 and 3 samples"):
        mcnemar(np.ones(2), np.ones(3))
    with pytest.raises(UserError, match="alternative 'less'"):
        mcnemar(np.ones(2), np.ones(2), "less")
