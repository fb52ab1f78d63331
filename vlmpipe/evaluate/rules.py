"""What a gate asks: its rules, and how sure their statistics must be."""

import math
from dataclasses import dataclass
from typing import Literal

from vlmpipe.errors import UserError
from vlmpipe.evaluate.statistics import REPLICATES, check_share

FLOOR, CEILING, MARGIN, GAIN = "min", "max", "margin", "gain"
KINDS = (FLOOR, CEILING, MARGIN, GAIN)
# Kinds that compare with the champion on the same samples.
AGAINST_CHAMPION = (MARGIN, GAIN)
# Metrics that a clock or a memory meter gave; the ratios are measured beside the champion only.
COSTS = "cost."
COST_RATIOS = (COSTS + "seconds_ratio", COSTS + "throughput_ratio", COSTS + "memory_ratio")


@dataclass(frozen=True)
class Rule:
    """What one metric must satisfy.

    min, max: the value must lie at or within them. margin: it is shown to be worse than the champion's by less than
    this (non-inferiority). gain: it is shown to be better than the champion's by more than this (superiority; 0: at
    all). Which way is better, the metric's name says (`compare.lower_is_better`).

    slices: the name of a slice, such as `question_type`: the rule holds for each value that a sample has of it.
    min_n: the metric rests on as many samples, in each slice; `rare: skip` leaves out slices with fewer.
    """

    metric: str
    min: float | None = None
    max: float | None = None
    margin: float | None = None
    gain: float | None = None
    slices: str | None = None
    min_n: int | None = None
    rare: Literal["fail", "skip"] = "fail"

    def __post_init__(self):
        limits = self.limits
        if not limits:
            raise UserError(f"rule on '{self.metric}': found no limit; expected one of {', '.join(KINDS)}")
        for kind, limit in limits.items():
            if not math.isfinite(limit) or (kind == MARGIN and limit <= 0) or (kind == GAIN and limit < 0):
                raise UserError(f"rule on '{self.metric}': found {kind} {limit}; expected a number, a margin over 0, "
                                f"a gain of at least 0")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise UserError(f"rule on '{self.metric}': found min {self.min} over max {self.max}; expected min <= max")
        if self.rare == "skip" and (self.slices is None or self.min_n is None):
            raise UserError(f"rule on '{self.metric}': found rare: skip without slices and min_n; expected both: it "
                            f"leaves out slices with fewer than min_n samples")

    @property
    def limits(self) -> dict[str, float]:
        """By kind, those that are given."""
        return {kind: getattr(self, kind) for kind in KINDS if getattr(self, kind) is not None}


@dataclass(frozen=True)
class GateConfig:
    """Rules by name: one is overridden as `gates.finetune.rules.accuracy.min=0.9`, and null drops an inherited one.

    alpha: of each comparison that lets a model pass, and of all alarms against the champion together; mere limits raise
    theirs by the value. power: how surely a drop of the margin should be found; where it is less, a check that shows
    neither is INCONCLUSIVE for want of samples. replicates, seed: of the bootstrap. inconclusive: whether a gate with
    such checks stops the run.
    """

    rules: dict[str, Rule | None]
    alpha: float = 0.05
    power: float = 0.8
    replicates: int = REPLICATES
    seed: int = 0
    inconclusive: Literal["stop", "pass"] = "stop"

    def __post_init__(self):
        if not any(self.rules.values()):
            raise UserError("rules: found none; expected at least one; a gate without rules passes anything")
        check_share(self.alpha, "alpha")
        check_share(self.power, "power")
        if self.replicates < 1000:
            raise UserError(f"replicates: found {self.replicates}; expected at least 1000, or tails are guesses")
