"""Detection: all things of all labels in a picture, by COCO's average precision."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vlmpipe.data.records import DetectionRecord
from vlmpipe.data.task import TaskConfig
from vlmpipe.evaluate.metrics import Detections, detection_map
from vlmpipe.evaluate.metrics.matches import IOUS, detection_counts
from vlmpipe.evaluate.store import Counts
from vlmpipe.evaluate.tasks.base import EvaluateConfig, Sample, Scores, file_id, mismatch, records_of
from vlmpipe.models import Processor, VisionLanguageModel
from vlmpipe.models.locate import detect

LEAST = 0.01  # score of a box that counts
MOST = 100  # boxes of a picture


def read_detections(split: Path, task: TaskConfig) -> list[Sample]:
    """One sample per picture, which is asked for every label of the split."""
    records = records_of(split, task, DetectionRecord, "detection")
    names = tuple(sorted({label for record in records for label in record.labels}))
    of_picture = {record.image: record for record in records}
    wrong = mismatch({image: image for image in of_picture}, f"pictures in {split}")
    return [
        Sample(
            file_id(record.id), record.image, wrong[record.image], ", ".join(names), record.labels, truth=record,
            wrong_truth=of_picture[wrong[record.image]], choices=names,
        )
        for record in records
    ]


def predict_detections(
    model: VisionLanguageModel, processor: Processor, batch: Sequence[Sample], right: Sequence[Image.Image],
    wrong: Sequence[Image.Image], config: EvaluateConfig,
) -> list[dict]:
    """The boxes found in either picture, in pixels of the true one."""
    return [
        {
            which: find_all(model, processor, picture.resize(sample.truth.size), sample.choices)
            for which, picture in (("right", one), ("wrong", other))
        }
        for sample, one, other in zip(batch, right, wrong, strict=True)
    ]


def find_all(
    model: VisionLanguageModel, processor: Processor, picture: Image.Image, names: Sequence[str]
) -> Detections:
    found = detect(model, processor, picture, names, LEAST)
    labels = tuple(names[number] for number in found.phrases[:MOST].tolist())
    return Detections(found.boxes[:MOST].numpy(), found.scores[:MOST].numpy(), labels)


def score_detections(samples: list[Sample], rows: list[dict]) -> Scores:
    """Average precision with either picture; and of saying in every picture what another one really shows."""
    truth = {sample.id: sample.truth for sample in samples}
    by_id = dict(zip(truth, rows, strict=True))
    said = {
        "": {key: row["right"] for key, row in by_id.items()},
        "_wrong_image": {key: row["wrong"] for key, row in by_id.items()},
        "_blind": {sample.id: certain(sample.wrong_truth) for sample in samples},
    }
    right, wrong, blind = (detection_map(found, truth) for found in said.values())
    metrics = {
        "ap": right.value, "ap_wrong_image": wrong.value, "ap_blind": blind.value,
        "gain_over_blind": right.value - blind.value, "ap@0.5": right.details["ap@0.5"],
        "ap@0.5_wrong_image": wrong.details["ap@0.5"], "ap@0.5_blind": blind.details["ap@0.5"],
    }
    stored = {
        key: {"prediction": written(row["right"]), "wrong_prediction": written(row["wrong"])}
        for key, row in by_id.items()
    }
    counts = {
        f"{name}{ending}": Counts("average_precision", detection_counts(found, truth, ious))
        for name, ious in (("ap", IOUS), ("ap@0.5", IOUS[:1])) for ending, found in said.items()
    }
    return Scores(metrics, dict.fromkeys(metrics, len(samples)), stored, counts=counts)


def certain(record: DetectionRecord) -> Detections:
    """What a picture shows, as if it were found."""
    return Detections(record.boxes, np.ones(len(record.labels)), record.labels)


def written(found: Detections, most: int = 5) -> str:
    """The surest boxes in a line."""
    boxes = zip(found.labels[:most], found.boxes[:most], found.scores[:most])
    return "; ".join(f"{label} {' '.join(f'{at:.0f}' for at in box)} ({score:.2f})" for label, box, score in boxes)
