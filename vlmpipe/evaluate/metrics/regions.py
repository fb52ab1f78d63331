"""Places in pictures: boxes and masks.

Shapes: K boxes found, N true boxes, y and x pixels. Boxes are left, top, right, bottom in pixels.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmpipe.data.records import DetectionRecord
from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics.result import MetricResult, check_same_samples, mean

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


def refexp_accuracy(
    predictions: Mapping[Any, Sequence[float]], boxes: Mapping[Any, Sequence[float]], threshold: float = 0.5
) -> MetricResult:
    """The share of expressions whose box overlaps the true one with an IoU of `threshold` at least.

    Returns:
        per_sample: 1 or 0. details: `mean_iou`, and `accuracy@0.5` to `accuracy@0.9`.

    Source: the measure of RefCOCO (arXiv 1608.00272, section 5).
    """
    check_same_samples(predictions, boxes, "refexp_accuracy")
    overlaps = {
        sample: box_iou(_box(predictions[sample], sample), _box(true, sample)) for sample, true in boxes.items()
    }
    hits = {sample: float(iou >= threshold) for sample, iou in overlaps.items()}
    return MetricResult(mean(hits), hits, _at_thresholds(overlaps, "accuracy") | {"threshold": threshold})


def segmentation_iou(predictions: Mapping[Any, np.ndarray], masks: Mapping[Any, np.ndarray]) -> MetricResult:
    """The mean over samples of shared pixels by pixels in either mask; two empty masks agree and count 1.

    Args:
        predictions, masks: bool [y, x] for each sample, both as large as its picture.

    Returns:
        details: `cumulative`, all shared pixels by all in either mask, in which large things weigh more (the measure of
        RefCOCO's masks, arXiv 1603.06180, section 4), `pixels`, for each sample those shared and those in either, and
        `precision@0.5` to `precision@0.9`.
    """
    check_same_samples(predictions, masks, "segmentation_iou")
    shared, either = {}, {}
    for sample, true in masks.items():
        found = predictions[sample]
        for mask in (found, true):
            if not isinstance(mask, np.ndarray) or mask.dtype != bool or mask.ndim != 2 or not mask.size:
                raise UserError(f"segmentation_iou: found {_describe(mask)} for {sample!r}; expected bool [y, x]")
        if found.shape != true.shape:
            raise UserError(
                f"segmentation_iou: found a mask of {found.shape} for {sample!r}; expected {true.shape}, the picture's "
                f"own size"
            )
        shared[sample], either[sample] = int((found & true).sum()), int((found | true).sum())
    ious = {sample: shared[sample] / either[sample] if either[sample] else 1.0 for sample in masks}
    total = sum(either.values())
    details = {"cumulative": sum(shared.values()) / total if total else 1.0, **_at_thresholds(ious, "precision")}
    details["pixels"] = {sample: (shared[sample], either[sample]) for sample in masks}
    return MetricResult(mean(ious), ious, details)


@dataclass(frozen=True, eq=False)
class Detections:
    """What a model found in one picture: `boxes` [K, 4], `scores` [K], and what each box shows."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: tuple[str, ...]


def detection_map(predictions: Mapping[Any, Detections], truth: Mapping[Any, DetectionRecord]) -> MetricResult:
    """COCO's average precision of boxes: the mean over IoUs of 0.5 to 0.95, over the labels that truth has anywhere.

    The 100 surest boxes of a picture and label count. A box that stands for a crowd neither rewards nor punishes.

    Returns:
        per_sample: empty, for precision is over all pictures together. details: `ap@0.5`, `ap@0.75`, `recall` (the mean
        over IoUs), `ap_small`, `ap_medium`, `ap_large` by the area of the true box (under 32² pixels, under 96², over),
        and `ap/LABEL`; what truth has none of is absent.

    Source: https://cocodataset.org/#detection-eval, as faster-coco-eval counts it.
    """
    check_same_samples(predictions, truth, "detection_map")
    for sample, found in predictions.items():
        _check_detections(found, sample)
    names = sorted({label for record in truth.values() for label in record.labels})
    if not names:
        raise UserError("detection_map: found no true box in any picture; expected at least one")
    # T: IoUs, R: recalls, L: labels, A: sizes, M: numbers of boxes that count.
    evaluator = _coco_evaluation(predictions, truth, names)
    stats, precision_TRLAM, recall_TLAM = (
        evaluator.stats_as_dict, np.asarray(evaluator.eval["precision"]), np.asarray(evaluator.eval["recall"])
    )
    if stats["AP_all"] < 0:
        raise UserError("detection_map: found nothing but crowds in the truth; expected at least one single thing")
    recall_TL = recall_TLAM[:, :, 0, -1]  # of all sizes, by the 100 surest boxes; -1 where there is nothing to find
    details = {"ap@0.5": stats["AP_50"], "ap@0.75": stats["AP_75"], "recall": recall_TL[recall_TL >= 0].mean()}
    details |= {f"ap_{size}": stats[f"AP_{size}"] for size in ("small", "medium", "large")}
    details |= {f"ap/{name}": precision_TRLAM[:, :, place, 0, -1].mean() for place, name in enumerate(names)}
    details = {name: float(value) for name, value in details.items() if value >= 0}
    return MetricResult(float(stats["AP_all"]), {}, details)


def _coco_evaluation(predictions: Mapping[Any, Detections], truth: Mapping[Any, DetectionRecord], names: list[str]):
    """The finished evaluation. Labels that truth has nowhere have no precision: they are left out, as COCO does."""
    # It comes with plotting, which only this metric needs.
    from faster_coco_eval import COCO, COCOeval_faster

    numbers = {name: number for number, name in enumerate(names, start=1)}
    expected, found = [], []
    for image, (sample, record) in enumerate(truth.items(), start=1):
        for box, label, crowd in zip(record.boxes, record.labels, record.crowd, strict=True):
            entry = _coco_box(image, box, numbers[label])
            expected.append({**entry, "id": len(expected) + 1, "iscrowd": int(crowd)})
        detections = predictions[sample]
        for box, label, score in zip(detections.boxes, detections.labels, detections.scores, strict=True):
            if label in numbers:
                found.append({**_coco_box(image, box, numbers[label]), "score": float(score)})
    dataset = COCO({
        "images": [{"id": image} for image in range(1, len(truth) + 1)],
        "annotations": expected,
        "categories": [{"id": number, "name": name} for name, number in numbers.items()],
    })
    evaluator = COCOeval_faster(dataset, dataset.loadRes(found), "bbox")
    evaluator.run()
    return evaluator


def _coco_box(image: int, box: np.ndarray, label: int) -> dict[str, Any]:
    left, top, right, bottom = (float(value) for value in box)
    size = [right - left, bottom - top]
    return {"image_id": image, "category_id": label, "bbox": [left, top, *size], "area": size[0] * size[1]}


def _check_detections(found: Detections, sample: Any) -> None:
    boxes, scores = np.asarray(found.boxes, dtype=float), np.asarray(found.scores, dtype=float)
    count = len(found.labels)
    if boxes.reshape(-1, 4).shape != (count, 4) or scores.shape != (count,):
        raise UserError(
            f"detection_map: found {list(boxes.shape)} boxes, {list(scores.shape)} scores and {count} labels for "
            f"{sample!r}; expected [K, 4], [K] and K"
        )
    if not np.isfinite(scores).all():
        raise UserError(f"detection_map: found a score that is no number for {sample!r}; expected finite scores")
    for box in boxes:
        _box(box, sample)


def box_iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Shared area by covered area; 0 where neither has any."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    either = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - shared
    return shared / either if either > 0 else 0.0


def _box(box: Sequence[float], sample: Any) -> tuple[float, ...]:
    values = tuple(float(value) for value in box)
    if len(values) != 4 or not all(map(math.isfinite, values)) or values[2] < values[0] or values[3] < values[1]:
        raise UserError(f"found the box {list(box)} for {sample!r}; expected left, top, right, bottom in pixels")
    return values


def _at_thresholds(overlaps: Mapping[Any, float], name: str) -> dict[str, float]:
    shares = {f"{name}@{at}": mean({k: float(iou >= at) for k, iou in overlaps.items()}) for at in THRESHOLDS}
    return {"mean_iou": mean(overlaps), **shares}


def _describe(mask: Any) -> str:
    return f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, np.ndarray) else type(mask).__name__
