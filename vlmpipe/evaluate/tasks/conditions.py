"""A task asked again with other pictures in place of the right ones: what such tasks share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlmpipe.data.records import ClassRecord, QuestionRecord, RegionRecord, StatementRecord
from vlmpipe.data.task import TaskConfig
from vlmpipe.evaluate.store import Counts
from vlmpipe.evaluate.tasks.base import EvaluateConfig, Sample, Scores, records_of
from vlmpipe.evaluate.tasks.classes import predict_classes, read_classes, score_classes
from vlmpipe.evaluate.tasks.questions import predict_answers, read_questions, score_answers
from vlmpipe.evaluate.tasks.regions import predict_boxes, read_expressions, score_boxes
from vlmpipe.evaluate.tasks.statements import predict_statements, read_statements, score_statements
from vlmpipe.models import Processor, VisionLanguageModel


@dataclass(frozen=True)
class Base:
    """A task whose rows are what a model says with the `right` and with the `wrong` picture, and which has an
    `accuracy`."""

    read: Callable[[Path, TaskConfig], list[Sample]]
    predict: Callable[..., list[dict]]
    score: Callable[[list[Sample], list[dict]], Scores]


BASES: dict[type, Base] = {
    QuestionRecord: Base(read_questions, predict_answers, score_answers),
    ClassRecord: Base(read_classes, predict_classes, score_classes),
    StatementRecord: Base(read_statements, predict_statements, score_statements),
    RegionRecord: Base(read_expressions, predict_boxes, score_boxes),
}
BY_NAME = {kind.__name__: base for kind, base in BASES.items()}


@dataclass(frozen=True)
class Asked:
    """What a sample's task is based on (the name of its kind of records), and the truth that the base task knows."""

    base: str
    truth: Any = None


def read_base(split: Path, files: TaskConfig, name: str) -> list[Sample]:
    """The samples of the task that fits the records of a split."""
    kind = type(records_of(split, files, tuple(BASES), name)[0])
    return [replace(sample, truth=Asked(kind.__name__, sample.truth)) for sample in BASES[kind].read(split, files)]


def plain(samples: Sequence[Sample]) -> tuple[Base, list[Sample]]:
    """The base task and its own samples."""
    own = [replace(sample, truth=sample.truth.truth) for sample in samples]
    return BY_NAME[samples[0].truth.base], own


def predict_under(
    model: VisionLanguageModel, processor: Processor, batch: Sequence[Sample], right: Sequence, wrong: Sequence,
    shown: Mapping[str, Sequence], config: EvaluateConfig,
) -> list[dict]:
    """The base task's rows, each with `under`: what the model says with the pictures of each condition.

    A base task asks with two lists of pictures, the right and the wrong ones, so that conditions go two by two.
    """
    base, samples = plain(batch)
    rows = [{**row, "under": {}} for row in base.predict(model, processor, samples, right, wrong, config)]
    names = list(shown)
    for first, second in zip(names[::2], [*names[1::2], *names[-1:]]):
        said = base.predict(model, processor, samples, shown[first], shown[second], config)
        for row, found in zip(rows, said, strict=True):
            row["under"] |= {first: found["right"], second: found["wrong"]}
    return rows


def score_under(samples: Sequence[Sample], rows: Sequence[dict], condition: str | None = None) -> Scores:
    """The base task's scores of a condition, or of the right pictures; what else its rows hold is of the latter."""
    base, own = plain(samples)
    return base.score(own, [row if condition is None else {**row, "right": row["under"][condition]} for row in rows])


def renamed(counts: Mapping[str, Counts], old: str, new: str) -> dict[str, Counts]:
    """A metric and its kinds under another name: `old.kind` becomes `new.kind`."""
    return {f"{new}{name.removeprefix(old)}": found for name, found in counts.items()
            if name == old or name.startswith(f"{old}.")}


def hits(scores: Scores) -> dict[str, float]:
    """How right each sample is, 0 to 1."""
    return {key: counts[0] for key, counts in scores.counts["accuracy"].samples.items()}
