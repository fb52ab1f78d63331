"""Fairness between groups: who is shown first, what is associated with whom, and for whom a model works worst.

Shapes: N results in order of rank, G groups, X and Y samples of two groups, S samples, P permutations.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics.result import MetricResult, check_same_samples
from vlmpipe.evaluate.statistics import REPLICATES, bootstrap_mean, finite

PERMUTATIONS = 10_000
# Sums of the same numbers in another order differ by less.
_SAME = 1e-12


def max_skew(ranking: Sequence[str], shares: Mapping[str, float], k: int) -> MetricResult:
    """MaxSkew@K: how much the group that is most over-represented among the first K is so; 0 is best.

    Args:
        ranking: the group of each result, the best first. shares: what share of the results each group should have,
        such as its share of all; they sum to 1.

    Returns:
        value: max over groups of ln(share among the first K / share wanted). details: `skew` by group (-inf where none
        is among the first K), `group`, which it is.

    Source: Geyik, Ambler, Kenthapadi 2019, arXiv 1905.01989, definitions 3 and 4.
    """
    wanted_G, seen_NG, names = _seen(ranking, shares, "max_skew")
    if not 1 <= k <= len(ranking):
        raise UserError(f"max_skew: found k {k} for {len(ranking)} results; expected from 1 to as many; lower k")
    with np.errstate(divide="ignore"):
        skew_G = np.log(seen_NG[k - 1] / k / wanted_G)
    skew = dict(zip(names, skew_G.tolist(), strict=True))
    group = max(names, key=skew.__getitem__)
    return MetricResult(skew[group], {}, {"skew": skew, "group": group})


def ndkl(ranking: Sequence[str], shares: Mapping[str, float]) -> MetricResult:
    """Normalised discounted cumulative KL divergence of the groups' shares among the first 1, 2, … N from those wanted.

    Arguments as in `max_skew`. 0 is best; each prefix counts 1 / log2(length + 1), so that the top counts most. A list
    of one group ranks from ln(1 / its share) down.

    Source: Geyik, Ambler, Kenthapadi 2019, arXiv 1905.01989, definition 6; natural logarithm.
    """
    wanted_G, seen_NG, _ = _seen(ranking, shares, "ndkl")
    lengths_N = np.arange(1, len(ranking) + 1)
    share_NG = seen_NG / lengths_N[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        terms_NG = np.where(share_NG > 0, share_NG * np.log(share_NG / wanted_G), 0.0)
    weight_N = 1 / np.log2(lengths_N + 1)
    return MetricResult(float(weight_N @ terms_NG.sum(axis=1) / weight_N.sum()))


def _seen(ranking: Sequence[str], shares: Mapping[str, float], metric: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Shares wanted [G], how many of each group are among the first 1..N [N, G], and the groups' names."""
    names = sorted(shares)
    wanted_G = np.array([shares[name] for name in names], float)
    unknown = sorted(set(ranking) - shares.keys())
    if not len(ranking) or unknown:
        raise UserError(f"{metric}: found {len(ranking)} results and unknown groups {unknown[:3]}; expected at least "
                        f"one result, all of groups with a share")
    if not (wanted_G > 0).all() or not math.isclose(wanted_G.sum(), 1, rel_tol=1e-6):
        raise UserError(f"{metric}: found the shares {dict(shares)}; expected numbers above 0 with sum 1")
    place = {name: number for number, name in enumerate(names)}
    one_hot_NG = np.eye(len(names))[[place[group] for group in ranking]]
    return wanted_G, one_hot_NG.cumsum(axis=0), names


def association(
    first: Mapping[Any, float], second: Mapping[Any, float], permutations: int = PERMUTATIONS, seed: int = 0
) -> MetricResult:
    """How differently two groups are associated with one attribute rather than another: WEAT's effect size.

    Args:
        first, second: for each sample of either group how much nearer it lies to attribute A than to B: the mean
        similarity to A's texts minus the mean to B's.
        permutations: random splits into groups of the same sizes; where there are no more splits, each is taken once.

    Returns:
        value: (mean of first - mean of second) / standard deviation of all (that of a sample), -2 to 2 for groups of
        equal size. details: `p`, the share of splits with a difference as large or larger (one-sided, the one found
        included), `p_two_sided`, `splits`, and `exact`, whether all of them were taken.

    Source: Caliskan, Bryson, Narayanan 2017, Science 356; for pictures iEAT, arXiv 2010.15052, section 3.
    """
    if len(first) < 2 or len(second) < 2:
        raise UserError(f"association: found groups of {len(first)} and {len(second)}; expected at least 2 each")
    values_S = finite([*first.values(), *second.values()], "association")
    count, spread = len(first), float(values_S.std(ddof=1))
    found = float(values_S[:count].mean() - values_S[count:].mean())
    if spread <= _SAME * max(1.0, float(np.abs(values_S).max())):
        raise UserError("association: found one value for all samples; expected some that differ")
    exact = math.comb(len(values_S), count) <= permutations
    splits_P = _all_splits(values_S, count) if exact else _random_splits(values_S, count, permutations, seed)
    tolerance = _SAME * max(1.0, spread)
    above, beyond = (np.count_nonzero(side >= bound - tolerance) for side, bound in (
        (splits_P, found), (np.abs(splits_P), abs(found))
    ))
    # A random draw counts the split that was found itself, so that p is never 0 (Phipson and Smyth 2010).
    shares = [(number + (not exact)) / (len(splits_P) + (not exact)) for number in (above, beyond)]
    details = {"p": float(shares[0]), "p_two_sided": float(shares[1]), "splits": len(splits_P), "exact": exact}
    return MetricResult(found / spread, {}, details)


def _all_splits(values_S: np.ndarray, count: int) -> np.ndarray:
    """[P] differences of means of every split into `count` and the rest."""
    chosen_PX = np.array(list(combinations(range(len(values_S)), count)))
    return _differences(values_S[chosen_PX].sum(axis=1), values_S, count)


def _random_splits(values_S: np.ndarray, count: int, permutations: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    sums_P = np.array([generator.permutation(values_S)[:count].sum() for _ in range(permutations)])
    return _differences(sums_P, values_S, count)


def _differences(sums_P: np.ndarray, values_S: np.ndarray, count: int) -> np.ndarray:
    return sums_P / count - (values_S.sum() - sums_P) / (len(values_S) - count)


def worst_group(
    scores: Mapping[Any, float], groups: Mapping[Any, str], minimum: int = 30,
    clusters: Mapping[Any, Any] | None = None, *, confidence: float = 0.95, seed: int = 0,
    replicates: int = REPLICATES, reach: float | None = 1.0,
) -> MetricResult:
    """The mean score of the group with the lowest, and how far the best one's is from it; higher scores are better.

    Args:
        groups: of each sample. minimum: groups with fewer samples are named and not compared. clusters: of each sample,
        for those that go right and wrong together, such as the picture; by default each is one. reach: the largest
        difference that a score can show; None where there is none.

    Returns:
        value: the worst group's mean. details: `worst_group`, `best_group`, `gap`, and `low` and `high` of the worst
        group's mean and of the gap (`gap_low`, `gap_high`): intervals of all groups that hold together with the
        confidence (bootstrap over clusters, Bonferroni), so that picking the extremes of many makes no gap of noise;
        `groups`: mean, n, low and high of each; `small`: n of those not compared.

    Raises:
        UserError: fewer than two groups of `minimum` samples in two clusters.
    """
    check_same_samples(groups, scores, "worst_group")
    clusters = clusters or {sample: sample for sample in scores}
    members = {name: [sample for sample in scores if groups[sample] == name] for name in sorted(set(groups.values()))}
    large = {
        name: own for name, own in members.items()
        if len(own) >= minimum and len({clusters[sample] for sample in own}) > 1
    }
    if len(large) < 2:
        sizes = {name: len(own) for name, own in members.items()}
        raise UserError(f"worst_group: found {sizes} samples by group; expected two groups of at least {minimum}")
    alpha = (1 - confidence) / len(large)
    table = {name: _interval(own, scores, clusters, alpha, seed, replicates, reach) for name, own in large.items()}
    worst, best = (pick(table, key=lambda name: table[name]["value"]) for pick in (min, max))
    lows, highs = ([row[end] for row in table.values()] for end in ("low", "high"))
    details = {
        "worst_group": worst, "best_group": best, "low": min(lows), "high": min(highs),
        "gap": table[best]["value"] - table[worst]["value"], "gap_low": max(0.0, max(lows) - min(highs)),
        "gap_high": max(highs) - min(lows), "groups": table,
        "small": {name: len(own) for name, own in members.items() if name not in large},
    }
    return MetricResult(table[worst]["value"], {}, details)


def _interval(
    own: Sequence[Any], scores: Mapping[Any, float], clusters: Mapping[Any, Any], alpha: float, seed: int,
    replicates: int, reach: float | None,
) -> dict[str, float]:
    names = {name: number for number, name in enumerate(dict.fromkeys(clusters[sample] for sample in own))}
    codes = np.array([names[clusters[sample]] for sample in own])
    found = bootstrap_mean(np.array([scores[sample] for sample in own], float), codes, seed, replicates, reach)
    low, high = found.interval(alpha)
    if reach == 1 and all(0 <= scores[sample] <= 1 for sample in own):  # rates; so is their mean
        low, high = max(low, 0.0), min(high, 1.0)
    return {"value": found.estimate, "n": len(own), "low": low, "high": high}
