"""Intervals and tests behind the audit's claims: shares, their difference and ratio, association, many tests at once.

All take numbers or arrays alike. `z` is the normal quantile of a two-sided interval (`normal`).
"""

from collections.abc import Sequence

import numpy as np
from scipy import stats

Interval = tuple[np.ndarray, np.ndarray]


def normal(confidence: float, comparisons: int = 1) -> float:
    """z of a two-sided interval; Bonferroni over `comparisons` intervals that must hold together."""
    return float(stats.norm.isf((1 - confidence) / 2 / comparisons))


def share(part, whole) -> np.ndarray:
    return np.asarray(part, float) / np.maximum(np.asarray(whole, float), 1)


def exact(kept, total, confidence: float) -> Interval:
    """Exact interval of a share (Clopper and Pearson 1934); (0, 1) where total is 0."""
    kept, total = np.asarray(kept, float), np.asarray(total, float)
    tail = (1 - confidence) / 2
    with np.errstate(invalid="ignore"):
        low = np.where(kept > 0, stats.beta.ppf(tail, kept, total - kept + 1), 0.0)
        high = np.where(kept < total, stats.beta.isf(tail, kept + 1, total - kept), 1.0)
    return low, high


def wilson(kept, total, z: float) -> Interval:
    """Score interval of a share (Wilson 1927); (0, 1) where total is 0."""
    kept, total = np.asarray(kept, float), np.asarray(total, float)
    n = np.maximum(total, 1)
    part, spread = kept / n, z * z / n
    middle = (part + spread / 2) / (1 + spread)
    half = np.sqrt(spread * (part * (1 - part) + spread / 4)) / (1 + spread)
    # The formula gives exactly 0 and 1 at the ends, floats only nearly.
    low = np.where(kept == 0, 0.0, middle - half)
    high = np.where(kept == total, 1.0, middle + half)
    return low, high


def difference_interval(kept_1, total_1, kept_2, total_2, z: float) -> Interval:
    """Interval of share 1 - share 2 from their Wilson limits (Newcombe 1998, method 10)."""
    share_1, share_2 = share(kept_1, total_1), share(kept_2, total_2)
    (low_1, high_1), (low_2, high_2) = wilson(kept_1, total_1, z), wilson(kept_2, total_2, z)
    gap = share_1 - share_2
    return gap - np.hypot(share_1 - low_1, high_2 - share_2), gap + np.hypot(high_1 - share_1, share_2 - low_2)


def ratio_interval(kept_1, total_1, kept_2, total_2, z: float) -> Interval:
    """Interval of share 1 / share 2 from their Wilson limits (MOVER-R: Donner and Zou 2012, equation 9).

    The upper limit is infinite where nothing of 2 is kept.
    """
    a, b = share(kept_1, total_1), share(kept_2, total_2)
    (low_a, high_a), (low_b, high_b) = wilson(kept_1, total_1, z), wilson(kept_2, total_2, z)
    with np.errstate(divide="ignore", invalid="ignore"):
        root = np.sqrt(np.maximum((a * b) ** 2 - low_a * high_b * (2 * a - low_a) * (2 * b - high_b), 0))
        # The published (ab - root) / (high_b (2b - high_b)), multiplied out: that one is 0 / 0 at high_b = 2b.
        low = np.where(low_a > 0, low_a * (2 * a - low_a) / (a * b + root), 0.0)
        root = np.sqrt(np.maximum((a * b) ** 2 - high_a * low_b * (2 * a - high_a) * (2 * b - low_b), 0))
        high = np.where(low_b > 0, (a * b + root) / (low_b * (2 * b - low_b)), np.inf)
    return low, high


def benjamini_hochberg(p: Sequence[float]) -> np.ndarray:
    """Adjusted p-values: rejecting those <= f keeps the false discovery rate at f (Benjamini, Hochberg 1995)."""
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty(len(p))
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    return q


def fisher(part: int, total: int, rest_part: int, rest_total: int) -> float:
    """p of Fisher's exact test that two shares are one."""
    table = [[int(part), int(total - part)], [int(rest_part), int(rest_total - rest_part)]]
    return float(stats.fisher_exact(table).pvalue)


def distance_lower(statistic: float, n: int, m: int, confidence: float) -> float:
    """Lower limit of the Kolmogorov-Smirnov distance of two distributions from samples of n and m.

    Each sample's distribution lies within sqrt(ln(2 / a) / 2n) of its own (Dvoretzky-Kiefer-Wolfowitz, Massart 1990),
    each with half of what the confidence leaves.
    """
    doubt = np.log(2 / ((1 - confidence) / 2))
    return float(max(statistic - np.sqrt(doubt / (2 * n)) - np.sqrt(doubt / (2 * m)), 0.0))


# --- association -------------------------------------------------------------------------------------------

def npmi(both, left, right, total) -> np.ndarray:
    """Normalised pointwise mutual information, -1 never together .. 0 independent .. 1 always (Bouma 2009).

    NaN where one of the two never occurs.
    """
    both, left, right, total = (np.asarray(count, float) for count in (both, left, right, total))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.log(both * total / (left * right)) / -np.log(both / total)
    value = np.where(both == 0, -1.0, np.where(both == total, 1.0, value))
    return np.where((left == 0) | (right == 0), np.nan, value)


def npmi_of(cells: np.ndarray) -> np.ndarray:
    """nPMI from counts [..., 4] of rows with both, the left alone, the right alone, neither."""
    both, left, right, _ = np.moveaxis(cells, -1, 0)
    return npmi(both, both + left, both + right, cells.sum(-1))


def npmi_shift(kept: np.ndarray, dropped: np.ndarray, z: float, draws: int = 500) -> tuple[float, float, float]:
    """Interval and p of how far selection moved an association: bootstrap over the eight kinds of row.

    Args:
        kept, dropped: counts [4] as for `npmi_of`.
        z: the interval's half-width in bootstrap standard errors.

    Returns:
        (low, high, p) of nPMI among the kept rows minus nPMI among all; p by the normal approximation, as a share of
        `draws` could never pass a correction for many tests.
    """
    counts = np.concatenate([kept, dropped]).astype(np.int64)
    drawn = np.random.default_rng(0).multinomial(counts.sum(), counts / counts.sum(), size=draws)
    found = npmi_of(drawn[:, :4]) - npmi_of(drawn[:, :4] + drawn[:, 4:])
    error = float(np.nanstd(found))
    shift = float(npmi_of(np.asarray(kept)) - npmi_of(np.asarray(kept) + np.asarray(dropped)))
    if error == 0:
        return shift, shift, 1.0 if shift == 0 else 0.0
    return shift - z * error, shift + z * error, float(2 * stats.norm.sf(abs(shift) / error))
