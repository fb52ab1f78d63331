"""Compositionality: does a model tell the true sentence from one with swapped attributes or relations?

SugarCrepe (arXiv 2306.14610): of two sentences the picture's own must score higher. Winoground (arXiv 2204.03162): the
same for pairs of pictures, and of the pictures too. Equal scores are lost: strictly `>`.

Shapes: K pictures of a group.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vlmpipe.data.records import ContrastRecord
from vlmpipe.data.task import TaskConfig
from vlmpipe.evaluate.metrics import choice_accuracy, group_scores
from vlmpipe.evaluate.store import Counts
from vlmpipe.evaluate.tasks.base import EvaluateConfig, Sample, Scores, by_slice, file_id, means, records_of
from vlmpipe.evaluate.tasks.pairs import pair_scores
from vlmpipe.evaluate.tasks.questions import wrong_pictures
from vlmpipe.models import Processor, VisionLanguageModel


def read_contrasts(split: Path, task: TaskConfig) -> list[Sample]:
    """One sample per picture with its sentence first among the choices."""
    records = records_of(split, task, ContrastRecord, "compositionality")
    wrong = wrong_pictures([(record.image,) for record in records], split, task)
    return [
        Sample(
            file_id(record.id), record.image, wrong[record.image,][0], "", (record.caption,),
            {**record.slices, "group": record.group}, choices=(record.caption, *record.false),
        )
        for record in records
    ]


def predict_contrasts(
    model: VisionLanguageModel, processor: Processor, batch: Sequence[Sample], right: Sequence[Image.Image],
    wrong: Sequence[Image.Image], config: EvaluateConfig,
) -> list[dict]:
    """How well each sentence fits, with either picture: see `pair_scores`."""
    texts = [sample.choices for sample in batch]
    scores = (pair_scores(model, processor, images, texts, config.batch_size) for images in (right, wrong))
    return [{"right": one, "wrong": other} for one, other in zip(*scores, strict=True)]


# --- scores ------------------------------------------------------------------------------------------------

def score_contrasts(samples: list[Sample], rows: list[dict]) -> Scores:
    """The share of pictures whose sentence scores highest, also by kind of swap; with the wrong picture; Winoground's
    three scores where pictures come in groups."""
    right, wrong = (
        choice_accuracy({sample.id: row[which] for sample, row in zip(samples, rows, strict=True)})
        for which in ("right", "wrong")
    )
    blind = {sample.id: 1 / len(sample.choices) for sample in samples}
    counts = {
        **by_slice("accuracy", right.per_sample, samples, "swap"),
        "accuracy_wrong_image": means(wrong.per_sample), "accuracy_blind": means(blind),
        "gain_over_blind": means({key: hit - blind[key] for key, hit in right.per_sample.items()}),
        **grouped(samples, rows),
    }
    stored = {
        sample.id: {
            "prediction": best(sample, row["right"]), "score": right.per_sample[sample.id],
            "wrong_prediction": best(sample, row["wrong"]), "wrong_score": wrong.per_sample[sample.id],
        }
        for sample, row in zip(samples, rows, strict=True)
    }
    return Scores.of(counts, stored)


def best(sample: Sample, scores: Sequence[float]) -> str:
    """The likeliest; of equal ones the last, for the true one comes first and equal scores are lost."""
    return sample.choices[max(range(len(scores)), key=lambda place: (scores[place], place))]


def grouped(samples: Sequence[Sample], rows: Sequence[dict]) -> dict[str, Counts]:
    """Winoground's scores of the groups in which every picture was asked for every sentence; counted at the first
    sample of each."""
    groups: dict[str, list[tuple[Sample, dict]]] = {}
    for sample, row in zip(samples, rows, strict=True):
        groups.setdefault(sample.slices["group"], []).append((sample, row))
    tables = {members[0][0].id: table(members) for members in groups.values() if len(members) > 1}
    whole = {key: scores for key, scores in tables.items() if scores is not None}
    if not whole:
        return {}
    each = {key: group_scores({key: scores_KK}).details for key, scores_KK in whole.items()}
    return {name: means({key: found[name] for key, found in each.items()}) for name in ("text", "image", "group")}


def table(members: Sequence[tuple[Sample, dict]]) -> np.ndarray | None:
    """[K, K] by sentence and picture; None where a picture wasn't asked for all sentences of the group."""
    captions = [sample.choices[0] for sample, _ in members]
    if any(not set(captions) <= set(sample.choices) for sample, _ in members):
        return None
    return np.array(
        [[row["right"][sample.choices.index(caption)] for sample, row in members] for caption in captions]
    )
