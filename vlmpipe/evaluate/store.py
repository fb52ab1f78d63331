"""The score store: what each sample gives to each metric, so that a metric can be had again over any of the samples.

`OUT/scores.parquet` has a row for each model, metric and sample: `counts` that add up, and the `form` that makes the
metric of their sums. `OUT/evaluation.json` says what was scored, by which protocol. docs/tasks.md lists both.

Shapes: B draws of samples, N samples, M counts.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmpipe.config import nearest
from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics.judgements import roc_area
from vlmpipe.evaluate.metrics.matches import average_precision
from vlmpipe.evaluate.metrics.vqa import ranked_precision
from vlmpipe.shards import read_json, write_tables

SCORES, EVALUATION = "scores.parquet", "evaluation.json"
CHALLENGER, CHAMPION = "challenger", "champion"
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("model", "metric", "form", "sample_id", "cluster")]
    + [("slices", pa.map_(pa.string(), pa.string())), ("counts", pa.list_(pa.float64()))]
)


# --- forms -------------------------------------------------------------------------------------------------

def ratio(sums: np.ndarray) -> np.ndarray:
    """A sum by another; NaN where that is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def f1(sums: np.ndarray) -> np.ndarray:
    """2 tp / (2 tp + fp + fn) of [tp, fp, fn]."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 2 * sums[..., 0] / (2 * sums[..., 0] + sums[..., 1] + sums[..., 2])


def bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU of [right n-grams for n = 1.., n-grams for n = 1.., words, words of the closest references], with the
    official scorer's constants; see `metrics.bleu`."""
    orders = (sums.shape[-1] - 2) // 2
    right, written = sums[..., :orders], sums[..., orders : 2 * orders]
    length, closest = sums[..., -2], sums[..., -1]
    share = (length + 1e-15) / (closest + 1e-9)
    brevity = np.where(share < 1, np.exp(1 - 1 / share), 1.0) * (length > 0)
    return np.prod((right + 1e-15) / (written + 1e-9), axis=-1) ** (1 / orders) * brevity


def calibration(sums: np.ndarray) -> np.ndarray:
    """The absolute sums of bins over the number of samples; see `metrics.calibration_counts`."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.abs(sums[..., :-1]).sum(axis=-1) / sums[..., -1]


def gap(sums: np.ndarray) -> np.ndarray:
    """One ratio minus another, of [sum, number, other sum, other number]."""
    return ratio(sums[..., :2]) - ratio(sums[..., 2:])


# From sums of counts [..., M] to a metric [...].
FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ratio": ratio, "exp_ratio": lambda sums: np.exp(ratio(sums)), "f1": f1, "bleu": bleu, "gap": gap,
    "calibration": calibration,
}
# Metrics whose counts don't add up: from weights [B, N] (how often each sample is drawn) and counts [N, M] to [B].
RECOMPUTED: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "average_precision": average_precision, "ranked_precision": ranked_precision, "roc_area": roc_area,
}


def metric_of(form: str, weights_BN: np.ndarray, counts_NM: np.ndarray) -> np.ndarray:
    """The metric [B] of each draw of the samples."""
    if form in RECOMPUTED:
        return RECOMPUTED[form](weights_BN, counts_NM)
    return FORMS[form](weights_BN @ counts_NM)


def whole(form: str, counts_NM: np.ndarray) -> float:
    """The metric over all samples; the same to the last bit in whatever order they are."""
    if form in RECOMPUTED:
        return float(metric_of(form, np.ones((1, len(counts_NM))), counts_NM)[0])
    return float(FORMS[form](np.array([math.fsum(column) for column in counts_NM.T])))


# --- what is written and read ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Counts:
    """What each sample (by id) gives to a metric of this form; a sample that isn't there gives nothing."""

    form: str
    samples: Mapping[str, Sequence[float]]

    @property
    def value(self) -> float:
        """The metric over all samples."""
        return whole(self.form, padded(list(self.samples.values())))


@dataclass(frozen=True, eq=False)
class Scored:
    """A metric's samples, of one model.

    clusters_N: samples of the same pictures have the same one. counts_NM: rows of unequal length end in zeros.
    """

    form: str
    ids: tuple[str, ...]
    clusters_N: np.ndarray
    counts_NM: np.ndarray
    slices: tuple[dict[str, str], ...]

    @property
    def value(self) -> float:
        return whole(self.form, self.counts_NM)

    def take(self, places: Sequence[int]) -> "Scored":
        kept = tuple(self.ids[place] for place in places), tuple(self.slices[place] for place in places)
        return Scored(self.form, kept[0], self.clusters_N[places], self.counts_NM[places], kept[1])


@dataclass(frozen=True, eq=False)
class Pair:
    """Both models' counts of the same samples, in the same order; see `Scored`."""

    form: str
    ids: tuple[str, ...]
    clusters_N: np.ndarray
    challenger_NM: np.ndarray
    champion_NM: np.ndarray
    slices: tuple[dict[str, str], ...]


def tables(
    model: str, counts: Mapping[str, Counts], clusters: Mapping[str, str], slices: Mapping[str, Mapping[str, str]]
) -> Iterable[pa.Table]:
    """The rows of a model: `counts` by the metric's full name, the others by sample id."""
    for metric, found in counts.items():
        same = {"model": model, "metric": metric, "form": found.form}
        ids = list(found.samples)
        columns = {name: pa.array([value] * len(ids), pa.string()) for name, value in same.items()}
        columns["sample_id"] = pa.array(ids, pa.string())
        columns["cluster"] = pa.array([clusters[key] for key in ids], pa.string())
        columns["slices"] = pa.array([sorted(slices[key].items()) for key in ids], SCHEMA.field("slices").type)
        columns["counts"] = pa.array(map(list, found.samples.values()), SCHEMA.field("counts").type)
        yield pa.table(columns, schema=SCHEMA)


def write_scores(directory: Path, parts: Iterable[pa.Table]) -> None:
    """Write `directory`/scores.parquet from `tables`."""
    write_tables(Path(directory) / SCORES, SCHEMA, parts)


def read_scores(directory: Path) -> "Store":
    """The store of an evaluation's folder.

    Raises:
        UserError: there is none.
    """
    path = Path(directory) / SCORES
    if not path.exists():
        raise UserError(f"{path}: found no such file; expected the scores of an evaluation; run `evaluate` first")
    return Store(Path(directory), pq.read_table(path, schema=SCHEMA), read_json(Path(directory) / EVALUATION))


class Store:
    """Scores of one evaluation: the challenger's, and the champion's on the same samples where there was one.

    `evaluation` holds what evaluation.json says.
    """

    def __init__(self, directory: Path, table: pa.Table, evaluation: Mapping[str, Any]):
        self.directory, self.evaluation = directory, evaluation
        self._table = table
        self._scored: dict[tuple[str, str], Scored] = {}

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Metrics of the challenger."""
        return self.metrics_of(CHALLENGER)

    @property
    def champion(self) -> str | None:
        """The champion's version."""
        return self.evaluation.get("champion")

    def metrics_of(self, model: str) -> tuple[str, ...]:
        rows = self._table.filter(pc.field("model") == model)
        return tuple(dict.fromkeys(rows["metric"].to_pylist()))

    def scored(self, metric: str, model: str = CHALLENGER, slice: tuple[str, str] | None = None) -> Scored:
        """A metric's samples, or those whose slice (name, value) it is.

        Raises:
            UserError: there is none, or a count is NaN.
        """
        if (metric, model) not in self._scored:
            self._scored[metric, model] = self._read(metric, model)
        found = self._scored[metric, model]
        return found if slice is None else self._within(found, metric, slice)

    def _read(self, metric: str, model: str) -> Scored:
        rows = self._table.filter((pc.field("model") == model) & (pc.field("metric") == metric))
        if not len(rows):
            known = self.metrics_of(model)
            raise UserError(
                f"{self.directory / SCORES}: found no scores of the {model} for '{metric}'{nearest(metric, known)}; "
                f"expected some; evaluate anew"
            )
        found = Scored(
            rows["form"][0].as_py(), tuple(rows["sample_id"].to_pylist()), np.array(rows["cluster"].to_pylist()),
            padded(rows["counts"].to_pylist()), tuple(map(dict, rows["slices"].to_pylist())),
        )
        if not np.isfinite(found.counts_NM).all():
            raise UserError(f"{self.directory / SCORES}: found NaN or infinity in '{metric}' of the {model}; "
                            f"expected finite numbers; look at the model's output")
        return found

    def _within(self, found: Scored, metric: str, slice: tuple[str, str]) -> Scored:
        name, value = slice
        places = [place for place, slices in enumerate(found.slices) if slices.get(name) == value]
        if not places:
            raise UserError(f"{self.directory / SCORES}: found no sample of '{metric}' with {name}={value}; expected "
                            f"some; see the slices in {SCORES}")
        return found.take(places)

    def pair(self, metric: str, slice: tuple[str, str] | None = None) -> Pair:
        """Both models' counts.

        Raises:
            UserError: a model has no scores there, they are of different samples, or one is NaN.
        """
        ours, theirs = (self.scored(metric, model, slice) for model in (CHALLENGER, CHAMPION))
        place_of = {key: place for place, key in enumerate(theirs.ids)}
        odd = set(ours.ids) ^ place_of.keys()
        if odd:
            raise UserError(f"{self.directory / SCORES}: found {len(odd)} sample(s) of '{metric}' for one model alone, "
                            f"such as '{min(odd)}'; expected the same samples for both; evaluate anew")
        theirs = theirs.take([place_of[key] for key in ours.ids])
        same = ours.form == theirs.form and ours.slices == theirs.slices
        if not same or (ours.clusters_N != theirs.clusters_N).any():
            raise UserError(f"{self.directory / SCORES}: found another form, slices or clusters of '{metric}' for each "
                            f"model; expected the same; evaluate anew")
        width = max(ours.counts_NM.shape[1], theirs.counts_NM.shape[1])
        counts = (np.pad(one.counts_NM, ((0, 0), (0, width - one.counts_NM.shape[1]))) for one in (ours, theirs))
        return Pair(ours.form, ours.ids, ours.clusters_N, *counts, ours.slices)

    def value(self, metric: str, model: str = CHALLENGER, slice: tuple[str, str] | None = None) -> float:
        """The metric over all samples, or over those of a slice."""
        return self.scored(metric, model, slice).value

    def values(self, metric: str, model: str = CHALLENGER) -> dict[str, float]:
        """The metric of each sample alone; NaN where it is nothing alone."""
        found = self.scored(metric, model)
        if found.form in RECOMPUTED:
            each = [metric_of(found.form, np.ones((1, 1)), counts_M[None])[0] for counts_M in found.counts_NM]
        else:
            each = FORMS[found.form](found.counts_NM).tolist()
        return {key: float(value) for key, value in zip(found.ids, each, strict=True)}

    def slice_values(self, metric: str, name: str) -> list[str]:
        """The values that a slice has, in either model's samples of the metric."""
        rows = self._table.filter(pc.field("metric") == metric)
        found = {dict(slices).get(name) for slices in rows["slices"].to_pylist()}
        return sorted(found - {None})


def padded(counts: Sequence[Sequence[float]]) -> np.ndarray:
    """[N, M] of lists of numbers; shorter ones end in zeros."""
    rows_NM = np.zeros((len(counts), max(map(len, counts))))
    for place, row in enumerate(counts):
        rows_NM[place, : len(row)] = row
    return rows_NM
