"""Matching: whether a caption is true of a picture, said of the true one and of another picture's."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from vlmpipe.data.task import TaskConfig
from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import matching_accuracy
from vlmpipe.evaluate.store import Counts
from vlmpipe.evaluate.tasks.base import EvaluateConfig, Sample, Scores, file_id, means
from vlmpipe.evaluate.tasks.captions import match
from vlmpipe.evaluate.tasks.pairs import pair_by_pair
from vlmpipe.evaluate.tasks.retrieval import captions_of
from vlmpipe.models import Processor, VisionLanguageModel


def read_matches(split: Path, task: TaskConfig) -> list[Sample]:
    """One sample per caption; the swapped one (`wrong_truth`) is that of the wrong picture, and not among its own."""
    captions, ids = captions_of(split, task)
    names = sorted(captions)
    ring = [names[place] for place in np.random.default_rng(0).permutation(len(names))]
    place_of = {name: place for place, name in enumerate(ring)}
    samples = []
    for name, own in captions.items():
        # One that shares no sentence, so that each of its captions is false here.
        after = (ring[(place_of[name] + step) % len(ring)] for step in range(1, len(ring)))
        other = next((other for other in after if set(captions[other]).isdisjoint(own)), None)
        if other is None:
            raise UserError(f"{split}: found no picture without a caption of '{name}'; expected some to swap with")
        theirs = captions[other]
        samples += [
            Sample(
                f"{file_id(ids[name])}-{number}", name, other, text, (text,), truth=text,
                wrong_truth=theirs[number % len(theirs)],
            )
            for number, text in enumerate(own)
        ]
    return samples


def predict_matches(
    model: VisionLanguageModel, processor: Processor, batch: Sequence[Sample], right: Sequence[Image.Image],
    wrong: Sequence[Image.Image], config: EvaluateConfig,
) -> list[dict]:
    """With either picture the log-odds that it goes with the true caption, and with the swapped one.

    Raises:
        UserError: the model has no head for that.
    """
    if model.matching is None:
        raise UserError(
            "found a model without heads.matching; expected one for the task 'matching'; use retrieval, or a model "
            "such as model=vilt"
        )
    texts = [[sample.truth, sample.wrong_truth] for sample in batch]
    size = config.batch_size
    found = (pair_by_pair(partial(match, model, processor), images, texts, size) for images in (right, wrong))
    return [{"right": one, "wrong": other} for one, other in zip(*found, strict=True)]


def score_matches(samples: list[Sample], rows: list[dict]) -> Scores:
    """Accuracy of yes and no, the area under the ROC curve, and how often the right picture fits the caption better
    than the wrong one."""
    right, wrong = (
        {sample.id: row[which] for sample, row in zip(samples, rows, strict=True)} for which in ("right", "wrong")
    )
    found, fooled = (
        matching_accuracy(*({key: pair[side] for key, pair in odds.items()} for side in (0, 1)))
        for odds in (right, wrong)
    )
    half = dict.fromkeys(right, 0.5)
    counts = {
        "accuracy": means(found.per_sample), "accuracy_wrong_image": means(fooled.per_sample),
        "accuracy_blind": means(half),
        "gain_over_blind": means({key: hit - 0.5 for key, hit in found.per_sample.items()}),
        "pair_accuracy": means({key: float(pair[0] > wrong[key][0]) for key, pair in right.items()}),
        "auc": Counts("roc_area", right), "auc_wrong_image": Counts("roc_area", wrong), "auc_blind": means(half),
        "said_yes": means({key: float(np.mean(np.array(pair) > 0)) for key, pair in right.items()}),
    }
    stored = {
        key: {
            "prediction": written(pair), "score": found.per_sample[key], "wrong_prediction": written(wrong[key]),
            "wrong_score": fooled.per_sample[key],
        }
        for key, pair in right.items()
    }
    return Scores.of(counts, stored)


def written(odds: Sequence[float]) -> str:
    return " ".join("yes" if value > 0 else "no" for value in odds)
