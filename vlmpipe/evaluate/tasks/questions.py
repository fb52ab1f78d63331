"""Visual question answering: official VQA accuracy of free answers."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from vlmpipe.data.records import QuestionRecord
from vlmpipe.data.task import TaskConfig, read_pictures
from vlmpipe.data.vqa import ANSWERS
from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import vqa_accuracy
from vlmpipe.evaluate.tasks.base import (
    EvaluateConfig,
    Sample,
    Scores,
    by_kind,
    file_id,
    means,
    mismatch,
    records_of,
)
from vlmpipe.models import Processor, VisionLanguageModel
from vlmpipe.models.generate import answer
from vlmpipe.models.generate.rows import with_room

# What datasets call the kind of a question, the finest first.
KINDS = ("question_type", "kind", "family", "answer_type")


def read_questions(split: Path, task: TaskConfig) -> list[Sample]:
    """One sample per answered question; the wrong pictures are those of another question and differ in their bytes."""
    records = [record for record in records_of(split, task, QuestionRecord, "vqa") if record.answers]
    if not records:
        raise UserError(f"{split}: found no answered question; expected some; test on a split with answers")
    wrong = wrong_pictures([record.images for record in records], split, task)
    return [
        Sample(
            file_id(record.id), shown(record.images), shown(wrong[record.images]), record.question,
            # A question answered once is as right as one that ten people answered alike.
            record.answers * ANSWERS if len(record.answers) == 1 else record.answers, record.slices,
        )
        for record in records
    ]


def wrong_pictures(seen: Sequence[tuple[str, ...]], split: Path, task: TaskConfig) -> dict:
    """For each record's pictures those of another record with other bytes."""
    pictures = read_pictures(split, task)
    digests = {
        names: hashlib.sha256(b"".join(pictures[name] for name in names)).hexdigest()
        for names in dict.fromkeys(seen)
    }
    return mismatch(digests, f"pictures in {split}")


def shown(names: tuple[str, ...]) -> str | tuple[str, ...]:
    return names[0] if len(names) == 1 else names


def kind_of(sample: Sample) -> str:
    """The kind of question; where the dataset has none, how it begins."""
    named = (sample.slices[name] for name in KINDS if sample.slices.get(name) is not None)
    return next(named, " ".join(sample.question.split()[:2]))


def predict_answers(
    model: VisionLanguageModel, processor: Processor, batch: Sequence[Sample], right: Sequence[Image.Image],
    wrong: Sequence[Image.Image], config: EvaluateConfig,
) -> list[dict]:
    """The model's answer to each question, with either picture; in one batch, so that each picture is read once."""
    most = max(len(sample.image) if isinstance(sample.image, tuple) else 1 for sample in batch)
    processor = with_room(model, processor, most)
    seen = [images for pair in zip(right, wrong, strict=True) for images in pair]
    asked = [sample.question for sample in batch for _ in range(2)]
    said: list[str] = []
    for at in range(0, len(asked), len(batch)):
        rows = slice(at, at + len(batch))
        said += answer(model, processor, seen[rows], asked[rows], config.answer_tokens)
    return [{"right": one, "wrong": other} for one, other in zip(said[::2], said[1::2], strict=True)]


def score_answers(samples: list[Sample], rows: list[dict]) -> Scores:
    """Official VQA accuracy, in all and by question type; with the wrong picture; and of the best blind guess."""
    answers = {sample.id: sample.answers for sample in samples}
    said = {sample.id: row["right"] for sample, row in zip(samples, rows, strict=True)}
    said_wrong = {sample.id: row["wrong"] for sample, row in zip(samples, rows, strict=True)}
    right, wrong = vqa_accuracy(said, answers), vqa_accuracy(said_wrong, answers)
    blind = vqa_accuracy(best_blind_guess(samples), answers)
    kinds = {sample.id: kind_of(sample) for sample in samples}
    counts = {
        **by_kind("accuracy", right.per_sample, kinds), **by_kind("accuracy_wrong_image", wrong.per_sample, kinds),
        "accuracy_blind": means(blind.per_sample),
        "gain_over_blind": means({key: score - blind.per_sample[key] for key, score in right.per_sample.items()}),
    }
    stored = {
        key: {
            "prediction": said[key], "score": right.per_sample[key],
            "wrong_prediction": said_wrong[key], "wrong_score": wrong.per_sample[key],
        }
        for key in said
    }
    return Scores.of(counts, stored)


def best_blind_guess(samples: Sequence[Sample]) -> dict[str, str]:
    """For each question the most common answer to its type in this very test set: what knowing the type alone can
    reach at most."""
    counts: dict[str, Counter] = {}
    for sample in samples:
        counts.setdefault(kind_of(sample), Counter()).update(sample.answers)
    best = {kind: min(given, key=lambda text, given=given: (-given[text], text)) for kind, given in counts.items()}
    return {sample.id: best[kind_of(sample)] for sample in samples}
