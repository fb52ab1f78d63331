"""What stands behind a verdict: what each rule asked and found, and the samples that spoke against the challenger.

Shapes: N samples, M counts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmpipe.errors import UserError
from vlmpipe.evaluate.compare import lower_is_better
from vlmpipe.evaluate.judge import PASS
from vlmpipe.evaluate.rules import CEILING, FLOOR, GAIN, MARGIN
from vlmpipe.evaluate.store import CHALLENGER, CHAMPION, FORMS, RECOMPUTED, SCORES, Pair, Store, read_scores

RATES = "rates"
ROWS = {CHALLENGER: "samples.parquet", CHAMPION: "champion.parquet"}
ASKED = {
    FLOOR: "≥ {:.4g}", CEILING: "≤ {:.4g}", MARGIN: "drop < {:.4g}", GAIN: "gain > {:.4g}",
}
WRONG = "_wrong_image"  # in the names of metrics of what was said to another picture
STALE = "the samples are of another evaluation than the verdict; rerun the gate"
# Two models' numbers of the same counts differ by less.
SAME = 1e-12


# --- the rules ---------------------------------------------------------------------------------------------

def title(check: Mapping[str, Any]) -> str:
    """`color · question_type = color`: the rule and its slice."""
    within = check["slice"]
    return f"{check['name']} · {within['name']} = {within['value']}" if within else check["name"]


def asked(check: Mapping[str, Any]) -> str:
    """`drop < 0.02`: what the rule wants of its metric."""
    asked = check["limit"] if check["margin"] is None else check["margin"]
    return "–" if asked is None else ASKED[check["rule"]].format(asked)


def bound(check: Mapping[str, Any]) -> float | None:
    """What the difference must lie above; None where the rule asks for no difference."""
    if check["margin"] is None:
        return None
    return check["margin"] if check["rule"] == GAIN else -check["margin"]


def scales(checks: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The checks that have an interval by what can stand on one scale: rates together, of the others each metric."""
    found: dict[str, list] = {}
    for check in checks:
        if check["interval"] is not None:
            rates = all(0 <= (check[side] or 0) <= 1 for side in ("value", "champion"))
            found.setdefault(RATES if rates else check["metric"], []).append(check)
    return found


# --- the samples -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Answer:
    """What a model said to a sample, and the rule's metric of this sample alone (None: it is nothing alone)."""

    text: str | None
    value: float | None


@dataclass(frozen=True)
class Shown:
    """A sample that speaks against the challenger; `champion` is None where there is no champion."""

    sample_id: str
    images: tuple[str, ...]
    question: str
    truth: tuple[str, ...]
    slices: dict[str, str]
    challenger: Answer
    champion: Answer | None


@dataclass(frozen=True)
class Finding:
    """The samples behind the checks of one metric and slice that did not pass, the worst first.

    worse, better, same: how many samples speak against the challenger, for it, and for neither. Without a champion
    (`compared` false) they are not told apart: all count as worse, and the lowest come first. note: why there is
    nothing to show.
    """

    metric: str
    slice: tuple[str, str] | None
    checks: tuple[Mapping[str, Any], ...]
    compared: bool = False
    worse: int = 0
    better: int = 0
    same: int = 0
    samples: tuple[Shown, ...] = ()
    note: str | None = None


def findings(verdict: Mapping[str, Any], evaluation: Path, limit: int) -> list[Finding]:
    """For each metric and slice with a rule that did not pass, at most `limit` samples, the worst first.

    Metrics without a score for each sample (of the audit, of costs) have none, and neither has a gate whose
    evaluation isn't there. Scores that can't be compared (NaN, other samples) are often why a rule failed: they are
    told and not raised, and so is an evaluation that ran after the gate.
    """
    if not (Path(evaluation) / SCORES).exists():
        return []
    store = read_scores(evaluation)
    behind: dict[tuple, list] = {}
    for check in verdict["rules"]:
        within = check["slice"]
        key = check["metric"], (within["name"], within["value"]) if within else None
        if check["verdict"] != PASS and _has(store, *key):
            behind.setdefault(key, []).append(check)
    if verdict["evaluation"] not in (None, store.evaluation):
        return [Finding(*key, tuple(checks), note=STALE) for key, checks in behind.items()]
    return [_found(store, *key, tuple(checks), limit) for key, checks in behind.items()]


def _has(store: Store, metric: str, within: tuple[str, str] | None) -> bool:
    return metric in store.metrics and (within is None or within[1] in store.slice_values(metric, within[0]))


def _found(store: Store, metric: str, within: tuple[str, str] | None, checks: tuple, limit: int) -> Finding:
    try:
        return _finding(store, metric, within, checks, limit)
    except UserError as error:
        return Finding(metric, within, checks, note=str(error))


def _finding(store: Store, metric: str, within: tuple[str, str] | None, checks: tuple, limit: int) -> Finding:
    sign = -1.0 if lower_is_better(metric) else 1.0
    values = {model: store.values(metric, model) for model in ROWS if metric in store.metrics_of(model)}
    if CHAMPION in values:
        pair = store.pair(metric, within)
        ids, loss_N = pair.ids, sign * losses(pair, values)
        worse, better = int((loss_N > SAME).sum()), int((loss_N < -SAME).sum())
    else:
        ids = store.scored(metric, CHALLENGER, within).ids
        loss_N = -sign * np.array([values[CHALLENGER][key] for key in ids])
        worse, better = len(ids), 0
    # NaN says nothing, so it comes last.
    order = np.argsort(-np.nan_to_num(loss_N, nan=-np.inf), kind="stable")[: min(worse, limit)]
    samples = _shown(store, metric, [ids[place] for place in order], values)
    return Finding(metric, within, checks, CHAMPION in values, worse, better, len(ids) - worse - better, samples)


def losses(pair: Pair, values: Mapping[str, Mapping[str, float]]) -> np.ndarray:
    """[N]: how much larger the metric would be with the champion's answer to this sample and the challenger's to all
    others. Of a metric whose counts don't add up: how much larger the champion's is on this sample alone.

    Args:
        values: of each model, the metric of each sample alone.
    """
    if pair.form in RECOMPUTED:
        each = ([values[model][key] for key in pair.ids] for model in (CHAMPION, CHALLENGER))
        return np.nan_to_num(np.subtract(*each))
    form, sums_M = FORMS[pair.form], pair.challenger_NM.sum(axis=0)
    return np.nan_to_num(form(sums_M - pair.challenger_NM + pair.champion_NM) - form(sums_M))


def _shown(
    store: Store, metric: str, ids: Sequence[str], values: Mapping[str, Mapping[str, float]]
) -> tuple[Shown, ...]:
    task = metric.partition(".")[0]
    rows = {model: _rows(store.directory / ROWS[model], task, ids) for model in values}
    which = "wrong_" if WRONG in metric else ""
    found = []
    for key in ids:
        row = rows[CHALLENGER][key]
        said = {model: Answer(rows[model][key][f"{which}prediction"], _finite(values[model][key])) for model in values}
        found.append(Shown(
            key, tuple(row[f"{which}images"]), row["question"], tuple(row["answers"]), dict(row["slices"]),
            said[CHALLENGER], said.get(CHAMPION),
        ))
    return tuple(found)


def _rows(path: Path, task: str, ids: Sequence[str]) -> dict[str, dict]:
    wanted = (pc.field("task") == task) & pc.field("sample_id").isin(pa.array(ids, pa.string()))
    return {row["sample_id"]: row for row in pq.read_table(path, filters=wanted).to_pylist()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
