"""Average precision from what each picture holds: boxes that were found, matched or not, and how many there are.

Precision is over all pictures together, so it does not add up; but whether a box is matched is settled in its own
picture. A picture drawn w times gives each of its boxes w times, at the same place in the order of scores: the
number is exactly that of COCO's evaluation on w copies of the picture, up to the order of boxes of equal score.

Shapes: B draws, N pictures, T IoUs, R recalls, L labels, D boxes found in all pictures with one label.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from vlmpipe.data.records import DetectionRecord
from vlmpipe.evaluate.metrics.regions import Detections, box_iou

IOUS = tuple(np.linspace(0.5, 0.95, 10).tolist())
RECALLS = np.linspace(0, 1, 101)
MOST = 100  # boxes of a picture and label
RIGHT, WRONG, IGNORED = 1.0, 0.0, -1.0


def detection_counts(
    predictions: Mapping[Any, Detections], truth: Mapping[Any, DetectionRecord], ious: Sequence[float] = IOUS
) -> dict[Any, list[float]]:
    """What `average_precision` reads, for each picture: T, L, how many true boxes of each label, then for each box
    found its label (from 1), its score, and for each IoU whether it is right (1), wrong (0) or counts for nothing
    (-1: it matches a crowd). Labels that truth has nowhere are left out.

    Source: cocodataset.org/#detection-eval: the surest box takes the true box that it overlaps most, crowds last.
    """
    names = sorted({label for record in truth.values() for label in record.labels})
    return {sample: _of_picture(predictions[sample], record, names, ious) for sample, record in truth.items()}


def _of_picture(
    found: Detections, record: DetectionRecord, names: Sequence[str], ious: Sequence[float]
) -> list[float]:
    single = [0.0] * len(names)
    for label, crowd in zip(record.labels, record.crowd, strict=True):
        single[names.index(label)] += not crowd
    counts = [float(len(ious)), float(len(names)), *single]
    for number, name in enumerate(names, start=1):
        true = [place for place, label in enumerate(record.labels) if label == name]
        true.sort(key=lambda place: bool(record.crowd[place]))
        mine = [place for place, label in enumerate(found.labels) if label == name]
        mine = sorted(mine, key=lambda place: -found.scores[place])[:MOST]
        crowd = [bool(record.crowd[place]) for place in true]
        overlaps = [
            [overlap(found.boxes[one], record.boxes[other], record.crowd[other]) for other in true] for one in mine
        ]
        flags = [_match(overlaps, crowd, iou) for iou in ious]
        for place, one in enumerate(mine):
            counts += [float(number), float(found.scores[one]), *(row[place] for row in flags)]
    return counts


def overlap(found: Sequence[float], true: Sequence[float], crowd: bool) -> float:
    """The IoU; with a crowd the share of the box that lies in it."""
    if not crowd:
        return box_iou(found, true)
    width = min(found[2], true[2]) - max(found[0], true[0])
    height = min(found[3], true[3]) - max(found[1], true[1])
    area = (found[2] - found[0]) * (found[3] - found[1])
    return max(width, 0.0) * max(height, 0.0) / area if area > 0 else 0.0


def _match(overlaps: Sequence[Sequence[float]], crowd: Sequence[bool], iou: float) -> list[float]:
    """For each box, the surest first: whether it is right, where each single true box is taken once."""
    taken: set[int] = set()
    flags = []
    for row in overlaps:
        best, most = None, min(iou, 1 - 1e-10)
        for place, shared in enumerate(row):
            if place in taken and not crowd[place]:
                continue
            if best is not None and crowd[place] and not crowd[best]:
                break
            if shared >= most:
                best, most = place, shared
        flags.append(WRONG if best is None else IGNORED if crowd[best] else RIGHT)
        taken |= {best} - {None}
    return flags


def average_precision(weights_BN: np.ndarray, counts_NM: np.ndarray) -> np.ndarray:
    """COCO's average precision [B] of each draw of pictures from `detection_counts`; NaN where nothing is there to
    find."""
    labels = int(counts_NM[0, 1])
    single_BL = weights_BN @ counts_NM[:, 2 : 2 + labels]
    precision_BL = np.zeros(single_BL.shape)
    sweep = _compiled_sweep()
    for label in range(labels):
        picture_D, flags_TD = _found(counts_NM, label)
        if len(picture_D):
            sweep(weights_BN, picture_D, flags_TD, single_BL[:, label], RECALLS, precision_BL[:, label])
    there_BL = single_BL > 0
    with np.errstate(invalid="ignore"):
        return np.where(there_BL, precision_BL, 0.0).sum(axis=1) / there_BL.sum(axis=1)


def _found(counts_NM: np.ndarray, label: int) -> tuple[np.ndarray, np.ndarray]:
    """The pictures [D] of the boxes of a label, the surest first, and whether they are right [T, D]."""
    ious, labels = (int(value) for value in counts_NM[0, :2])
    boxes_NM, width = counts_NM[:, 2 + labels :], 2 + ious
    boxes_NKX = boxes_NM[:, : boxes_NM.shape[1] // width * width].reshape(len(counts_NM), -1, width)
    picture_D, place_D = np.nonzero(boxes_NKX[..., 0] == label + 1)
    found_DX = boxes_NKX[picture_D, place_D]
    order = np.argsort(-found_DX[:, 1], kind="stable")
    return picture_D[order], np.ascontiguousarray(found_DX[order, 2:].T)


@cache
def _compiled_sweep() -> Callable:
    # Half a second of compiling, which only a comparison of detections needs.
    from numba import njit

    return njit(nogil=True)(_sweep)


def _sweep(weights_BN, picture_D, flags_TD, single_B, recalls_R, out_B):
    """Write to [B] the mean over IoUs and recalls of the best precision at that recall or a higher one."""
    recall_D, precision_D = np.empty(len(picture_D)), np.empty(len(picture_D))
    for b in range(len(weights_BN)):
        if single_B[b] <= 0:
            continue
        total = 0.0
        for t in range(len(flags_TD)):
            right = counted = 0.0
            for d in range(len(picture_D)):
                weight = weights_BN[b, picture_D[d]]
                if flags_TD[t, d] == RIGHT:
                    right += weight
                if flags_TD[t, d] != IGNORED:
                    counted += weight
                recall_D[d], precision_D[d] = right / single_B[b], right / (counted + 2.0**-52)
            best, r = 0.0, len(recalls_R) - 1
            for d in range(len(picture_D) - 1, -1, -1):
                best = max(best, precision_D[d])
                while r >= 0 and recalls_R[r] > recall_D[d]:  # not reached
                    r -= 1
                while r >= 0 and (d == 0 or recalls_R[r] > recall_D[d - 1]):  # reached here first
                    total += best
                    r -= 1
        out_B[b] = total / len(recalls_R) / len(flags_TD)
