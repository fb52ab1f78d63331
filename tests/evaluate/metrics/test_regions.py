"""Measures of boxes and masks against hand-worked and published numbers."""

import numpy as np
import pytest

from vlmpipe.data.records import DetectionRecord
from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import Detections, box_iou, detection_map, refexp_accuracy, segmentation_iou


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


@pytest.mark.parametrize("metric", [refexp_accuracy, segmentation_iou, detection_map])
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


def true(*boxes, labels=None, crowd=None):
    count = len(boxes)
    return DetectionRecord(
        "id", "id.jpg", (500, 500), np.array(boxes, np.float32).reshape(-1, 4), labels or ("cat",) * count,
        np.array(crowd or [False] * count), (None,) * count,
    )


def found(*boxes, scores=None, labels=None):
    count = len(boxes)
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4), np.array(scores or [0.9] * count), labels or ("cat",) * count
    )


BOX = (10, 10, 110, 110)


def test_average_precision_of_nothing_wrong_and_nothing_right():
    assert detection_map({1: found(BOX)}, {1: true(BOX)}).value == pytest.approx(1)
    result = detection_map({1: found()}, {1: true(BOX)})
    assert result.value == 0 and result.details["recall"] == 0
    assert detection_map({1: found(BOX, labels=("dog",))}, {1: true(BOX)}).value == 0


def test_average_precision_by_hand():
    """Right, wrong, right: precision 1 up to half the things, 2/3 beyond, at 101 places."""
    predictions = {1: found(BOX, scores=[0.9]), 2: found((300, 300, 400, 400), BOX, scores=[0.8, 0.7])}
    result = detection_map(predictions, {1: true(BOX), 2: true(BOX)})
    assert result.value == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert result.details["recall"] == 1


def test_average_precision_asks_for_ten_overlaps():
    """72 of 100 rows: right at 0.5, 0.55, 0.6, 0.65 and 0.7, and at no higher IoU."""
    result = detection_map({1: found((10, 10, 110, 82))}, {1: true(BOX)})
    assert result.value == pytest.approx(0.5)
    assert result.details["ap@0.5"] == pytest.approx(1) and result.details["ap@0.75"] == 0


def test_labels_and_sizes_apart():
    small = (0, 0, 10, 10)
    truth = {1: true(BOX, small, labels=("cat", "dog"))}
    result = detection_map({1: found(BOX, (200, 200, 210, 210), labels=("cat", "dog"))}, truth)
    assert result.details["ap/cat"] == pytest.approx(1) and result.details["ap/dog"] == 0
    assert result.details["ap_large"] == pytest.approx(1) and result.details["ap_small"] == 0
    assert "ap_medium" not in result.details and result.value == pytest.approx(0.5)


def test_what_is_found_in_a_crowd_is_neither_right_nor_wrong():
    crowd = (200, 200, 400, 400)
    truth = {1: true(BOX, crowd, crowd=[False, True])}
    inside = found(BOX, (210, 210, 260, 260), (300, 300, 390, 390), scores=[0.5, 0.9, 0.8])
    assert detection_map({1: inside}, truth).value == pytest.approx(1)
    with pytest.raises(UserError, match="nothing but crowds"):
        detection_map({1: inside}, {1: true(crowd, crowd=[True])})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (found(BOX, scores=[float("nan")]), "no number for 1"),
        (found((0, 0, 1, float("nan"))), "found the box"),
        (Detections(np.zeros((2, 4)), np.zeros(1), ("cat",)), r"found \[2, 4\] boxes, \[1\] scores and 1 labels"),
    ],
)
def test_detections_that_are_none_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        detection_map({1: wrong}, {1: true(BOX)})
    with pytest.raises(UserError, match="found no true box"):
        detection_map({1: found(BOX)}, {1: true()})
