"""Statistics of a paired comparison: is the challenger worse than the champion, and was there enough data to tell?

A difference is challenger minus champion on one sample, higher is better. Samples of one image are a cluster: they go
right and wrong together, so clusters are resampled and counted, never samples.

Two kinds of error are held apart. A promotion needs *every* guard rule to show that the drop is within its margin,
which needs no correction (intersection-union test, Berger 1982, Technometrics 24). An alarm needs *any* rule to show
a drop, so its p-values go through `holm`.

Shapes: B replicates, C clusters, N samples, K metrics. Same arrays and seed, same numbers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit
from scipy.stats import binom

from vlmpipe.errors import UserError

REPLICATES = 4000
METHODS = ("bca", "percentile")
# Weights of one block of replicates: 32 MB whatever the number of samples.
_BLOCK = 4_000_000
# Two sums of the same numbers in another order differ by less than this, relatively.
_SAME = 1e-12

Method = Literal["bca", "percentile"]
Statistic = Callable[[np.ndarray], np.ndarray]


# --- Paired cluster bootstrap ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """An estimate and its replicates under resampling of clusters.

    Intervals and p-values are two views of one function: the lower end of `interval(2 * a)` lies above a threshold
    exactly where `p_at_most(threshold)` is below a (up to interpolation between replicates).

    Percentile: the replicates' own quantiles. BCa (Efron 1987, JASA 82): quantiles at
    Phi(z0 + (z0 + z) / (1 - a (z0 + z))) with the median bias z0 and the jackknife's acceleration a. Both take
    z = sqrt(C / (C - 1)) * t(C - 1), without which intervals over few clusters are too narrow (Hesterberg 2015,
    The American Statistician 69, "expanded" percentiles).

    Attributes:
        replicates: [B].
        reach: the largest difference that a sample can show, such as 1 for right or wrong. Without it, clusters that
            all show one difference are taken to prove it; with it, they leave room for the share of other clusters
            that C draws miss (the exact binomial bound 1 - alpha^(1/C), the "rule of three").
    """

    estimate: float
    replicates: np.ndarray
    acceleration: float
    clusters: int
    samples: int
    reach: float | None = None

    @property
    def standard_error(self) -> float:
        return float(np.std(self.replicates, ddof=1))

    @property
    def variance(self) -> float:
        """Of one cluster's share: C times the squared standard error; what `power_check` asks for.

        Where no cluster differs, what C clusters can have missed with a chance of 5%, if `reach` is known.
        """
        if self._constant and self.reach is not None:
            return self.reach**2 * (1 - 0.05 ** (1 / self.clusters))
        return self.clusters * self.standard_error**2

    def interval(self, alpha: float = 0.05, method: Method = "bca") -> tuple[float, float]:
        """Two-sided, alpha / 2 on each side. Its ends are one-sided bounds at alpha / 2."""
        check_share(alpha, "alpha")
        _check_method(method)
        if self._constant:
            return self._interval_of_a_constant(alpha)
        shares = [self._share(tail, method) for tail in (alpha / 2, 1 - alpha / 2)]
        low, high = np.quantile(self.replicates, shares)
        return float(low), float(high)

    def p_at_most(self, threshold: float, method: Method = "bca") -> float:
        """One-sided p of "the difference is at most `threshold`".

        Superiority: threshold 0. Non-inferiority with a margin: threshold -margin.
        """
        _check_method(method)
        if self._constant:
            return self._p_of_a_constant(self.estimate - threshold, room=self.estimate)
        count = np.count_nonzero(self.replicates <= threshold + self._tolerance)
        return self._p((1 + count) / (len(self.replicates) + 1), method)

    def p_at_least(self, threshold: float, method: Method = "bca") -> float:
        """One-sided p of "the difference is at least `threshold`": small where a drop below it is shown."""
        _check_method(method)
        if self._constant:
            return self._p_of_a_constant(threshold - self.estimate, room=-self.estimate)
        count = np.count_nonzero(self.replicates < threshold - self._tolerance)
        return 1 - self._p(count / (len(self.replicates) + 1), method)

    def p_equal(self, threshold: float, method: Method = "bca") -> float:
        """Two-sided p of "the difference is `threshold`"."""
        return min(1.0, 2 * min(self.p_at_most(threshold, method), self.p_at_least(threshold, method)))

    @property
    def _tolerance(self) -> float:
        return _SAME * max(1.0, abs(self.estimate))

    @property
    def _constant(self) -> bool:
        return bool(np.ptp(self.replicates) <= self._tolerance)

    @property
    def _bias(self) -> float:
        """z0: how far the replicates' median lies from the estimate, in standard deviations; ties count half."""
        below = np.count_nonzero(self.replicates < self.estimate - self._tolerance)
        above = np.count_nonzero(self.replicates > self.estimate + self._tolerance)
        return float(ndtri(self._inside((1 + (below - above) / len(self.replicates)) / 2)))

    def _inside(self, share: float) -> float:
        """B replicates say nothing of shares nearer to 0 or 1 than this."""
        least = 1 / (len(self.replicates) + 1)
        return min(max(share, least), 1 - least)

    def _share(self, alpha: float, method: Method) -> float:
        """The share of replicates below the one-sided bound with error alpha."""
        z = math.sqrt(self.clusters / (self.clusters - 1)) * stdtrit(self.clusters - 1, alpha)
        if method == "bca":
            moved = self._bias + z
            z = self._bias + moved / max(1 - self.acceleration * moved, _SAME)
        return float(ndtr(z))

    def _p(self, share: float, method: Method) -> float:
        """The inverse of `_share`."""
        z = ndtri(self._inside(share))
        if method == "bca":
            moved = z - self._bias
            z = moved / max(1 + self.acceleration * moved, _SAME) - self._bias
        return float(stdtr(self.clusters - 1, z * math.sqrt((self.clusters - 1) / self.clusters)))

    def _interval_of_a_constant(self, alpha: float) -> tuple[float, float]:
        if self.reach is None:
            return self.estimate, self.estimate
        unseen = 1 - (alpha / 2) ** (1 / self.clusters)
        low, high = self.estimate + self.reach, self.reach - self.estimate
        return self.estimate - unseen * low, self.estimate + unseen * high

    def _p_of_a_constant(self, distance: float, room: float) -> float:
        """p of "the truth lies `distance` from the estimate", where other clusters may lie `room` + reach from it."""
        if distance <= 0:
            return 1.0
        if self.reach is None:
            return 1 / (len(self.replicates) + 1)
        return (1 - distance / (self.reach + room)) ** self.clusters if distance < self.reach + room else 0.0


def bootstrap_mean(
    differences_N: np.ndarray,
    clusters_N: np.ndarray,
    seed: int,
    replicates: int = REPLICATES,
    reach: float | None = None,
) -> Bootstrap:
    """Mean of paired differences, its clusters (image ids, any type) resampled with replacement.

    Raises:
        UserError: fewer than two clusters, lengths that differ, NaN or infinity.
    """
    return bootstrap_means(np.asarray(differences_N)[:, None], clusters_N, seed, replicates, reach=reach)[0]


def bootstrap_means(
    differences_NK: np.ndarray,
    clusters_N: np.ndarray,
    seed: int,
    replicates: int = REPLICATES,
    members_NK: np.ndarray | None = None,
    reach: float | None = None,
) -> list[Bootstrap]:
    """`bootstrap_mean` for K metrics at once, over the same drawn clusters.

    A replicate is sum_c w_c S_c / sum_c w_c n_c with w ~ Multinomial(C; 1/C, ...), S_c the sum and n_c the number of a
    cluster's samples (Davison, Hinkley 1997, Bootstrap Methods, 3.8).

    Args:
        members_NK: bool, which samples belong to the metric's slice (default: all); the others' differences are not
            read and may be NaN.
    """
    members_NK = np.ones(np.shape(differences_NK), bool) if members_NK is None else np.asarray(members_NK, bool)
    differences_NK = finite(np.where(members_NK, differences_NK, 0.0), "differences")
    codes_N = _codes(clusters_N, len(differences_NK))
    count = int(codes_N.max()) + 1
    sums_CK = _sum_by(codes_N, differences_NK, count)
    sizes_CK = _sum_by(codes_N, members_NK.astype(float), count)
    used_K = np.count_nonzero(sizes_CK, axis=0)
    if used_K.min() < 2:
        raise UserError(f"bootstrap: found {used_K.min()} clusters in a slice; expected at least 2; evaluate more")
    blocks = [(w_BC @ sums_CK, w_BC @ sizes_CK) for w_BC in _draws(count, replicates, seed)]
    sums_BK, sizes_BK = (np.concatenate(parts) for parts in zip(*blocks))
    if not sizes_BK.all():
        raise UserError("bootstrap: found a replicate without a sample of a slice; expected more clusters in it")
    replicates_KB = np.ascontiguousarray((sums_BK / sizes_BK).T)
    totals_K, numbers_K = sums_CK.sum(0), sizes_CK.sum(0)
    without_CK = (totals_K - sums_CK) / (numbers_K - sizes_CK)
    return [
        Bootstrap(
            float(totals_K[k] / numbers_K[k]), replicates_KB[k], _acceleration(without_CK[sizes_CK[:, k] > 0, k]),
            int(used_K[k]), int(numbers_K[k]), reach,
        )
        for k in range(differences_NK.shape[1])
    ]


def bootstrap_corpus(
    statistic: Statistic,
    clusters_N: np.ndarray,
    seed: int,
    replicates: int = REPLICATES,
    reach: float | None = None,
) -> Bootstrap:
    """Any corpus metric's difference (BLEU, F1, retrieval...), recomputed for each draw of clusters.

    Args:
        statistic: from weights [rows, N] (how often each sample was drawn) to the difference of each row [rows], as
            `weights @ counts` makes most corpus metrics cheap; `by_indices` takes a metric of sample indices.

    Raises:
        UserError: fewer than two clusters; a replicate without a finite value.
    """
    codes_N = _codes(clusters_N, len(clusters_N))
    count = int(codes_N.max()) + 1
    blocks = [statistic(w_BC[:, codes_N]) for w_BC in _draws(count, replicates, seed, columns=len(codes_N))]
    replicates_B = finite(np.concatenate(blocks), "replicates of the corpus metric")
    rows = max(1, _BLOCK // len(codes_N))
    without_C = np.concatenate([
        statistic((np.arange(start, min(start + rows, count))[:, None] != codes_N).astype(float))
        for start in range(0, count, rows)
    ])
    without_C = finite(without_C, "corpus metric without one cluster")
    estimate = float(statistic(np.ones((1, len(codes_N))))[0])
    return Bootstrap(estimate, replicates_B, _acceleration(without_C), count, len(codes_N), reach)


def by_indices(metric: Callable[[np.ndarray], float]) -> Statistic:
    """The statistic of `bootstrap_corpus` from a metric of sample indices [n], each as often as it was drawn."""

    def statistic(weights_BN: np.ndarray) -> np.ndarray:
        indices = np.arange(weights_BN.shape[1])
        return np.array([metric(np.repeat(indices, weights.astype(int))) for weights in weights_BN])

    return statistic


def _draws(clusters: int, replicates: int, seed: int, columns: int | None = None) -> Iterator[np.ndarray]:
    """Multinomial weights [rows, C] in blocks, `replicates` rows in all; `columns` is what a caller makes of a row."""
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // max(clusters, columns or 0))
    for start in range(0, replicates, rows):
        number = min(rows, replicates - start)
        drawn = generator.integers(clusters, size=(number, clusters), dtype=np.int32).astype(np.int64)
        drawn += np.arange(number)[:, None] * clusters
        yield np.bincount(drawn.ravel(), minlength=number * clusters).reshape(number, clusters).astype(float)


def _acceleration(without_C: np.ndarray) -> float:
    """a = sum d^3 / (6 (sum d^2)^1.5), d = mean minus the statistic without each cluster (Efron 1987)."""
    d_C = without_C.mean() - without_C
    square = float(d_C @ d_C)
    return float((d_C**3).sum() / (6 * square**1.5)) if square > _SAME**2 else 0.0


def _sum_by(codes_N: np.ndarray, values_NK: np.ndarray, count: int) -> np.ndarray:
    return np.stack([np.bincount(codes_N, column, minlength=count) for column in values_NK.T], axis=1)


def _codes(clusters_N: np.ndarray, samples: int) -> np.ndarray:
    if len(clusters_N) != samples:
        raise UserError(f"bootstrap: found {len(clusters_N)} clusters for {samples} samples; expected one each")
    names, codes_N = np.unique(np.asarray(clusters_N), return_inverse=True)
    if len(names) < 2:
        raise UserError(f"bootstrap: found {len(names)} clusters; expected at least 2; evaluate on more images")
    return codes_N.ravel()


def design_effect(differences_N: np.ndarray, clusters_N: np.ndarray) -> float:
    """By how much clustering multiplies the variance of the mean, and so the samples needed (Kish 1965).

    Variance of the ratio of cluster sums to cluster sizes, linearised, over s^2 / N. 1 where nothing varies.
    """
    differences_N = finite(differences_N, "differences")
    codes_N = _codes(clusters_N, len(differences_N))
    count = int(codes_N.max()) + 1
    residual_C = np.bincount(codes_N, differences_N - differences_N.mean(), minlength=count)
    clustered = count / (count - 1) * float(residual_C @ residual_C) / len(differences_N) ** 2
    independent = differences_N.var(ddof=1) / len(differences_N)
    return float(clustered / independent) if independent > 0 else 1.0


# --- Right or wrong, and families of tests -----------------------------------------------------------------


@dataclass(frozen=True)
class McNemar:
    """`lost`: samples that only the champion had right; `won`: only the challenger."""

    lost: int
    won: int
    p: float


def mcnemar(
    champion_N: np.ndarray,
    challenger_N: np.ndarray,
    alternative: Literal["two-sided", "worse", "better"] = "two-sided",
    mid_p: bool = False,
) -> McNemar:
    """Exact McNemar test on right/wrong pairs: lost ~ Binomial(lost + won, 1/2) if both are equally good.

    `worse` tests whether the challenger lost more than chance. `mid_p` counts the observed table half: less
    conservative, and its error rate still close to nominal (Fagerland et al. 2013, BMC Med. Res. Methodology 13).
    Samples must be independent: one to a cluster; otherwise use `bootstrap_mean`.
    """
    champion_N, challenger_N = (np.asarray(right, bool) for right in (champion_N, challenger_N))
    if champion_N.shape != challenger_N.shape or not len(champion_N):
        raise UserError(f"mcnemar: found {len(champion_N)} and {len(challenger_N)} samples; expected the same, some")
    lost, won = int((champion_N & ~challenger_N).sum()), int((challenger_N & ~champion_N).sum())
    extreme = {"worse": lost, "better": won, "two-sided": max(lost, won)}
    if alternative not in extreme:
        raise UserError(f"mcnemar: found alternative '{alternative}'; expected one of {', '.join(extreme)}")
    sides = 2 if alternative == "two-sided" else 1
    seen, total = extreme[alternative], lost + won
    tail = sides * binom.sf(seen - 1, total, 0.5) - mid_p * sides / 2 * binom.pmf(seen, total, 0.5)
    return McNemar(lost, won, float(min(1.0, tail)))


def holm(p_K: Sequence[float], alpha: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Adjusted p-values and which hypotheses are rejected, in the order given (Holm 1979, Scand. J. Statist. 6).

    The i-th smallest p of K is multiplied by K - i + 1, and is at least its predecessor: the chance of any false
    rejection is at most alpha whatever the tests' dependence.
    """
    check_share(alpha, "alpha")
    p_K = finite(p_K, "p-values")
    if p_K.min() < 0 or p_K.max() > 1:
        raise UserError(f"holm: found p-values from {p_K.min():g} to {p_K.max():g}; expected 0 to 1")
    order = np.argsort(p_K, kind="stable")
    stepped = np.maximum.accumulate(p_K[order] * np.arange(len(p_K), 0, -1))
    adjusted_K = np.empty(len(p_K))
    adjusted_K[order] = np.minimum(stepped, 1)
    return adjusted_K, adjusted_K <= alpha


# --- Checks -----------------------------------------------------------------------------------------------


def finite(values: object, what: str) -> np.ndarray:
    """As float64; raises `UserError` for NaN, infinity or nothing at all."""
    array = np.asarray(values, float)
    odd = array.size - int(np.isfinite(array).sum())
    if odd or not array.size:
        raise UserError(f"{what}: found {odd} of {array.size} NaN or infinite; expected finite numbers, at least one")
    return array


def check_share(share: float, what: str) -> None:
    """Raise `UserError` unless 0 < share < 1."""
    if not 0 < share < 1:
        raise UserError(f"{what}: found {share}; expected a number between 0 and 1")


def _check_method(method: str) -> None:
    if method not in METHODS:
        raise UserError(f"bootstrap: found method '{method}'; expected one of {', '.join(METHODS)}")
