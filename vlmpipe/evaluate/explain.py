"""What stands behind a verdict: what each rule asked and found, and the samples that spoke against the challenger.

Shapes: N samples, M counts.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
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
from vlmpipe.evaluate.store import CHALLENGER, CHAMPION, FORMS, RECOMPUTED, SCORES, Store, read_scores

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
        part = check["slice"]
        key = check["metric"], (part["name"], part["value"]) if part else None
        if check["verdict"] != PASS and check["metric"] in store.metrics:
            behind.setdefault(key, []).append(check)
    if verdict["evaluation"] not in (None, store.evaluation):
        return [Finding(*key, tuple(checks), note=STALE) for key, checks in behind.items()]
    load = cache(partial(measured, store))  # rules on many slices share a metric
    found = (_found(store, load, *key, tuple(checks), limit) for key, checks in behind.items())
    return [finding for finding in found if finding is not None]


@dataclass(frozen=True, eq=False)
class Measured:
    """A metric's samples: by model their counts [N, M], and the metric [N] of each sample alone."""

    form: str
    ids: tuple[str, ...]
    slices: tuple[Mapping[str, str], ...]
    counts: Mapping[str, np.ndarray]
    values: Mapping[str, np.ndarray]

    def part(self, part: tuple[str, str]) -> "Measured":
        """The samples that have this value of this slice."""
        places = [place for place, slices in enumerate(self.slices) if slices.get(part[0]) == part[1]]
        ids, slices = (tuple(each[place] for place in places) for each in (self.ids, self.slices))
        both = self.counts, self.values
        counts, values = ({model: array[places] for model, array in each.items()} for each in both)
        return Measured(self.form, ids, slices, counts, values)


def measured(store: Store, metric: str) -> Measured:
    """Of both models, or of the challenger where the champion has no scores.

    Raises:
        UserError: the models' samples differ, or a count is NaN.
    """
    if metric in store.metrics_of(CHAMPION):
        found = store.pair(metric)
        counts = {CHALLENGER: found.challenger_NM, CHAMPION: found.champion_NM}
    else:
        found = store.scored(metric)
        counts = {CHALLENGER: found.counts_NM}
    alone = {model: store.values(metric, model) for model in counts}
    values = {model: np.array([each[key] for key in found.ids]) for model, each in alone.items()}
    return Measured(found.form, found.ids, found.slices, counts, values)


def _found(
    store: Store, load: Callable[[str], Measured], metric: str, part: tuple[str, str] | None, checks: tuple, limit: int
) -> Finding | None:
    """None where the slice has no samples."""
    try:
        found = load(metric) if part is None else load(metric).part(part)
    except UserError as error:
        return Finding(metric, part, checks, note=str(error))
    return _finding(store, found, metric, part, checks, limit) if found.ids else None


def _finding(
    store: Store, found: Measured, metric: str, part: tuple[str, str] | None, checks: tuple, limit: int
) -> Finding:
    sign, compared = -1.0 if lower_is_better(metric) else 1.0, CHAMPION in found.counts
    loss_N = sign * (losses(found) if compared else -found.values[CHALLENGER])
    worse, better = len(loss_N), 0
    if compared:
        worse, better = int((loss_N > SAME).sum()), int((loss_N < -SAME).sum())
    # NaN says nothing, so it comes last.
    order = np.argsort(-np.nan_to_num(loss_N, nan=-np.inf), kind="stable")[: min(worse, limit)]
    samples = _shown(store, found, metric, order.tolist())
    return Finding(metric, part, checks, compared, worse, better, len(loss_N) - worse - better, samples)


def losses(found: Measured) -> np.ndarray:
    """[N]: how much larger the metric would be with the champion's answer to this sample and the challenger's to all
    others. Of a metric whose counts don't add up: how much larger the champion's is on this sample alone."""
    if found.form in RECOMPUTED:
        return np.nan_to_num(found.values[CHAMPION] - found.values[CHALLENGER])
    form, ours_NM, theirs_NM = FORMS[found.form], found.counts[CHALLENGER], found.counts[CHAMPION]
    sums_M = ours_NM.sum(axis=0)
    return np.nan_to_num(form(sums_M - ours_NM + theirs_NM) - form(sums_M))


def _shown(store: Store, found: Measured, metric: str, places: Sequence[int]) -> tuple[Shown, ...]:
    task, which = metric.partition(".")[0], "wrong_" if WRONG in metric else ""
    ids = [found.ids[place] for place in places]
    rows = {model: _rows(store.directory / ROWS[model], task, ids) for model in found.counts}
    shown = []
    for place, key in zip(places, ids):
        row = rows[CHALLENGER][key]
        said = {model: Answer(rows[model][key][f"{which}prediction"], _finite(found.values[model][place]))
                for model in found.counts}
        shown.append(Shown(
            key, tuple(row[f"{which}images"]), row["question"], tuple(row["answers"]), dict(row["slices"]),
            said[CHALLENGER], said.get(CHAMPION),
        ))
    return tuple(shown)


def _rows(path: Path, task: str, ids: Sequence[str]) -> dict[str, dict]:
    wanted = (pc.field("task") == task) & pc.field("sample_id").isin(pa.array(ids, pa.string()))
    return {row["sample_id"]: row for row in pq.read_table(path, filters=wanted).to_pylist()}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
