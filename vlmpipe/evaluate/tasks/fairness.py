"""Fairness: are groups shown first, associated or served differently?

Groups are columns of a table beside the annotations (`data.groups`). The task `fairness` ranks pictures for texts that
name no group and measures associations; `group_gaps` compares the groups by what any other task scored.

Shapes: B pictures.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmpipe.config import parse, to_dict
from vlmpipe.data.groups import groups_of, read_groups
from vlmpipe.data.task import TaskConfig
from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import association, max_skew, ndkl, worst_group
from vlmpipe.evaluate.tasks.base import EvaluateConfig, Sample, Scores, file_id, own_names, slug
from vlmpipe.evaluate.tasks.options import Association, FairnessConfig
from vlmpipe.evaluate.tasks.pairs import pair_scores
from vlmpipe.models import Processor, VisionLanguageModel

SHUFFLES = 200  # rankings by lot, whose mean says what chance gives


def read_grouped(split: Path, task: TaskConfig) -> list[Sample]:
    """One sample per picture of the table, its groups as slices.

    Raises:
        UserError: there is no table.
    """
    groups = read_groups(split)
    if not groups:
        raise UserError(f"{split}: found no groups.csv; expected a table of pictures and their groups; docs/tasks.md "
                        f"has its format")
    return [Sample(file_id(name), name, (), "", (", ".join(own.values()),), own) for name, own in groups.items()]


def with_groups(samples: Sequence[Sample], split: Path) -> list[Sample]:
    """The samples with their picture's groups among their slices; several pictures count where they are of one, and
    examples from training don't."""
    groups = read_groups(split)
    return [replace(sample, slices={**sample.slices, **shared_groups(sample, groups)}) for sample in samples]


def shared_groups(sample: Sample, groups: Mapping[str, dict[str, str]]) -> dict[str, str]:
    first, *others = (groups_of(name, groups) for name in own_names(sample))
    return {column: group for column, group in first.items() if all(own.get(column) == group for own in others)}


def predict_fairness(
    model: VisionLanguageModel, processor: Processor, batch: Sequence[Sample], right: Sequence[Image.Image],
    wrong: Sequence, config: EvaluateConfig,
) -> list[dict]:
    """How well each query fits each picture; how much nearer the picture is to one list of texts than to the other."""
    asked = config.fairness
    texts = list(dict.fromkeys([
        *asked.queries, *(text for one in asked.associations.values() for text in (*one.nearer, *one.further))
    ]))
    scored = pair_scores(model, processor, right, [texts] * len(right), config.batch_size)
    rows = []
    for sample, values in zip(batch, scored, strict=True):
        fits = dict(zip(texts, values, strict=True))
        leaning = {
            name: leans(fits, one) for name, one in asked.associations.items()
            if sample.slices.get(one.column) in (one.first, one.second)
        }
        queries = [fits[text] for text in asked.queries]
        rows.append({"queries": queries, "leaning": leaning, "asked": to_dict(asked)})
    return rows


def leans(fits: Mapping[str, float], one: Association) -> float:
    return float(np.mean([fits[text] for text in one.nearer]) - np.mean([fits[text] for text in one.further]))


# --- scores ------------------------------------------------------------------------------------------------

def score_fairness(samples: list[Sample], rows: list[dict]) -> Scores:
    """For each column MaxSkew@K and NDKL, the means over the queries, and what rankings by lot have; each association's
    effect size and p. A column that can't be ranked has no metrics, and `details` says why.

    Raises:
        UserError: nothing can be measured.
    """
    asked = parse(FairnessConfig, rows[0]["asked"], "evaluate.fairness")
    metrics: dict[str, float] = {}
    n: dict[str, int] = {}
    details: dict[str, Any] = {}
    for column in asked.columns or sorted({name for sample in samples for name in sample.slices}):
        try:
            found, details[column], count = rankings(samples, rows, column, asked)
        except UserError as error:
            details[column] = {"unknown": str(error)}
            continue
        metrics |= {f"{slug(column)}.{name}": value for name, value in found.items()}
        n |= {f"{slug(column)}.{name}": count for name in found}
    for name, one in asked.associations.items():
        sides = [
            {sample.id: row["leaning"][name] for sample, row in zip(samples, rows, strict=True)
             if sample.slices.get(one.column) == group}
            for group in (one.first, one.second)
        ]
        result = association(*sides, asked.permutations, asked.seed)
        own = {f"association.{slug(name)}.effect": result.value, f"association.{slug(name)}.p": result.details["p"]}
        metrics, n = metrics | own, n | dict.fromkeys(own, sum(map(len, sides)))
        details[f"association.{slug(name)}"] = result.details
    if not metrics:
        raise UserError(next((found["unknown"] for found in details.values()), "evaluate.fairness: found no columns"))
    return Scores(metrics, n, {sample.id: {} for sample in samples}, details)


def rankings(
    samples: Sequence[Sample], rows: Sequence[Mapping], column: str, asked: FairnessConfig
) -> tuple[dict[str, float], dict[str, Any], int]:
    """Of one column: its metrics, each query's own, and how many pictures were ranked. Ties are ranked by lot: the
    table may stand in the order of its groups."""
    places, shares, small = population(samples, column, asked)
    groups = np.array([samples[place].slices[column] for place in places])
    queries, generator = {}, np.random.default_rng(asked.seed)
    for number, text in enumerate(asked.queries):
        scores = np.array([rows[place]["queries"][number] for place in places])
        lot = generator.permutation(len(places))
        ranked = groups[lot[np.argsort(-scores[lot], kind="stable")]].tolist()
        skew = max_skew(ranked, shares, asked.k).details["skew"]
        # Minus infinity is none of json's numbers.
        skew = {group: value if np.isfinite(value) else None for group, value in skew.items()}
        queries[text] = both(ranked, shares, asked.k) | {"skew": skew}
    lots = [both(generator.permutation(groups).tolist(), shares, asked.k) for _ in range(SHUFFLES)]
    metrics = {name: float(np.mean([found[name] for found in queries.values()])) for name in lots[0]}
    metrics |= {f"{name}_blind": float(np.mean([found[name] for found in lots])) for name in lots[0]}
    return metrics, {"queries": queries, "shares": shares, "small": small}, len(places)


def population(
    samples: Sequence[Sample], column: str, asked: FairnessConfig
) -> tuple[list[int], dict[str, float], list[str]]:
    """The places of the samples that are ranked, the share of each group among them, and the groups that are too small.

    Raises:
        UserError: fewer than two groups are large enough, or there are no more pictures than K.
    """
    sizes = Counter(sample.slices[column] for sample in samples if column in sample.slices)
    large = {group: size for group, size in sorted(sizes.items()) if size >= asked.minimum}
    places = [place for place, sample in enumerate(samples) if sample.slices.get(column) in large]
    if len(large) < 2 or len(places) <= asked.k:
        raise UserError(
            f"evaluate.fairness: found {len(places)} pictures of the groups {dict(sizes)} of '{column}'; expected two "
            f"groups of at least minimum {asked.minimum}, and more pictures than k {asked.k}; lower them, or name "
            f"other columns"
        )
    shares = {group: size / len(places) for group, size in large.items()}
    return places, shares, sorted(sizes.keys() - large.keys())


def both(ranking: Sequence[str], shares: Mapping[str, float], k: int) -> dict[str, float]:
    return {f"max_skew@{k}": max_skew(ranking, shares, k).value, "ndkl": ndkl(ranking, shares).value}


# --- any task by group -------------------------------------------------------------------------------------

def group_gaps(
    task: str, samples: Sequence[Sample], scores: Scores, clusters: Mapping[str, str], config: FairnessConfig
) -> dict[str, dict[str, Any]]:
    """For each of `config.columns` the task's first metric in its worst group, and the gap to the best: `metrics`, `n`
    and `details` by full names, `fairness.TASK.COLUMN.worst`, `.gap`, and the ends of their intervals.

    Nothing for a task whose first metric is no mean of samples, and for a column with fewer than two groups that are
    large enough: a rule on them fails for what is missing, and `details` says why.
    """
    found: dict[str, dict[str, Any]] = {"metrics": {}, "n": {}, "details": {}}
    metric, counts = next(iter(scores.counts.items()), (None, None))
    if counts is None or counts.form != "ratio":
        return found
    values = {key: one[0] / one[1] for key, one in counts.samples.items() if one[1]}
    reach = 1.0 if all(0 <= value <= 1 for value in values.values()) else None
    for column in config.columns:
        groups = {s.id: s.slices[column] for s in samples if column in s.slices and s.id in values}
        name = f"fairness.{task}.{slug(column)}"
        try:
            result = worst_group(
                {key: values[key] for key in groups}, groups, config.minimum, {key: clusters[key] for key in groups},
                seed=config.seed, reach=reach,
            )
        except UserError as error:
            found["details"][name] = {"metric": metric, "unknown": str(error)}
            continue
        ends = {"worst_low": "low", "worst_high": "high", "gap": "gap", "gap_low": "gap_low", "gap_high": "gap_high"}
        own = {"worst": result.value} | {end: result.details[key] for end, key in ends.items()}
        found["metrics"] |= {f"{name}.{end}": value for end, value in own.items()}
        found["n"] |= {f"{name}.{end}": len(groups) for end in own}
        found["details"][name] = {"metric": metric, **result.details}
    return found
