"""Few-shot: questions after k answered ones from the training split, as Flamingo is asked (arXiv 2204.14198).

The same examples stand before every question, the first k of one fixed choice. Models of words alone can read them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vlmpipe.data.records import QuestionRecord
from vlmpipe.data.task import TaskConfig, answers_of, read_pictures
from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import vqa_accuracy
from vlmpipe.evaluate.tasks.base import MOST_SHOTS, TRAIN, EvaluateConfig, Sample, Scores, means, records_of
from vlmpipe.evaluate.tasks.look import spread
from vlmpipe.evaluate.tasks.questions import best_blind_guess, read_questions
from vlmpipe.models import Processor, VisionLanguageModel
from vlmpipe.models.generate import Example, answer


def read_shots(split: Path, files: TaskConfig) -> list[Sample]:
    """One sample per answered question of a picture. It shows the examples' pictures first and its own last; `truth`:
    the examples' (question, answer).

    Raises:
        UserError: there are too few training questions.
    """
    shown = examples_of(Path(split).parent / TRAIN, files)
    before = tuple(f"{TRAIN}/{record.images[0]}" for record in shown)
    said = tuple((record.question, answers_of(record)[0]) for record in shown)
    return [
        replace(sample, image=(*before, sample.image), wrong_image=(*before, sample.wrong_image), truth=said)
        for sample in read_questions(split, files) if not isinstance(sample.image, tuple)
    ]


def examples_of(train: Path, files: TaskConfig) -> list[QuestionRecord]:
    """`MOST_SHOTS` answered questions on different pictures, of every kind in turn; they belong to the data set."""
    found = records_of(train, files, QuestionRecord, "few_shot")
    by_picture = {record.images: record for record in found if record.answers and len(record.images) == 1}
    mixed = [list(by_picture.values())[i] for i in np.random.default_rng(0).permutation(len(by_picture))]
    samples = [Sample(record.id, record.id, record.id, record.question, (), record.slices) for record in mixed]
    chosen = {sample.id for sample in spread(samples, MOST_SHOTS)}
    if len(chosen) < MOST_SHOTS:
        raise UserError(f"{train}: found {len(chosen)} pictures with answered questions; expected at least "
                        f"{MOST_SHOTS} to show as examples; evaluate another task")
    return [record for record in mixed if record.id in chosen]


def shot_pictures(split: Path, keys: set, files: TaskConfig) -> dict[Any, bytes]:
    """Those of the split, and of the examples."""
    own, shown = read_pictures(split, files), read_pictures(Path(split).parent / TRAIN, files)
    return {key: own[key] if key in own else shown[key.removeprefix(f"{TRAIN}/")] for key in keys}


def predict_shots(
    model: VisionLanguageModel, processor: Processor, batch: Sequence[Sample], right: Sequence[tuple],
    wrong: Sequence[tuple], config: EvaluateConfig,
) -> list[dict]:
    """The answers after each number of examples; with the wrong picture after the most.

    Raises:
        UserError: the model writes no words, or has no room for the examples.
    """
    if model.language_model is None:
        raise UserError("found a model without heads.language_model; expected one to read examples before a question; "
                        "choose other tasks in evaluate")
    questions = [sample.question for sample in batch]
    examples = [
        Example(picture, question, said) for picture, (question, said) in zip(right[0], batch[0].truth, strict=False)
    ]

    def after(shots: int, pictures: Sequence[tuple]) -> list[str]:
        own = [seen[-1] for seen in pictures]
        return answer(model, processor, own, questions, config.answer_tokens, examples=examples[:shots])

    said = [after(shots, right) for shots in config.shots]
    rows = [dict(zip(map(str, config.shots), texts, strict=True)) for texts in zip(*said, strict=True)]
    return [{"right": row, "wrong": text} for row, text in zip(rows, after(max(config.shots), wrong), strict=True)]


def score_shots(samples: list[Sample], rows: list[dict]) -> Scores:
    """VQA's accuracy by the number of examples, as `accuracy.k4`; `accuracy` is that of the most, and `gain` what the
    most add to the fewest."""
    answers = {sample.id: sample.answers for sample in samples}
    shots = sorted(map(int, rows[0]["right"]))
    by_shots = {k: accuracies(samples, [row["right"][str(k)] for row in rows]) for k in shots}
    least, most = by_shots[shots[0]], by_shots[shots[-1]]
    wrong, blind = accuracies(samples, [row["wrong"] for row in rows]), best_blind_guess(samples)
    counts = {
        "accuracy": means(most), **{f"accuracy.k{k}": means(hits) for k, hits in by_shots.items()},
        "accuracy_wrong_image": means(wrong), "accuracy_blind": means(vqa_accuracy(blind, answers).per_sample),
        "gain": means({key: hit - least[key] for key, hit in most.items()}),
    }
    stored = {
        sample.id: {
            "prediction": row["right"][str(shots[-1])], "score": most[sample.id], "wrong_prediction": row["wrong"],
            "wrong_score": wrong[sample.id],
        }
        for sample, row in zip(samples, rows, strict=True)
    }
    return Scores.of(counts, stored)


def accuracies(samples: Sequence[Sample], said: Sequence[str]) -> Mapping[str, float]:
    answers = {sample.id: sample.answers for sample in samples}
    return vqa_accuracy(dict(zip(answers, said, strict=True)), answers).per_sample
