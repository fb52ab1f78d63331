"""Places that phrases name: masks and boxes.

Shapes: y and x pixels of the picture.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from vlmpipe.data.queries import Query, queries_of_detections, queries_of_regions
from vlmpipe.data.records import Box, DetectionRecord, RegionRecord
from vlmpipe.data.task import TaskConfig
from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import MetricResult, box_iou, refexp_accuracy, segmentation_iou
from vlmpipe.evaluate.store import Counts
from vlmpipe.evaluate.tasks.base import EvaluateConfig, Sample, Scores, file_id, means, mismatch, records_of
from vlmpipe.models import Processor, VisionLanguageModel
from vlmpipe.models.locate import detect, segment

SURE = 0.5  # of a pixel
GUESSES = 200  # boxes that are tried as the one guess for all
GRID = 32  # places down and across of the one mask that is guessed for all


def read_masks(split: Path, task: TaskConfig) -> list[Sample]:
    """One sample per phrase with masks."""
    records = records_of(split, task, (RegionRecord, DetectionRecord), "segmentation")
    detections = isinstance(records[0], DetectionRecord)
    queries = queries_of_detections(records) if detections else queries_of_regions(records)
    return queried([query for query in queries if query.masks], split)


def read_expressions(split: Path, task: TaskConfig) -> list[Sample]:
    """One sample per expression for one thing."""
    return queried(queries_of_regions(records_of(split, task, RegionRecord, "referring")), split)


def queried(queries: Sequence[Query], split: Path) -> list[Sample]:
    if not queries:
        raise UserError(f"{split}: found no phrase with what it names; expected some; check the annotations")
    wrong = mismatch({query.image: query.image for query in queries}, f"pictures in {split}")
    return [
        Sample(
            f"{number}-{file_id(query.image)}", query.image, wrong[query.image], query.phrase, (query.phrase,),
            truth=query,
        )
        for number, query in enumerate(queries)
    ]


# --- masks -------------------------------------------------------------------------------------------------

def predict_masks(
    model: VisionLanguageModel, processor: Processor, batch: Sequence[Sample], right: Sequence[Image.Image],
    wrong: Sequence[Image.Image], config: EvaluateConfig,
) -> list[dict]:
    """Bool [y, x] of the true picture's size, from either picture."""
    return by_picture(batch, right, wrong, partial(find_masks, model, processor))


def by_picture(
    batch: Sequence[Sample], right: Sequence[Image.Image], wrong: Sequence[Image.Image],
    look: Callable[[Image.Image, list[str]], Sequence],
) -> list[dict]:
    """What `look` finds for each phrase, with either picture; phrases about one picture are looked for in one go."""
    found = []
    for _, group in groupby(zip(batch, right, wrong, strict=True), key=lambda asked: asked[0].image):
        samples, *pictures = zip(*group, strict=True)
        phrases, size = [sample.question for sample in samples], samples[0].truth.size
        seen = (look(shown[0].resize(size), phrases) for shown in pictures)
        found += [{"right": one, "wrong": other} for one, other in zip(*seen, strict=True)]
    return found


def find_masks(
    model: VisionLanguageModel, processor: Processor, picture: Image.Image, phrases: Sequence[str]
) -> np.ndarray:
    """Bool [phrases, y, x]."""
    return segment(model, processor, picture, phrases).numpy() > SURE


def true_mask(query: Query) -> np.ndarray:
    """Bool [y, x] of all that the phrase names."""
    return np.logical_or.reduce([mask.pixels().astype(bool) for mask in query.masks])


def score_masks(samples: list[Sample], rows: list[dict]) -> Scores:
    """Mean and cumulative IoU with either picture, and of the best mask that is the same for all."""
    truth = {sample.id: true_mask(sample.truth) for sample in samples}
    right, wrong = (
        segmentation_iou({sample.id: row[which] for sample, row in zip(samples, rows, strict=True)}, truth)
        for which in ("right", "wrong")
    )
    blind = best_blind_mask(truth)
    counts = {}
    for ending, found in (("", right), ("_wrong_image", wrong), ("_blind", blind)):
        counts[f"iou{ending}"] = means(found.per_sample)
        counts[f"cumulative_iou{ending}"] = Counts("ratio", found.details["pixels"])
    counts["gain_over_blind"] = means({key: iou - blind.per_sample[key] for key, iou in right.per_sample.items()})
    counts["precision@0.5"] = means({key: iou >= 0.5 for key, iou in right.per_sample.items()})
    return Scores.of(counts, stored(right, wrong))


def best_blind_mask(truth: dict[str, np.ndarray]) -> MetricResult:
    """The places that are often enough marked, at the frequency that scores best."""
    small = {key: shrink(mask) for key, mask in truth.items()}
    often = np.mean(list(small.values()), axis=0)
    levels = np.unique(np.quantile(often, np.linspace(0, 0.95, 8)))
    guesses = (dict.fromkeys(small, often >= level) for level in levels)
    return max((segmentation_iou(guess, small) for guess in guesses), key=lambda result: result.value)


def shrink(mask: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).resize((GRID, GRID), Image.Resampling.NEAREST))


# --- boxes -------------------------------------------------------------------------------------------------

def predict_boxes(
    model: VisionLanguageModel, processor: Processor, batch: Sequence[Sample], right: Sequence[Image.Image],
    wrong: Sequence[Image.Image], config: EvaluateConfig,
) -> list[dict]:
    """The surest box for each phrase, in pixels of the true picture, from either picture."""
    return by_picture(batch, right, wrong, partial(find_boxes, model, processor))


def find_boxes(
    model: VisionLanguageModel, processor: Processor, picture: Image.Image, phrases: Sequence[str]
) -> list[Box]:
    """By the head for boxes, or around the mask."""
    if model.detection is None:
        return [around(mask) for mask in find_masks(model, processor, picture, phrases)]
    return [tuple(detect(model, processor, picture, [phrase], least=0.0).boxes[0].tolist()) for phrase in phrases]


def around(mask: np.ndarray) -> Box:
    """Left, top, right, bottom of what is marked; a box of no size where nothing is."""
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return 0.0, 0.0, 0.0, 0.0
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)


def score_boxes(samples: list[Sample], rows: list[dict]) -> Scores:
    """The share of boxes with an IoU of 0.5, with either picture, and of the best box that is the same for all."""
    truth = {sample.id: sample.truth.boxes[0] for sample in samples}
    right, wrong = (
        refexp_accuracy({sample.id: row[which] for sample, row in zip(samples, rows, strict=True)}, truth)
        for which in ("right", "wrong")
    )
    blind = best_blind_box(samples)
    ious = {sample.id: box_iou(row["right"], truth[sample.id]) for sample, row in zip(samples, rows, strict=True)}
    counts = {
        "accuracy": means(right.per_sample), "accuracy_wrong_image": means(wrong.per_sample),
        "accuracy_blind": means(blind), "mean_iou": means(ious),
        "gain_over_blind": means({key: hit - blind[key] for key, hit in right.per_sample.items()}),
    }
    said = {
        sample.id: {"prediction": written(row["right"]), "wrong_prediction": written(row["wrong"])}
        for sample, row in zip(samples, rows, strict=True)
    }
    scores = stored(right, wrong)
    return Scores.of(counts, {key: said[key] | scores[key] for key in scores})


def best_blind_box(samples: Sequence[Sample]) -> dict[str, float]:
    """Where the best of the true boxes, as shares of its picture, fits."""
    shares = {sample.id: tuple(np.array(sample.truth.boxes[0]) / (sample.truth.size * 2)) for sample in samples}
    guesses = list(shares.values())[:: max(1, len(shares) // GUESSES)]
    fits = ({key: float(box_iou(guess, true) >= 0.5) for key, true in shares.items()} for guess in guesses)
    return max(fits, key=lambda hits: sum(hits.values()))


def written(box: Sequence[float]) -> str:
    return " ".join(f"{value:.1f}" for value in box)


def stored(right: MetricResult, wrong: MetricResult) -> dict[str, dict]:
    return {
        key: {"score": score, "wrong_score": wrong.per_sample[key]} for key, score in right.per_sample.items()
    }
