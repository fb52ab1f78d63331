"""The gate: rules over measured metrics, a verdict with every number behind it, and a stop when a rule fails.

The verdict is written before the gate stops the run, and is the same bytes for the same metrics, rules and champion.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmpipe.config import nearest, to_dict
from vlmpipe.errors import GateFailed, UserError
from vlmpipe.shards import read_json, sha256_file, write_json

FLOOR, CEILING, DROP, RISE = "min", "max", "max_drop", "max_rise"
WORDS = {FLOOR: "floor", CEILING: "ceiling", DROP: "floor against the champion", RISE: "ceiling against the champion"}


@dataclass(frozen=True)
class Rule:
    """What one metric must satisfy.

    min, max: the value must lie at or within them. max_drop: at most this far below the champion's value (for
    metrics where more is better); max_rise: at most this far above it. min_n: the metric must rest on as many samples.
    """

    metric: str
    min: float | None = None
    max: float | None = None
    max_drop: float | None = None
    max_rise: float | None = None
    min_n: int | None = None

    def __post_init__(self):
        limits = {name: getattr(self, name) for name in (FLOOR, CEILING, DROP, RISE)}
        given = {name: limit for name, limit in limits.items() if limit is not None}
        if not given:
            raise UserError(f"rule on '{self.metric}': found no limit; expected one of {', '.join(limits)}")
        for name, limit in given.items():
            if not math.isfinite(limit) or (name in (DROP, RISE) and limit < 0):
                raise UserError(f"rule on '{self.metric}': found {name} {limit}; expected a number, margins at least 0")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise UserError(f"rule on '{self.metric}': found min {self.min} over max {self.max}; expected min <= max")


@dataclass(frozen=True)
class GateConfig:
    """Rules by name: one is overridden as `gates.finetune.rules.accuracy.min=0.9`, and null drops an inherited one."""

    rules: dict[str, Rule | None]

    def __post_init__(self):
        if not any(self.rules.values()):
            raise UserError("rules: found none; expected at least one; a gate without rules passes anything")


@dataclass(frozen=True)
class Evidence:
    """The merged metric files."""

    metrics: dict[str, Any]
    n: dict[str, Any]
    details: dict[str, Any]


def gate(name: str, metrics: Sequence[Path], champion: Path | None, out: Path, config: GateConfig) -> None:
    """Judge the metric files by the rules and write the verdict to `out`.

    Args:
        metrics: json files `{"metrics": {name: number}, "n": {name: count}, "details": {name: anything}}`.
        champion: json file `{"version": text, "metrics": {name: number}}`; none or missing: no champion yet, and
            rules against it pass and say so.

    Raises:
        GateFailed: a rule fails; the message names the gate and each failed metric with its value and limit.
        UserError: a file is missing or malformed, or two files disagree on a metric.
    """
    evidence = merge(metrics)
    reigning = _read_champion(champion)
    rules = {key: rule for key, rule in config.rules.items() if rule}
    checks = [{"name": key, **check} for key, rule in rules.items() for check in judge(rule, evidence, reigning)]
    failures = [check for check in checks if not check["passed"]]
    verdict = {
        "gate": name,
        "passed": not failures,
        "rules": checks,
        "metrics": {key: _number(value) for key, value in evidence.metrics.items()},
        "n": evidence.n,
        "metric_files": [{"path": Path(path).as_posix(), "sha256": sha256_file(path)} for path in sorted(metrics)],
        "rules_sha256": _sha256_of(to_dict(config)),
        "champion": None if reigning is None else reigning["version"],
    }
    write_json(out, verdict)
    if failures:
        raise GateFailed(f"{name}: " + "; ".join(explain(check) for check in failures))


def merge(paths: Sequence[Path]) -> Evidence:
    """All metric files as one.

    Raises:
        UserError: no file, no metrics in a file, or a metric that stands in two files with different values.
    """
    evidence = Evidence({}, {}, {})
    for path in sorted(paths):
        found = read_json(path)
        if not isinstance(found, Mapping) or not isinstance(found.get("metrics"), Mapping):
            raise UserError(f"{path}: found no 'metrics'; expected {{'metrics': {{name: number}}}}; rerun its stage")
        for key, value in found["metrics"].items():
            if key in evidence.metrics and evidence.metrics[key] != value:
                raise UserError(f"{path}: found '{key}' {value}, elsewhere {evidence.metrics[key]}; expected one value")
        evidence.metrics.update(found["metrics"])
        evidence.n.update(found.get("n") or {})
        evidence.details.update(found.get("details") or {})
    if not evidence.metrics:
        raise UserError("gate: found no metrics at all; expected at least one metric file with numbers")
    return evidence


def judge(rule: Rule, evidence: Evidence, champion: Mapping | None) -> list[dict]:
    """One record for each limit of the rule, plain data ready for the verdict."""
    return [
        _judge_limit(rule, kind, evidence, champion)
        for kind in (FLOOR, CEILING, DROP, RISE)
        if getattr(rule, kind) is not None
    ]


def explain(check: Mapping) -> str:
    """`vqa.accuracy 0.71 is below the floor 0.85 (n 300)`, or why there was nothing to compare."""
    if check["note"]:
        return f"{check['metric']} {check['note']}"
    side = "below" if check["rule"] in (FLOOR, DROP) else "above"
    text = f"{check['metric']} {check['value']:.6g} is {side} the {WORDS[check['rule']]} {check['limit']:.6g}"
    facts = []
    if check["margin"] is not None:
        facts.append(f"champion {check['champion']:.6g}, margin {check['margin']:.6g}")
    if check["n"] is not None:
        facts.append(f"n {check['n']}")
    if check["detail"] is not None:
        facts.append(check["detail"])
    return f"{text} ({', '.join(facts)})" if facts else text


def _judge_limit(rule: Rule, kind: str, evidence: Evidence, champion: Mapping | None) -> dict:
    bound = getattr(rule, kind)
    against_champion = kind in (DROP, RISE)
    value, n = _number(evidence.metrics.get(rule.metric)), evidence.n.get(rule.metric)
    best = _number(champion["metrics"].get(rule.metric)) if against_champion and champion else None
    limit = bound
    if against_champion:
        limit = None if best is None else best + (-bound if kind == DROP else bound)
    note = _why_not_comparable(rule, evidence, value, n)
    no_champion = not note and against_champion and champion is None
    if not note and against_champion and champion is not None and best is None:
        note = "is not among the champion's metrics; evaluate the champion anew or drop this rule for one promotion"
    passed = no_champion or (not note and (value >= limit if kind in (FLOOR, DROP) else value <= limit))
    return {
        "metric": rule.metric,
        "rule": kind,
        "value": value,
        "limit": limit,
        "margin": bound if against_champion else None,
        "champion": best,
        "n": n,
        "min_n": rule.min_n,
        "passed": passed,
        "note": "no champion yet" if no_champion else note,
        "detail": _short(evidence.details.get(rule.metric)),
    }


def _why_not_comparable(rule: Rule, evidence: Evidence, value: float | None, n: Any) -> str | None:
    if rule.metric not in evidence.metrics:
        return f"was not measured{nearest(rule.metric, evidence.metrics)}"
    if value is None:
        return f"is {evidence.metrics[rule.metric]!r}, not a number"
    if rule.min_n is not None and (not isinstance(n, int) or n < rule.min_n):
        return f"rests on {n if isinstance(n, int) else 'an unknown number of'} samples, fewer than {rule.min_n}"
    return None


def _number(value: Any) -> float | int | None:
    """The value if it is a finite number; json has no NaN, and neither has a verdict."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def _short(detail: Any) -> str | None:
    """A detail that fits a line: text as it is, a mapping's scalars as `key value`; the rest stays in its file."""
    if isinstance(detail, Mapping):
        pairs = {key: value for key, value in detail.items() if isinstance(value, (str, int, float))}
        return ", ".join(f"{key} {pairs[key]}" for key in sorted(pairs)) or None
    return detail if isinstance(detail, str) else None


def _read_champion(path: Path | None) -> dict | None:
    if path is None or not Path(path).exists():
        return None
    champion = read_json(path)
    if not isinstance(champion, Mapping) or not {"version", "metrics"} <= champion.keys():
        raise UserError(f"{path}: found no 'version' and 'metrics'; expected what a promotion writes; restore it")
    return champion


def _sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
