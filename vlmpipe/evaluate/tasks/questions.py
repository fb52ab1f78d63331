"""Visual question answering: official VQA accuracy of free answers."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from vlmpipe.data.readers.vizwiz import UNANSWERABLE
from vlmpipe.data.records import QuestionRecord
from vlmpipe.data.task import TaskConfig, answers_of, read_pictures
from vlmpipe.data.vqa import ANSWERS
from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import vqa_accuracy
from vlmpipe.evaluate.store import Counts
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
from vlmpipe.models.generate import answer, answer_probabilities
from vlmpipe.models.generate.rows import with_room

# What datasets call the kind of a question, the finest first.
KINDS = ("question_type", "kind", "family", "answer_type")
# By what else accuracy is told: CLEVR's templates, VizWiz's annotation, TextVQA's words.
SLICES = ("family", "answerable", "words")


def read_questions(split: Path, task: TaskConfig) -> list[Sample]:
    """One sample per answered question; the wrong pictures are those of another question and differ in their bytes."""
    return sampled(records_of(split, task, QuestionRecord, "vqa"), split, task)


def sampled(found: Sequence[QuestionRecord], split: Path, task: TaskConfig) -> list[Sample]:
    """As `read_questions`, of records of the split."""
    records = [record for record in found if record.answers]
    if not records:
        raise UserError(f"{split}: found no answered question; expected some; test on a split with answers")
    wrong = wrong_pictures([record.images for record in records], split, task)
    return [
        Sample(
            file_id(record.id), shown(record.images), shown(wrong[record.images]), record.question,
            # A question answered once is as right as one that ten people answered alike.
            record.answers * ANSWERS if len(record.answers) == 1 else record.answers, slices_of(record),
        )
        for record in records
    ]


def slices_of(record: QuestionRecord) -> dict[str, str]:
    """The dataset's own; whether the question can be answered, where it says so; and, where it has the words in the
    picture, whether the commonest answer is made of them."""
    found = dict(record.slices)
    if record.answerable is not None:
        found["answerable"] = "yes" if record.answerable else "no"
    if record.texts:
        seen = {word for text in record.texts for word in text.word.lower().split()}
        found["words"] = "read" if set(answers_of(record)[0].lower().split()) <= seen else "other"
    return found


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
    """The model's answer to each question, with either picture; where the dataset says what can be answered, also how
    likely it is to say that it can't.

    Both pictures are in one batch, in which each is read once.
    """
    most = max(len(sample.image) if isinstance(sample.image, tuple) else 1 for sample in batch)
    processor = with_room(model, processor, most)
    seen = [images for pair in zip(right, wrong, strict=True) for images in pair]
    asked = [sample.question for sample in batch for _ in range(2)]
    said: list[str] = []
    for at in range(0, len(asked), len(batch)):
        rows = slice(at, at + len(batch))
        said += answer(model, processor, seen[rows], asked[rows], config.answer_tokens)
    rows = [{"right": one, "wrong": other} for one, other in zip(said[::2], said[1::2], strict=True)]
    if any("answerable" not in sample.slices for sample in batch):
        return rows
    asked = [sample.question for sample in batch]
    doubts = (answer_probabilities(model, processor, images, asked, UNANSWERABLE) for images in (right, wrong))
    return [
        row | {"unanswerable": doubt, "wrong_unanswerable": other}
        for row, doubt, other in zip(rows, *doubts, strict=True)
    ]


def score_answers(samples: list[Sample], rows: list[dict]) -> Scores:
    """Official VQA accuracy, in all and by question type; with the wrong picture; and of the best blind guess."""
    answers = {sample.id: sample.answers for sample in samples}
    said = {sample.id: row["right"] for sample, row in zip(samples, rows, strict=True)}
    said_wrong = {sample.id: row["wrong"] for sample, row in zip(samples, rows, strict=True)}
    right, wrong = vqa_accuracy(said, answers), vqa_accuracy(said_wrong, answers)
    blind = vqa_accuracy(best_blind_guess(samples), answers)
    kinds = {sample.id: kind_of(sample) for sample in samples}
    by_slice = {f"accuracy.{name}": values_of(samples, name) for name in SLICES}
    counts = {
        **by_kind("accuracy", right.per_sample, kinds), **by_kind("accuracy_wrong_image", wrong.per_sample, kinds),
        "accuracy_blind": means(blind.per_sample),
        "gain_over_blind": means({key: score - blind.per_sample[key] for key, score in right.per_sample.items()}),
        **{
            metric: found for start, values in by_slice.items()
            for metric, found in by_kind(start, right.per_sample, values).items() if metric != start
        },
        **doubts(samples, rows),
    }
    stored = {
        key: {
            "prediction": said[key], "score": right.per_sample[key],
            "wrong_prediction": said_wrong[key], "wrong_score": wrong.per_sample[key],
        }
        for key in said
    }
    return Scores.of(counts, stored)


def values_of(samples: Sequence[Sample], name: str) -> dict[str, str | None]:
    return {sample.id: sample.slices.get(name) for sample in samples}


def doubts(samples: Sequence[Sample], rows: Sequence[dict]) -> dict[str, Counts]:
    """How well the model's own probability of "unanswerable" tells the questions that can't be answered, with either
    picture and by lot; nothing where the dataset has none of them."""
    lacking = {sample.id: sample.slices.get("answerable") == "no" for sample in samples}
    if not any(lacking.values()) or not all("unanswerable" in row for row in rows):
        return {}
    found: dict[str, Counts] = {}
    for ending, key in (("", "unanswerable"), ("_wrong_image", "wrong_unanswerable")):
        doubt = {sample.id: float(row[key]) for sample, row in zip(samples, rows, strict=True)}
        found[f"answerability{ending}"] = Counts(
            "ranked_precision", {key: (doubt[key], float(lack)) for key, lack in lacking.items()}
        )
        found[f"answerability_f1{ending}"] = Counts(
            "f1", {key: right_and_wrong(doubt[key] > 0.5, lack) for key, lack in lacking.items()}
        )
    found["answerability_blind"] = means({key: float(lack) for key, lack in lacking.items()})
    return found


def right_and_wrong(said: bool, true: bool) -> tuple[float, float, float]:
    """True positives, false positives, false negatives."""
    return float(said and true), float(said and not true), float(true and not said)


def best_blind_guess(samples: Sequence[Sample]) -> dict[str, str]:
    """For each question the most common answer to its type in this very test set: what knowing the type alone can
    reach at most."""
    counts: dict[str, Counter] = {}
    for sample in samples:
        counts.setdefault(kind_of(sample), Counter()).update(sample.answers)
    best = {kind: min(given, key=lambda text, given=given: (-given[text], text)) for kind, given in counts.items()}
    return {sample.id: best[kind_of(sample)] for sample in samples}
