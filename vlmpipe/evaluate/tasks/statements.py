"""Statements about pictures: true or false, and whether a sentence is judged right wherever it is said (NLVR2)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from vlmpipe.data.records import StatementRecord
from vlmpipe.data.task import WORDS, TaskConfig
from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import nlvr_consistency
from vlmpipe.evaluate.store import Counts
from vlmpipe.evaluate.tasks.base import EvaluateConfig, Sample, Scores, file_id, means, records_of
from vlmpipe.evaluate.tasks.questions import shown, wrong_pictures
from vlmpipe.models import Processor, VisionLanguageModel
from vlmpipe.models.generate import answer, picture_inputs, to_device
from vlmpipe.models.generate.rows import with_room
from vlmpipe.models.processor import stack

# What a judgement may begin with.
JUDGED = {"yes": WORDS[True], "true": WORDS[True], "no": WORDS[False], "not": WORDS[False], "false": WORDS[False]}


def read_statements(split: Path, task: TaskConfig) -> list[Sample]:
    """One sample per judged statement; the wrong pictures are those of another statement."""
    records = [record for record in records_of(split, task, StatementRecord, "statements") if record.label is not None]
    if not records:
        raise UserError(f"{split}: found no judged statement; expected some; test on a split with labels")
    wrong = wrong_pictures([record.images for record in records], split, task)
    return [
        Sample(
            file_id(record.id), shown(record.images), shown(wrong[record.images]), record.sentence,
            (WORDS[record.label],), {**record.slices, "group": record.group},
        )
        for record in records
    ]


def predict_statements(
    model: VisionLanguageModel, processor: Processor, batch: Sequence[Sample], right: Sequence, wrong: Sequence,
    config: EvaluateConfig,
) -> list[dict]:
    """Yes or no to each sentence, with either pictures."""
    said = [sample.question for sample in batch]
    judged = (judge(model, processor, images, said) for images in (right, wrong))
    return [{"right": one, "wrong": other} for one, other in zip(*judged, strict=True)]


def judge(model: VisionLanguageModel, processor: Processor, images: Sequence, sentences: Sequence[str]) -> list[str]:
    """Whether each sentence is true of its pictures: by the head for that, or as an answer."""
    images = [seen if isinstance(seen, tuple) else (seen,) for seen in images]
    if model.statement is None:
        asked = [processor.statement(sentence) for sentence in sentences]
        said = answer(model, with_room(model, processor, max(map(len, images))), images, asked, limit=4)
        return [verdict(text) for text in said]
    pictures = [picture for seen in images for picture in seen]
    own = [(place, sentence) for seen, sentence in zip(images, sentences, strict=True) for place in range(len(seen))]
    words = to_device(stack([[processor.encode(sentence)] for _, sentence in own]), model)
    numbers = torch.tensor([place for place, _ in own], device=model.device)
    with torch.no_grad():
        inputs = {**picture_inputs(model, processor, pictures), **words}
        labels = model(**inputs, frames=numbers, heads=("statement",)).statement.argmax(dim=1).tolist()
    return [WORDS[bool(label)] for label in labels]


def verdict(said: str) -> str:
    """Yes or no by the first word that says so, "No, it's not true" is a no; else the text, which is neither.

    POPE's `says_yes` would take whatever isn't a no, "false" and silence too, for a yes.
    """
    return next((JUDGED[word] for word in re.findall(r"[a-z]+", said.lower()) if word in JUDGED), said)


def score_statements(samples: list[Sample], rows: list[dict]) -> Scores:
    """Accuracy and consistency, with either pictures, and of the best answer given always."""
    right, wrong = (
        {sample.id: float(row[which] == sample.answers[0]) for sample, row in zip(samples, rows, strict=True)}
        for which in ("right", "wrong")
    )
    always = [{sample.id: float(sample.answers[0] == word) for sample in samples} for word in WORDS.values()]
    blind = max(always, key=lambda hits: means(hits).value)
    counts = {
        "accuracy": means(right), "accuracy_wrong_image": means(wrong), "accuracy_blind": means(blind),
        "gain_over_blind": means({key: hit - blind[key] for key, hit in right.items()}),
        "consistency": consistency(samples, right),
        "consistency_wrong_image": consistency(samples, wrong),
        "consistency_blind": max((consistency(samples, hits) for hits in always), key=lambda found: found.value),
    }
    stored = {
        sample.id: {
            "prediction": row["right"], "score": right[sample.id], "wrong_prediction": row["wrong"],
            "wrong_score": wrong[sample.id],
        }
        for sample, row in zip(samples, rows, strict=True)
    }
    return Scores.of(counts, stored)


def consistency(samples: Sequence[Sample], hits: Mapping[str, float]) -> Counts:
    """The share of sentences that are judged right with all of their pictures; counted at the first of each."""
    judged = {key: bool(hit) for key, hit in hits.items()}
    groups = {sample.id: sample.slices["group"] for sample in samples}
    found = nlvr_consistency(judged, dict.fromkeys(judged, True), groups).per_sample
    first = {sample.slices["group"]: sample.id for sample in reversed(samples)}
    return means({key: found[group] for group, key in first.items()})
