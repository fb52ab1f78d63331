"""The gate: rules over measured metrics, a verdict with every number behind it, and a stop unless it is a PASS.

The verdict is written before the gate stops the run, and is the same bytes for the same metrics, scores, rules, costs,
champion and waivers, and the same dvc.lock and environment, which it takes down (`hashes`).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmpipe.config import to_dict
from vlmpipe.errors import GateFailed, UserError
from vlmpipe.evaluate.judge import FAIL, INCONCLUSIVE, PASS, Evidence, judge, number
from vlmpipe.evaluate.rules import AGAINST_CHAMPION, COST_RATIOS, COSTS, FLOOR, GateConfig, Rule
from vlmpipe.evaluate.store import read_scores
from vlmpipe.evaluate.verdict import evidence_digest, hashes, seal, sha256_of
from vlmpipe.evaluate.waivers import apply_waivers, read_waivers, unmet
from vlmpipe.shards import read_json, sha256_file, write_json

__all__ = ["GateConfig", "Rule", "explain", "gate"]

WORDS = {"min": "floor", "max": "ceiling"}


def gate(
    name: str, metrics: Sequence[Path], champion: Path | None, out: Path, config: GateConfig,
    samples: Path | None = None, costs: Path | None = None, waivers: Path | None = None, lock: Path | None = None,
) -> None:
    """Judge the metric files by the rules and write the verdict to `out`.

    Args:
        metrics: json files `{"metrics": {name: number}, "n": {name: count}, "details": {name: anything}}`.
        champion: json file `{"version": text, "metrics": {name: number}}`, with `model`, the sha256 of its files, where
            it was promoted on scores: rules against it pass and say so where that is the scored model. Missing: no
            champion yet, and they pass and say so. None: this gate knows of no champion and takes no such rules.
        samples: the folder of an evaluation, whose scores of single samples slices and comparisons rest on.
        costs: what `cost.measure` wrote, in the form of `metrics`; read where a rule names a cost.
        waivers: yaml file of waivers (see `waivers.Waiver`); none or missing: nothing is waived.
        lock: dvc.lock, which says what led to the metrics; a verdict without it promotes nothing.

    Raises:
        GateFailed: a rule fails or can't be decided; the message names the gate and each such metric, with numbers.
        UserError: a file is missing or malformed, two files disagree on a metric, a rule needs a champion that this
            gate isn't handed, or a waiver has expired or is of no rule.
    """
    if champion is None:
        refuse_against_champion(name, config)
    store = None if samples is None else read_scores(samples)
    evaluation = None if store is None else store.evaluation
    version, reigns = _reigning(_read_champion(champion), evaluation)
    paid = _costs(costs, config, evaluation)
    measured = merge([*metrics, *paid])
    evidence = Evidence(measured["metrics"], measured["n"], measured["details"], store, version, reigns)
    files, asked = [_file(path) for path in sorted(metrics)], sha256_of(to_dict(config))
    seen, given = evidence_digest([*files, *map(_file, paid)], evaluation, version, asked), read_waivers(waivers)
    checks = apply_waivers(judge(config, evidence), given, seen, str(waivers))
    for check in checks:
        check["passed"] = check["verdict"] == PASS or (check["verdict"], config.inconclusive) == (INCONCLUSIVE, "pass")
    verdict = {
        "gate": name,
        "verdict": summary(checks),
        "passed": all(check["passed"] or check["waived"] for check in checks),
        "alpha": config.alpha,
        "seed": config.seed,
        "replicates": config.replicates,
        "rules": checks,
        "metrics": {key: number(value) for key, value in evidence.metrics.items()},
        "n": evidence.n,
        "metric_files": files,
        "rules_sha256": asked,
        "evaluation": evaluation,
        "champion": version,
        "reigns": reigns,
        "evidence": seen,
        "waivers": [to_dict(waiver) for waiver in given],
        "hashes": hashes(metrics, lock, evaluation),
    }
    write_json(out, seal(verdict))
    if not verdict["passed"]:
        raise GateFailed(f"{name}: " + "; ".join(map(explain, unmet(verdict))))


def summary(checks: Iterable[Mapping]) -> str:
    """FAIL if one does, else INCONCLUSIVE if one is, else PASS; those that are waived don't count."""
    found = {check["verdict"] for check in checks if not check["waived"]}
    return next((verdict for verdict in (FAIL, INCONCLUSIVE) if verdict in found), PASS)


def merge(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """`metrics`, `n` and `details` of all metric files.

    Raises:
        UserError: no file, no metrics in a file, or a metric that stands in two files with different values.
    """
    merged: dict[str, dict[str, Any]] = {"metrics": {}, "n": {}, "details": {}}
    for path in sorted(paths):
        found = read_json(path)
        if not isinstance(found, Mapping) or not isinstance(found.get("metrics"), Mapping):
            raise UserError(f"{path}: found no 'metrics'; expected {{'metrics': {{name: number}}}}; rerun its stage")
        for key, value in found["metrics"].items():
            elsewhere = merged["metrics"].get(key)
            if key in merged["metrics"] and elsewhere != value:
                raise UserError(f"{path}: found '{key}' {value}, elsewhere {elsewhere}; expected one value")
        for part, values in merged.items():
            values.update(found.get(part) or {})
    if not merged["metrics"]:
        raise UserError("gate: found no metrics at all; expected at least one metric file with numbers")
    return merged


def explain(check: Mapping) -> str:
    """`vqa.accuracy 0.71 is below the floor 0.85 (n 300)`, or why it failed or could not be told."""
    where = "{name} {value}".format(**check["slice"]) if check["slice"] else None
    subject = f"{check['metric']} ({where})" if where else check["metric"]
    if check["rule"] in AGAINST_CHAMPION and check["difference"] is not None:
        low, high = check["interval"]
        text = (f"{subject} {check['value']:.6g} against the champion's {check['champion']:.6g} is {check['verdict']}: "
                f"{check['note']}, interval {low:+.4g} to {high:+.4g}")
        needed = check["samples_needed"]
        facts = [f"n {check['n']} in {check['clusters']} clusters", *([f"{needed} would settle it"] if needed else [])]
    elif check["note"]:
        return f"{subject} {check['note']}"
    else:
        side = "below" if check["rule"] == FLOOR else "above"
        text = f"{subject} {check['value']:.6g} is {side} the {WORDS[check['rule']]} {check['limit']:.6g}"
        facts = [f"n {check['n']}"] if check["n"] is not None else []
    facts += [check["detail"]] if check["detail"] is not None else []
    return f"{text} ({', '.join(facts)})" if facts else text


# --- what is read ------------------------------------------------------------------------------------------

def _costs(path: Path | None, config: GateConfig, evaluation: Mapping | None) -> list[Path]:
    """The file of costs, if a rule names one and it is there: seconds would make other verdicts differ by chance.

    Raises:
        UserError: it was measured on other models than the scores.
    """
    named = any(rule.metric.startswith(COSTS) for rule in config.rules.values() if rule)
    if not named or path is None or not Path(path).exists():
        return []
    models = read_json(path).get("models")
    if evaluation is not None and models != evaluation.get("models"):
        raise UserError(f"{path}: found costs of other models than {evaluation.get('models')}; expected the evaluated "
                        f"ones; run `evaluate` again on this machine (dvc repro -f)")
    return [Path(path)]


def refuse_against_champion(name: str, config: GateConfig) -> None:
    """For gates that are handed no champion.

    Raises:
        UserError: a rule compares with one: it would pass for ever.
    """
    for key, rule in config.rules.items():
        compares = rule and (rule.metric in COST_RATIOS or any(kind in AGAINST_CHAMPION for kind in rule.limits))
        if compares:
            raise UserError(f"gate {name}: found rule '{key}' against the champion ({rule.metric}), which this gate "
                            f"isn't handed; expected min and max of other metrics; put the rule into gates.finetune")


def _reigning(champion: Mapping | None, evaluation: Mapping | None) -> tuple[str | None, bool]:
    """The champion's version, and whether it is the scored model itself."""
    if champion is None:
        return None, False
    scored = ((evaluation or {}).get("models") or {}).get("challenger")
    return champion["version"], scored is not None and scored == champion.get("model")


def _read_champion(path: Path | None) -> dict | None:
    if path is None or not Path(path).exists():
        return None
    champion = read_json(path)
    if not isinstance(champion, Mapping) or not {"version", "metrics"} <= champion.keys():
        raise UserError(f"{path}: found no 'version' and 'metrics'; expected what a promotion writes; restore it")
    return champion


def _file(path: Path) -> dict[str, str]:
    return {"path": Path(path).as_posix(), "sha256": sha256_file(path)}
