"""Was there enough data to tell, and what does a comparison decide: PASS, FAIL or INCONCLUSIVE.

Intervals and p-values come from `statistics`. A verdict that lacks data says so, and with how many it would not.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import binom

from vlmpipe.errors import UserError
from vlmpipe.evaluate.statistics import check_share

# --- Power -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Power:
    """How surely `effect` (a drop, positive) is found with `samples` in `clusters`, and how many make it sure enough.

    Attributes:
        power: at the present number; `target` is what the needed numbers give.
    """

    effect: float
    clusters: int
    samples: int
    power: float
    target: float
    clusters_needed: int
    samples_needed: int

    @property
    def enough(self) -> bool:
        return self.clusters >= self.clusters_needed


def power_check(
    variance: float,
    clusters: int,
    samples: int,
    effect: float,
    alpha: float = 0.05,
    target: float = 0.8,
    reach: float = 0.0,
) -> Power:
    """Clusters that find a drop of `effect` with probability `target` in a one-sided test at alpha.

    C = (z_alpha + z_target)^2 V / effect^2 + z_alpha^2 / 2: the normal approximation, and what estimating the variance
    costs (Guenther 1981, The American Statistician 35). The same number lets a challenger without a drop prove, with
    probability `target`, that it is within a margin of `effect`. For a family of K tests under `holm` hand alpha / K,
    its first step.

    Args:
        variance: of one cluster's share of the estimate: `statistics.Bootstrap.variance`, or `assumed_variance` before
            there is any data.
        clusters, samples: the present numbers.
        reach: of a right/wrong metric 1, what a lost sample loses. A drop of `effect` then adds losses, and
            effect * reach to each sample's variance, which data without a drop don't show.
    """
    _check_power(alpha, target, effect, clusters)
    if not (math.isfinite(variance) and variance >= 0):
        raise UserError(f"power: found variance {variance}; expected a finite number of at least 0")
    variance += effect * reach * clusters / samples
    z = -ndtri(alpha)
    needed = max(2, math.ceil((z + ndtri(target)) ** 2 * variance / effect**2 + z**2 / 2))
    reached = math.sqrt(max(clusters - z**2 / 2, 0.0)) * effect
    power = float(ndtr(reached / math.sqrt(variance) - z)) if variance else 1.0
    return Power(effect, clusters, samples, power, target, needed, math.ceil(needed * samples / clusters))


def assumed_variance(deviation: float, size: float, correlation: float) -> float:
    """Variance of a cluster's mean of `size` samples with this standard deviation and intraclass correlation.

    deviation^2 / size * (1 + (size - 1) * correlation); the last factor is the design effect (Kish 1965).
    """
    return deviation**2 / size * (1 + (size - 1) * correlation)


def mcnemar_power(
    discordance: float, drop: float, samples: int, alpha: float = 0.05, target: float = 0.8, mid_p: bool = False
) -> Power:
    """Power of the one-sided exact McNemar test, itself exact: its rejections summed over the discordant pairs.

    The search for the needed number starts at the asymptotic one (Connor 1987, Biometrics 43),
    (z_alpha sqrt(q) + z_target sqrt(q - d^2))^2 / d^2 for discordance q and drop d, which is somewhat too small.

    Args:
        discordance: share of samples on which exactly one model is right.
        drop: share lost less share won, at most the discordance.
    """
    _check_power(alpha, target, drop, samples)
    if not drop <= discordance <= 1:
        raise UserError(f"mcnemar power: found discordance {discordance:g}; expected from the drop {drop:g} to 1")
    spread = math.sqrt(max(discordance - drop**2, 0.0))
    needed = max(2, math.floor((-ndtri(alpha) * math.sqrt(discordance) + ndtri(target) * spread) ** 2 / drop**2))
    while _mcnemar_power(discordance, drop, needed, alpha, mid_p) < target:
        needed += max(1, needed // 200)
    power = _mcnemar_power(discordance, drop, samples, alpha, mid_p)
    return Power(drop, samples, samples, power, target, needed, needed)


def _mcnemar_power(discordance: float, drop: float, samples: int, alpha: float, mid_p: bool) -> float:
    fewest, most = binom.ppf((1e-9, 1 - 1e-9), samples, discordance).astype(int)
    discordant = np.arange(fewest, most + 1)
    least = binom.isf(alpha, discordant, 0.5)  # the smallest count with P(X > count) <= alpha
    boundary = binom.sf(least, discordant, 0.5) + 0.5 * binom.pmf(least, discordant, 0.5)
    rejected_from = np.where(mid_p & (boundary <= alpha), least, least + 1)
    lost = (1 + drop / discordance) / 2
    rejects = binom.sf(rejected_from - 1, discordant, lost)
    return float(binom.pmf(discordant, samples, discordance) @ rejects)


def _check_power(alpha: float, target: float, effect: float, number: int) -> None:
    check_share(alpha, "alpha")
    check_share(target, "target power")
    if not (math.isfinite(effect) and effect > 0 and number >= 1):
        raise UserError(f"power: found effect {effect} with {number} samples; expected both positive")


# --- The verdict -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """`samples_needed`: what would settle an INCONCLUSIVE; None otherwise, or where no number would."""

    verdict: Literal["PASS", "FAIL", "INCONCLUSIVE"]
    reason: str
    samples_needed: int | None = None


def decide(
    estimate: float,
    interval: tuple[float, float],
    margin: float,
    power: Power,
    value: float | None = None,
    floor: float | None = None,
) -> Decision:
    """What an interval of the difference says about a drop of `margin` (0 or less: a gain of -margin is asked for).

    | value < floor | lower > -margin | upper < -margin | verdict                              |
    |---------------|-----------------|-----------------|--------------------------------------|
    | yes           | any             | any             | FAIL, below its floor                |
    | no            | yes             | no              | PASS                                 |
    | no            | no              | yes             | FAIL, a drop beyond the margin shown |
    | no            | no              | no              | INCONCLUSIVE, with samples needed    |

    A drop of exactly the margin is neither: it passes with probability alpha at most, whatever the number. To report
    that the challenger is *worse at all*, which `power_check` makes sure of, look at `p_at_least(0)`.

    Args:
        interval: both ends count as one-sided bounds: `bootstrap.interval(2 * alpha)` tests at alpha.
        power: at the same alpha, for the effect `abs(margin)`, or the gain hoped for where the margin is 0.
        value, floor: the challenger's own value and what it must reach; both or none.

    Raises:
        UserError: NaN anywhere, or an interval upside down.
    """
    lower, upper = interval
    if not (lower <= upper and math.isfinite(margin) and math.isfinite(estimate)):
        raise UserError(f"decide: found {estimate} in [{lower}, {upper}], margin {margin}; expected numbers in order")
    return _decide(lower > -margin, upper < -margin, estimate, margin, power, value, floor)


def decide_by_p(
    estimate: float,
    p_within: float,
    p_beyond: float,
    margin: float,
    power: Power,
    alpha: float = 0.05,
    value: float | None = None,
    floor: float | None = None,
) -> Decision:
    """`decide` from p-values, which `holm` may have adjusted, and by the same table.

    Args:
        p_within: of "the drop is the margin or more", `p_at_most(-margin)`: small speaks for PASS.
        p_beyond: of "the drop is the margin or less", `p_at_least(-margin)`: small speaks for FAIL.
    """
    check_share(alpha, "alpha")
    if not (0 <= p_within <= 1 and 0 <= p_beyond <= 1 and math.isfinite(margin) and math.isfinite(estimate)):
        raise UserError(f"decide: found p {p_within} and {p_beyond}, margin {margin}; expected numbers, p from 0 to 1")
    return _decide(p_within <= alpha, p_beyond <= alpha, estimate, margin, power, value, floor)


def _decide(
    within: bool, beyond: bool, estimate: float, margin: float, power: Power, value: float | None, floor: float | None
) -> Decision:
    if floor is not None and not (value is not None and value >= floor):
        return Decision("FAIL", f"{value} is below the floor {floor:g}")
    asked = f"a drop of {margin:g}" if margin > 0 else f"a gain of {-margin:g}"
    if within:
        return Decision("PASS", f"difference {estimate:+.6g} shown to be better than {asked}")
    if beyond:
        return Decision("FAIL", f"difference {estimate:+.6g} shown to be worse than {asked}")
    if not power.enough:
        effect = f"a {'drop' if margin > 0 else 'gain'} of {power.effect:g}"
        chance = f"{power.samples} samples show {effect} with probability {power.power:.2f}"
        return Decision("INCONCLUSIVE", f"{chance}, not {power.target:g}", power.samples_needed)
    # Enough for the planned effect, so the truth lies near the bound: what tells the estimate from it, if it is true.
    gap = abs(estimate + margin)
    needed = math.ceil(power.samples_needed * (power.effect / gap) ** 2) if gap else None
    return Decision("INCONCLUSIVE", f"difference {estimate:+.6g} lies too near {asked}", needed)
