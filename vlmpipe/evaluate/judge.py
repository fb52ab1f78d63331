"""What the evidence says of each rule: PASS, FAIL or INCONCLUSIVE, with every number behind it.

Rules against the champion rest on a paired bootstrap over the clusters of the same samples. Each of them passes by its
own p-value: all must pass, so nothing needs correction. That one fails is an alarm, and any alarm stops the gate, so
those p-values are adjusted over the whole family (Holm), and the power is that of the family's first step.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmpipe.config import nearest
from vlmpipe.errors import UserError
from vlmpipe.evaluate.compare import compare, lower_is_better
from vlmpipe.evaluate.power import decide_by_p, power_check
from vlmpipe.evaluate.rules import AGAINST_CHAMPION, COST_RATIOS, COSTS, FLOOR, GAIN, GateConfig, Rule
from vlmpipe.evaluate.statistics import Bootstrap, holm, mcnemar
from vlmpipe.evaluate.store import Pair, Store

PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"
NO_CHAMPION, IS_CHAMPION = "no champion yet", "is the champion itself"
NOTHING_TO_COMPARE = (NO_CHAMPION, IS_CHAMPION)
# A value of the metric files and the same from the samples' counts differ by less, relatively: another order of sums.
SAME = 1e-6

Slice = tuple[str, str]


@dataclass(frozen=True)
class Evidence:
    """The merged metric files; the scores of single samples, if handed in; the champion's version, if there is one.

    reigns: the scored model is that champion: it was promoted on these scores, and nothing else is to compare with.
    """

    metrics: Mapping[str, Any]
    n: Mapping[str, Any]
    details: Mapping[str, Any]
    store: Store | None = None
    champion: str | None = None
    reigns: bool = False


@dataclass
class Check:
    """One limit of a rule on all samples or on a slice, while it is judged."""

    record: dict[str, Any]
    difference: Bootstrap | None = None

    def settle(self, verdict: str, note: str | None = None) -> "Check":
        self.record |= {"verdict": verdict, "note": note}
        return self


def judge(config: GateConfig, evidence: Evidence) -> list[dict[str, Any]]:
    """One record for each limit of each rule and slice, plain data ready for the verdict."""
    checks = [
        _check(name, rule, kind, one, config, evidence)
        for name, rule in config.rules.items() if rule
        for kind in rule.limits for one in _slices(rule, evidence)
    ]
    family = [check for check in checks if check.difference is not None]
    beyond = [check.difference.p_at_least(_bound(check.record)) for check in family]
    for check, p_adjusted in zip(family, holm(beyond, config.alpha)[0] if family else (), strict=True):
        _decide(check, float(p_adjusted), config, len(family))
    return [check.record for check in checks]


# --- one check ---------------------------------------------------------------------------------------------

def _slices(rule: Rule, evidence: Evidence) -> list[Slice | str | None]:
    """None for all samples; the slices; or, where there are none to judge, why not."""
    if rule.slices is None:
        return [None]
    if evidence.store is None:
        return ["has no slices without scores of samples; hand the gate the evaluation's folder as --samples"]
    try:
        parts = [(rule.slices, value) for value in evidence.store.slice_values(rule.metric, rule.slices)]
        if rule.rare == "skip":
            parts = [part for part in parts if len(evidence.store.scored(rule.metric, slice=part).ids) >= rule.min_n]
    except UserError as error:
        return [f"can't be judged: {error}"]
    least = f" and at least {rule.min_n} samples" if rule.rare == "skip" else ""
    return parts or [f"has no slice by '{rule.slices}'{least}"]


def _check(
    name: str, rule: Rule, kind: str, part: Slice | str | None, config: GateConfig, evidence: Evidence
) -> Check:
    check = Check(_record(name, rule, kind, evidence))
    if isinstance(part, str):
        return check.settle(FAIL, part)
    try:
        note = _measure(check.record, rule, part, evidence)
        if note is None:
            check.record["margin" if kind in AGAINST_CHAMPION else "limit"] = rule.limits[kind]
            if kind in AGAINST_CHAMPION or rule.metric in COST_RATIOS:
                note = _why_not_against_champion(rule, evidence)
        if note is not None:
            return check.settle(PASS if note in NOTHING_TO_COMPARE else FAIL, note)
        if kind not in AGAINST_CHAMPION:
            value, limit = check.record["value"], check.record["limit"]
            return check.settle(PASS if (value >= limit if kind == FLOOR else value <= limit) else FAIL)
        check.difference = _compare(check.record, evidence.store.pair(rule.metric, part), config)
    except UserError as error:
        return check.settle(FAIL, f"can't be judged: {error}")
    if part is None and not math.isclose(check.record["value"], evidence.store.value(rule.metric), rel_tol=SAME):
        check.difference = None
        return check.settle(FAIL, "is another number by its samples: metrics and samples are not of one evaluation")
    return check


def _record(name: str, rule: Rule, kind: str, evidence: Evidence) -> dict[str, Any]:
    unknown = dict.fromkeys((
        "slice", "verdict", "value", "champion", "difference", "interval", "p", "p_adjusted", "limit", "margin", "n",
        "clusters", "power", "samples_needed", "mcnemar", "note",
    ))
    detail = short(evidence.details.get(rule.metric))
    return {"name": name, "metric": rule.metric, "rule": kind, **unknown, "min_n": rule.min_n, "detail": detail}


def _measure(record: dict, rule: Rule, part: Slice | None, evidence: Evidence) -> str | None:
    """Write the value and its number of samples into the record; the reason where that can't be judged."""
    if part is None:
        found, record["n"] = evidence.metrics.get(rule.metric), evidence.n.get(rule.metric)
    else:
        record["slice"] = {"name": part[0], "value": part[1]}
        scored = evidence.store.scored(rule.metric, slice=part)
        found, record["n"] = scored.value, len(scored.ids)
    record["value"] = number(found)
    if part is None and rule.metric not in evidence.metrics:
        if rule.metric in COST_RATIOS and (evidence.champion is None or evidence.reigns):
            return IS_CHAMPION if evidence.reigns else NO_CHAMPION
        if rule.metric.startswith(COSTS):
            return "was not measured on this machine; set cost_samples and run the evaluation again, or drop the rule"
        return f"was not measured{nearest(rule.metric, evidence.metrics)}"
    if record["value"] is None:
        return f"is {found!r}, not a number"
    n = record["n"]
    if rule.min_n is not None and (not isinstance(n, int) or n < rule.min_n):
        return f"rests on {n if isinstance(n, int) else 'an unknown number of'} samples, fewer than {rule.min_n}"
    return None


def _why_not_against_champion(rule: Rule, evidence: Evidence) -> str | None:
    if evidence.reigns:
        return IS_CHAMPION
    scored = None if evidence.store is None else evidence.store.champion
    if scored != evidence.champion:
        return (f"was compared with {scored or 'no champion'}, not with {evidence.champion or 'none'}; score both anew "
                f"(`dvc repro -f -s evaluate_finetune`), then again, with the evaluation's folder as --samples")
    if evidence.champion is None:
        return NO_CHAMPION
    why = evidence.store.evaluation.get("unscored", {}).get(rule.metric.partition(".")[0])
    return None if why is None else f"is not known of the champion: {why}"


# --- against the champion ----------------------------------------------------------------------------------

def _compare(record: dict, pair: Pair, config: GateConfig) -> Bootstrap:
    """The difference, higher is better, with the limit that it sets for this champion."""
    less = lower_is_better(record["metric"])
    found = compare(pair, config.seed, config.replicates, less)
    best = record["value"] + found.estimate if less else record["value"] - found.estimate
    asked = _bound(record)
    record |= {
        "champion": best, "difference": found.estimate, "interval": list(found.interval(2 * config.alpha)),
        "p": found.p_at_most(asked), "limit": best - asked if less else best + asked, "n": found.samples,
        "clusters": found.clusters, "mcnemar": _right_or_wrong(pair, less),
    }
    return found


def _bound(record: Mapping) -> float:
    """What the difference must be shown to exceed."""
    return record["margin"] if record["rule"] == GAIN else -record["margin"]


def _right_or_wrong(pair: Pair, less: bool) -> dict[str, Any] | None:
    """The exact two-sided test, where samples are right or wrong and independent."""
    sides = pair.champion_NM, pair.challenger_NM
    plain = pair.form == "ratio" and all(
        (counts_NM[:, 1] == 1).all() and np.isin(counts_NM[:, 0], (0, 1)).all() for counts_NM in sides
    )
    if not plain or len(np.unique(pair.clusters_N)) < len(pair.ids):
        return None
    champion_N, challenger_N = ((counts_NM[:, 0] == 1) != less for counts_NM in sides)
    found = mcnemar(champion_N, challenger_N)
    return {"lost": found.lost, "won": found.won, "p": found.p}


def _decide(check: Check, p_adjusted: float, config: GateConfig, family: int) -> None:
    found, asked = check.difference, _bound(check.record)
    # A gain of more than nothing has no size to look for but the one seen, or one sample.
    effect = abs(asked) or abs(found.estimate) or 1 / found.samples
    power = power_check(
        found.variance, found.clusters, found.samples, effect, config.alpha / family, config.power, found.reach or 0.0
    )
    decision = decide_by_p(found.estimate, check.record["p"], p_adjusted, -asked, power, config.alpha)
    check.record |= {"p_adjusted": p_adjusted, "power": power.power, "samples_needed": decision.samples_needed}
    check.settle(decision.verdict, None if decision.verdict == PASS else decision.reason)


# --- plain values ------------------------------------------------------------------------------------------

def number(value: Any) -> float | int | None:
    """The value if it is a finite number; json has no NaN, and neither has a verdict."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def short(detail: Any) -> str | None:
    """A detail that fits a line: text as it is, a mapping's scalars as `key value`; the rest stays in its file."""
    if isinstance(detail, Mapping):
        pairs = {key: value for key, value in detail.items() if isinstance(value, (str, int, float))}
        return ", ".join(f"{key} {pairs[key]}" for key in sorted(pairs)) or None
    return detail if isinstance(detail, str) else None
