"""Metrics of places in pictures: boxes and masks. Pure functions; see `metrics` for what they have in common.

Shapes: y and x pixels. Boxes are left, top, right, bottom in pixels.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import MetricResult, check_same_samples

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
    return MetricResult(_mean(hits), hits, _at_thresholds(overlaps, "accuracy") | {"threshold": threshold})


def segmentation_iou(predictions: Mapping[Any, np.ndarray], masks: Mapping[Any, np.ndarray]) -> MetricResult:
    """The mean over samples of shared pixels by pixels in either mask; two empty masks agree and count 1.

    Args:
        predictions, masks: bool [y, x] for each sample, both as large as its picture.

    Returns:
        details: `cumulative`, all shared pixels by all in either mask, in which large things weigh more (the measure of
        RefCOCO's masks, arXiv 1603.06180, section 4), and `precision@0.5` to `precision@0.9`.
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
    return MetricResult(_mean(ious), ious, details)


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
    shares = {f"{name}@{at}": _mean({k: float(iou >= at) for k, iou in overlaps.items()}) for at in THRESHOLDS}
    return {"mean_iou": _mean(overlaps), **shares}


def _mean(values: Mapping[Any, float]) -> float:
    return math.fsum(values.values()) / len(values)


def _describe(mask: Any) -> str:
    return f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, np.ndarray) else type(mask).__name__
