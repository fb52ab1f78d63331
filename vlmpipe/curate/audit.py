"""The audit: what is expected of the data and how groups fared, as evidence. The verdict is the gate's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from vlmpipe.curate import bias, drift
from vlmpipe.curate.bias import BiasConfig
from vlmpipe.curate.census import Facts, Source, collect, find_sources, frames, group_columns, samples, scored_pools
from vlmpipe.curate.duplicates import Near
from vlmpipe.curate.evaluation import evaluation_images
from vlmpipe.curate.expectations import ExpectationsConfig, Rule, between, clear, column, suite, suites, validate
from vlmpipe.curate.filters import FUNNEL
from vlmpipe.errors import UserError
from vlmpipe.shards import read_json, write_json

MOST_LANGUAGES = 20  # shares among the metrics; the bias tables have the others


@dataclass(frozen=True)
class AuditConfig:
    """evaluation: the question splits whose pictures must not be in the selection. near: when a kept picture counts as
    one of theirs, beside having the very same bytes."""

    expectations: ExpectationsConfig = field(default_factory=ExpectationsConfig)
    bias: BiasConfig = field(default_factory=BiasConfig)
    evaluation: tuple[str, ...] = ("test",)
    near: Near = field(default_factory=Near)

    def __post_init__(self):
        if not self.evaluation:
            raise UserError("evaluation: found no split; expected at least one; name the splits of the questions")


def audit(
    pools: Path, annotations: Path, selection: Path, questions: Path, out: Path, config: AuditConfig,
    champion: Path | None = None,
) -> None:
    """Write expectations.json, bias.json, metrics.json and data_docs/ to `out`.

    A breach is evidence like everything else: it is written, and nothing is raised.

    Args:
        champion: the record of the champion, whose data this is compared with; none or missing: nothing to compare
            with yet, and that is said.

    Raises:
        UserError: an input is missing, incomplete or without its key columns, or a configured column exists nowhere.
    """
    sources = find_sources(pools, annotations, selection)
    columns = group_columns(sources, [*config.bias.columns, *config.bias.bins])
    evaluation = evaluation_images(questions, config.evaluation)
    facts = collect(sources, columns, evaluation, config.near, config.bias)
    out.mkdir(parents=True, exist_ok=True)
    clear(out / "data_docs")
    names = [source.name for source in sources]
    rules = suites(names, config.expectations, scored_pools(sources))
    batches = frames(sources, facts, config.expectations)
    counts = _Metrics()
    _selection_metrics(counts, facts)
    drifted, note = _drift_suite(counts, drift.read_reference(champion), config.expectations.drift)
    if drifted:
        rules["drift"], batches["drift"] = drifted, [pd.DataFrame([counts.values])]
    expectations = validate(rules, batches, out / "data_docs", [note])
    table = bias.measure(
        facts.identities, facts.columns, facts.attributes, facts.outcome, facts.reasons, facts.scores, config.bias
    )
    _show_samples(table["rules"], facts, sources, config.bias.samples)
    steps = read_json(selection / FUNNEL)["steps"]
    table["mitigations"] = [step["mitigation"] | {"reason": step["reason"]} for step in steps if "mitigation" in step]
    write_json(out / "expectations.json", expectations)
    write_json(out / "bias.json", table | {"limit": config.bias.limit, "minimum_group": config.bias.minimum_group})
    write_json(out / "metrics.json", metrics(counts, note, expectations, table))


def _drift_suite(
    counts: "_Metrics", reference: tuple[str, Mapping] | None, config: drift.Drift | None
) -> tuple[list[Rule], str]:
    """The expectations against the champion's data, and a line that says what was compared."""
    if config is None or reference is None:
        return [], drift.OFF if config is None else drift.FIRST
    version, before = reference
    allowed = drift.limits(before, counts.values, counts.n["selection.kept_fraction"], config)
    for name in allowed:
        if name.startswith(drift.LANGUAGE) and name not in counts.values:
            counts.add(name, 0.0, counts.n["selection.kept_of_downloaded"], "no kept row")
    return suite(*(column(name, between(ends)) for name, ends in allowed.items())), f"drift: compared with {version}"


def _show_samples(rules: Sequence[dict], facts: Facts, sources: Sequence[Source], wanted: int) -> None:
    """Write rows that each rule in breach dropped of its worst group beside it, in place; spread over the pools."""
    groupings, picked = facts.identities | facts.columns, []
    for rule in rules:
        rows = groupings[rule["grouping"]][rule["group"]]
        rows = rows[facts.outcome[rows] == facts.reasons.index(rule["reason"]) + 1]
        picked.append(rows[np.unique(np.linspace(0, len(rows) - 1, min(wanted, len(rows))).astype(int))])
    positions = np.unique(np.concatenate([np.zeros(0, int), *picked]))
    found = dict(zip(positions.tolist(), samples(sources, positions)))
    for rule, rows in zip(rules, picked):
        rule["samples"] = [found[row] for row in rows.tolist()]


# --- numbers for the gate ----------------------------------------------------------------------------------

def metrics(found: "_Metrics", note: str, expectations: Sequence[dict], table: dict) -> dict:
    """`{"metrics": {name: number}, "n": {name: count}, "details": {name: text}}`, as the gate reads it.

    Args:
        found: the metrics of the selection. note: what was compared with the champion's data.
    """
    _expectation_metrics(found, expectations)
    compared = [record for record in expectations if record["suite"] == "drift" and record["column"]]
    moved = sorted({record["column"] for record in compared if not record["success"]})
    told = f"{note}; moved: {', '.join(moved)}" if moved else note
    found.add("drift.moved", len(moved), len({record["column"] for record in compared}), told)
    _bias_metrics(found, table)
    return found.plain()


def bias_metrics(table: dict) -> dict:
    """The part of `metrics` that comes from the bias tables alone."""
    found = _Metrics()
    _bias_metrics(found, table)
    return found.plain()


# What a gate bounds is there even where nothing was large enough to be tested: then it claims nothing.
NO_CLAIM = {
    "rule_impact_ratio_upper": 1.0, "rule_gap_lower": 0.0, "amplification_max_lower": 1.0,
    "amplification_min_upper": 1.0, "score_gap_lower": 0.0, "npmi_shift_lower": 0.0,
}


class _Metrics:
    def __init__(self):
        self.values, self.n, self.details = {}, {}, {}

    def add(self, name: str, value: float, n: int, detail: str) -> None:
        self.values[name], self.n[name], self.details[name] = value, int(n), detail

    def plain(self) -> dict:
        return {"metrics": self.values, "n": self.n, "details": self.details}


def _expectation_metrics(found: _Metrics, expectations: Sequence[dict]) -> None:
    failed = [record for record in expectations if not record["success"]]
    failed.sort(key=lambda record: 0.0 if record["fraction"] is None else record["fraction"])
    told = "; ".join(record["message"] for record in failed[:3]) or "all hold"
    if len(failed) > 3:
        told += f"; and {len(failed) - 3} more in expectations.json"
    found.add("expectations.failed", len(failed), len(expectations), told)


def _selection_metrics(found: _Metrics, facts: Facts) -> None:
    pools, kept = facts.pools, int(facts.kept.sum())
    rows, downloaded = int(pools["rows"].sum()), int(pools["downloaded"].sum())
    worst = pools.loc[pools["success_rate"].idxmin()]
    detail = f"lowest in pool {worst['pool']}: {worst['downloaded']} of {worst['rows']} rows"
    found.add("download.success_rate", downloaded / max(rows, 1), rows, detail)
    found.add("download.success_rate_min", float(worst["success_rate"]), int(worst["rows"]), detail)
    detail = f"{kept} of {rows} rows, {downloaded} of them downloaded"
    found.add("selection.kept", kept, rows, detail)
    found.add("selection.kept_fraction", kept / max(rows, 1), rows, detail)
    found.add("selection.kept_of_downloaded", kept / max(downloaded, 1), downloaded, detail)
    astray = int(pools[["rows_without_decision", "decisions_without_row"]].to_numpy().sum())
    found.add("selection.unaccounted", astray, rows, f"{astray} rows without a decision or decisions without a row")
    # Of all rows, not the kept ones: a threshold that somebody moved is no drift of the data.
    scored = int(np.isfinite(facts.scores).sum())
    for name, value in drift.quantiles(facts.scores).items():
        found.add(name, value, scored, f"of {scored} rows with a score")
    for name, count in sorted(facts.languages.items(), key=lambda item: (-item[1], item[0]))[:MOST_LANGUAGES]:
        found.add(f"{drift.LANGUAGE}{name}", count / max(kept, 1), kept, f"{count} of {kept} kept rows")
    overlap = int(facts.overlap.sum())
    detail = f"{overlap} of {kept} kept rows show one of {facts.evaluation_images} evaluation pictures"
    found.add("evaluation.overlap", overlap / max(kept, 1), kept, detail)
    found.add("evaluation.overlap_rows", overlap, kept, detail)


def _bias_metrics(found: _Metrics, table: dict) -> None:
    for name, grouping in table["groupings"].items():
        _grouping_metrics(found, f"bias.{name}", grouping)
        _association_metrics(found, f"bias.{name}", [r for r in table["associations"] if r["grouping"] == name])
    breaches = [name for name, grouping in table["groupings"].items() if grouping["impact"]["breach"]]
    found.add("bias.breaches", len(breaches), len(table["groupings"]), ", ".join(breaches) or "none")
    told = "; ".join(map(_say_rule, table["rules"])) or "none"
    found.add("bias.rules", len(table["rules"]), sum(len(g["steps"]) for g in table["groupings"].values()), told)
    found.add("bias.findings", len(table["findings"]), table["tests"], _say_findings(table["findings"]))


def _grouping_metrics(found: _Metrics, name: str, grouping: dict) -> None:
    whole, tested = grouping["impact"], [group for group in grouping["groups"] if group["tested"]]
    n, detail = sum(group["total"] for group in tested), _say_impact(grouping)
    for label, value in NO_CLAIM.items():
        found.add(f"{name}.{label}", value, 0, "nothing is large enough to be tested")
    found.add(f"{name}.groups_tested", whole["groups"], n, ", ".join(group["group"] for group in tested) or "none")
    if whole["ratio"] is not None:
        found.add(f"{name}.impact_ratio", whole["ratio"], n, detail)
    found.add(f"{name}.impact_ratio_upper", whole["high"], n, detail)
    found.add(f"{name}.impact_ratio_lower", whole["low"], n, detail)
    _rule_metrics(found, name, grouping["steps"], n)
    amplified = [group for group in tested if group["amplification"] is not None]
    bounds = ("amplification_max", max, "amplification"), ("amplification_min", min, "amplification")
    bounds += ("amplification_max_lower", max, "amplification_lower_of_all"),
    bounds += ("amplification_min_upper", min, "amplification_upper_of_all"),
    bounds += ("representation_min", min, "share_after"),
    for label, pick, key in bounds if amplified else ():
        group = pick(amplified, key=lambda group: group[key])
        found.add(f"{name}.{label}", group[key], group["total"], _say_amplified(group))
    for label, key in (("score_gap", "ks"), ("score_gap_lower", "ks_lower")):
        gaps = [group for group in tested if group["scores"]["ks"] is not None]
        if gaps:
            group = max(gaps, key=lambda group: group["scores"][key])
            told = f"{group['group']}: mean {group['scores']['mean']:.3f}, the rest {group['scores']['rest_mean']:.3f}"
            found.add(f"{name}.{label}", group["scores"][key], group["scores"]["n"], told)
    for group in amplified:
        for key in ("share_before", "share_after", "retention", "amplification"):
            found.add(f"{name}.{group['group']}.{key}", group[key], group["total"], _say_amplified(group))


def _rule_metrics(found: _Metrics, name: str, steps: Sequence[dict], n: int) -> None:
    """The worst of all rules, and each rule by its name."""
    for step in steps:
        rule = f"{name}.rule.{step['reason']}"
        found.add(f"{rule}.impact_ratio_upper", step["alone"]["high"], n, _say_step(step))
        found.add(f"{rule}.gap_lower", step["drops"]["low"], n, _say_drops(step))
    if steps:
        step = min(steps, key=lambda step: step["alone"]["high"])
        found.add(f"{name}.rule_impact_ratio_upper", step["alone"]["high"], n, _say_step(step))
        step = max(steps, key=lambda step: step["drops"]["low"])
        found.add(f"{name}.rule_gap_lower", step["drops"]["low"], n, _say_drops(step))


def _association_metrics(found: _Metrics, name: str, records: Sequence[dict]) -> None:
    """How far selection moved the association of a group and an attribute: the largest, and beyond noise."""
    tested = [record for record in records if record["p"] is not None]
    for label, key in (("npmi_shift", "shift"), ("npmi_shift_lower", "shift_lower_of_all")):
        if tested:
            record = max(tested, key=lambda record: abs(record[key]))
            moved = f"{record['before']:.3f} before, {record['after']:.3f} after"
            told = f"{record['group']} and {record['attribute']}: {moved}"
            found.add(f"{name}.{label}", abs(record[key]), record["together_before"], told)


def _say_step(step: dict) -> str:
    alone = step["alone"]
    if alone["ratio"] is None:
        return f"rule {step['reason']}: fewer than two groups that are large enough reach it"
    ratio = f"ratio {alone['ratio']:.3f} [{alone['low']:.3f}, {alone['high']:.3f}]"
    return f"rule {step['reason']} passes {alone['worst']} against {alone['best']} at {ratio}"


def _say_drops(step: dict) -> str:
    drops = step["drops"]
    if drops["gap"] is None:
        return f"rule {step['reason']}: fewer than two groups that are large enough reach it"
    told = f"drop rates differ by {drops['gap']:.3f}, surely by {drops['low']:.3f}"
    return f"rule {step['reason']}: {told} ({drops['worst']} against {drops['best']})"


def _say_rule(rule: dict) -> str:
    told = (
        f"{rule['reason']} drops {rule['rate']:.3f} of {rule['reached']} {rule['grouping']}={rule['group']}, "
        f"{rule['against_rate']:.3f} of {rule['against']}"
    )
    uids = [sample["uid"] for sample in rule.get("samples", ())[:2]]
    return f"{told}, such as {', '.join(uids)}" if uids else told


def _say_impact(grouping: dict) -> str:
    whole, groups = grouping["impact"], {group["group"]: group for group in grouping["groups"]}
    if whole["ratio"] is None:
        return "not known: fewer than two groups are large enough, or nothing is kept"
    worst, best = groups[whole["worst"]], groups[whole["best"]]
    told = (
        f"{worst['group']} keeps {worst['retention']:.3f} of {worst['total']} rows, "
        f"{best['group']} {best['retention']:.3f} of {best['total']}: "
        f"ratio {whole['ratio']:.3f} [{whole['low']:.3f}, {whole['high']:.3f}]"
    )
    rule = max(worst["reasons"], key=lambda rule: rule["excess"], default=None)
    if rule is None or rule["excess"] <= 0:
        return told
    rates = f"{rule['rate']:.3f} of {rule['reached']} {worst['group']}, {rule['rest_rate']:.3f} of the rest"
    return f"{told}; rule {rule['reason']} drops {rates}"


def _say_amplified(group: dict) -> str:
    return f"{group['group']}: share {group['share_before']:.3f} before, {group['share_after']:.3f} after"


def _say_findings(findings: Sequence[dict]) -> str:
    told = [
        f"{one['grouping']}={one['group']} {one['reason'] or one['kind']} {one['effect']:+.3f}, q {one['q']:.2g}"
        for one in findings[:3]
    ]
    return "; ".join(told) or "none"
