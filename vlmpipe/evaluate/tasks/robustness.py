"""Robustness: how much of a task's accuracy is left with worse pictures.

The base task is that of the records: questions, classes, statements or referring expressions.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from vlmpipe.data.task import TaskConfig
from vlmpipe.evaluate.store import Counts
from vlmpipe.evaluate.tasks.base import EvaluateConfig, Sample, Scores, means
from vlmpipe.evaluate.tasks.conditions import hits, predict_under, read_base, score_under
from vlmpipe.evaluate.tasks.corruptions import worsen
from vlmpipe.models import Processor, VisionLanguageModel

OWN = ("accuracy", "accuracy_wrong_image", "accuracy_blind", "gain_over_blind")  # of the base task's metrics


def read_robustness(split: Path, files: TaskConfig) -> list[Sample]:
    return read_base(split, files, "robustness")


def predict_robustness(
    model: VisionLanguageModel, processor: Processor, batch: Sequence[Sample], right: Sequence, wrong: Sequence,
    config: EvaluateConfig,
) -> list[dict]:
    """What the model says with the right and the wrong picture, and with the right one under each condition."""
    worse = {name: [_worse(seen, name, sample.image) for seen, sample in zip(right, batch, strict=True)]
             for name in config.robustness.conditions}
    return predict_under(model, processor, batch, right, wrong, worse, config)


def _worse(seen, condition: str, name):
    """Of several pictures all. Noise goes by the picture: samples about one picture may be asked with one copy."""
    if isinstance(seen, tuple):
        return tuple(worsen(picture, condition, str(one)) for picture, one in zip(seen, name, strict=True))
    return worsen(seen, condition, str(name))


def score_robustness(samples: list[Sample], rows: list[dict]) -> Scores:
    """The base task's own accuracy; that under each condition, of each corruption over its severities and of all; and
    the relative drop, 1 - accuracy / clean accuracy, in all and of each."""
    clean = score_under(samples, rows)
    right = hits(clean)
    under = {name: hits(score_under(samples, rows, name)) for name in rows[0]["under"]}
    counts = {name: found for name, found in clean.counts.items() if name in OWN}
    for name, group in groups(list(under)).items():
        left = {key: sum(under[condition][key] for condition in group) / len(group) for key in right}
        counts[f"accuracy.{name}"] = means(left)
        counts |= dropped(f"drop.{name}" if name != "corrupted" else "drop", right, left)
    return Scores.of(counts, clean.rows)


def groups(conditions: Sequence[str]) -> dict[str, list[str]]:
    """The conditions of each corruption, of each by itself where there are several severities, and all of them."""
    found: dict[str, list[str]] = {}
    for name in conditions:
        kind = name.rpartition("_")[0]
        found.setdefault(name if kind == "resolution" else kind, []).append(name)
    several = {name: [name] for group in found.values() if len(group) > 1 for name in group}
    return {**found, **several, "corrupted": list(conditions)}


def dropped(name: str, right: Mapping[str, float], left: Mapping[str, float]) -> dict[str, Counts]:
    """Nothing where nothing was right to begin with: what is no number has no drop."""
    if not any(right.values()):
        return {}
    return {name: Counts("ratio", {key: (hit - left[key], hit) for key, hit in right.items()})}
