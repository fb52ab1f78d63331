"""Measures of boxes and masks against hand-worked and published numbers."""

import numpy as np
import pytest

from vlmpipe.errors import UserError
from vlmpipe.evaluate.regions import box_iou, refexp_accuracy, segmentation_iou


def square(side, left, top, width, height):
    mask = np.zeros((side, side), bool)
    mask[top : top + height, left : left + width] = True
    return mask


@pytest.mark.parametrize(
    ("one", "other", "iou"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
        ((0, 0, 4, 4), (1, 1, 3, 3), 1 / 4),
        ((0, 0, 1, 1), (1, 0, 2, 1), 0),
        ((0, 0, 1, 1), (5, 5, 6, 6), 0),
        ((1, 1, 1, 1), (1, 1, 1, 1), 0),
    ],
)
def test_box_iou(one, other, iou):
    assert box_iou(one, other) == pytest.approx(iou) == box_iou(other, one)


def test_refexp_accuracy_counts_from_half_on():
    boxes = {"a": (0, 0, 2, 2), "b": (0, 0, 2, 2), "c": (0, 0, 2, 2), "d": (0, 0, 2, 2)}
    found = {"a": (0, 0, 2, 2), "b": (0, 0, 2, 1), "c": (0, 0, 2, 0.99), "d": (3, 3, 4, 4)}
    result = refexp_accuracy(found, boxes)
    assert result.per_sample == {"a": 1, "b": 1, "c": 0, "d": 0}
    assert result.value == 0.5
    assert result.details["accuracy@0.5"] == 0.5 and result.details["accuracy@0.9"] == 0.25
    assert result.details["mean_iou"] == pytest.approx((1 + 0.5 + 0.495) / 4)
    assert refexp_accuracy(found, boxes, threshold=0.49).value == 0.75


def test_segmentation_mean_and_cumulative():
    masks = {"small": square(10, 0, 0, 2, 1), "large": square(10, 0, 0, 10, 9)}
    found = {"small": square(10, 0, 0, 1, 1), "large": square(10, 0, 0, 10, 10)}
    result = segmentation_iou(found, masks)
    assert result.per_sample == {"small": 0.5, "large": 0.9}
    assert result.value == pytest.approx(0.7)
    assert result.details["cumulative"] == pytest.approx(91 / 102)
    assert result.details["precision@0.5"] == 1 and result.details["precision@0.6"] == 0.5


def test_empty_masks_agree_with_nothing_else():
    nothing, something = square(4, 0, 0, 0, 0), square(4, 0, 0, 1, 1)
    assert segmentation_iou({1: nothing, 2: something}, {1: nothing, 2: nothing}).per_sample == {1: 1.0, 2: 0.0}
    assert segmentation_iou({1: nothing}, {1: nothing}).details["cumulative"] == 1.0


@pytest.mark.parametrize("metric", [refexp_accuracy, segmentation_iou])
def test_no_samples_missing_and_unknown_ones(metric):
    with pytest.raises(UserError, match="found no samples"):
        metric({}, {})
    with pytest.raises(UserError, match="no prediction for samples"):
        metric({}, {1: (0, 0, 1, 1)})
    with pytest.raises(UserError, match="predictions for unknown samples"):
        metric({1: (0, 0, 1, 1), 2: (0, 0, 1, 1)}, {1: (0, 0, 1, 1)})


@pytest.mark.parametrize("box", [(0, 0, float("nan"), 1), (0, 0, 1), (2, 0, 1, 1)])
def test_what_is_no_box_is_refused(box):
    with pytest.raises(UserError, match="found the box"):
        refexp_accuracy({1: box}, {1: (0, 0, 1, 1)})


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((3, 3)), "float64"),
        (np.zeros((3, 4), bool), r"found a mask of \(3, 4\)"),
        (None, "found NoneType"),
    ],
)
def test_what_is_no_mask_is_refused(mask, message):
    with pytest.raises(UserError, match=message):
        segmentation_iou({1: mask}, {1: np.zeros((3, 3), bool)})
