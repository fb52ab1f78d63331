"""Hallucination: does a model speak of things that aren't there?

POPE (arXiv 2305.10355) asks yes or no about one thing at a time; CHAIR (arXiv 1809.02156) looks for things in captions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlmpipe.data.fields import found_files
from vlmpipe.data.readers.coco import read_coco_instances
from vlmpipe.data.records import DetectionRecord, QuestionRecord
from vlmpipe.data.task import TaskConfig
from vlmpipe.data.tasks.polls import poll
from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import pope, says_yes, things_named
from vlmpipe.evaluate.store import Counts
from vlmpipe.evaluate.tasks.base import EvaluateConfig, Sample, Scores, file_id, means, records_of, slug
from vlmpipe.evaluate.tasks.questions import wrong_pictures
from vlmpipe.models import Processor, VisionLanguageModel
from vlmpipe.models.generate import answer, caption

SYNONYMS = "synonyms.txt"  # CHAIR's own: a line a thing, its name and then its other words, by commas


@dataclass(frozen=True)
class Things:
    """The names of all that is in a picture, and the words for things; see `metrics.chair`."""

    present: tuple[str, ...]
    vocabulary: dict[str, str]


def read_polls(split: Path, task: TaskConfig) -> list[Sample]:
    """A sample for each question of POPE's files, or, where boxes are read, for each that `poll` makes of them. Then
    one for each picture's caption, where boxes are read or stand beside the questions as `*instances*.json`."""
    found = records_of(split, task, (QuestionRecord, DetectionRecord), "hallucination")
    boxes = isinstance(found[0], DetectionRecord)
    questions = poll(found) if boxes else found
    beside = any(found_files(split, "*instances*.json"))
    detections = found if boxes else read_coco_instances(split) if beside else []
    pictures = [(record.image,) for record in detections]
    wrong = wrong_pictures([record.images for record in questions] + pictures, split, task)
    polled = [
        Sample(file_id(record.id), record.images[0], wrong[record.images][0], record.question,
               (_label(record, split),), record.slices)
        for record in questions
    ]
    return polled + _captioned(detections, wrong, _vocabulary(split, detections))


def _label(record: QuestionRecord, split: Path) -> str:
    if record.answers[:1] not in (("yes",), ("no",)):
        raise UserError(
            f"{split}: found the answer {record.answers[:1]} to {record.id}; expected yes or no for the task "
            f"'hallucination'; choose another task group or set evaluate.finetune.tasks"
        )
    return record.answers[0]


def _captioned(
    detections: Sequence[DetectionRecord], wrong: Mapping[tuple, tuple], vocabulary: dict[str, str]
) -> list[Sample]:
    samples = []
    for record in detections:
        present = tuple(sorted({vocabulary[label] for label in record.labels}))
        samples.append(
            Sample(f"caption-{file_id(record.id)}", record.image, wrong[record.image,][0], "", present,
                   truth=Things(present, vocabulary))
        )
    return samples


def _vocabulary(split: Path, detections: Sequence[DetectionRecord]) -> dict[str, str]:
    """Each label for itself, and the words of CHAIR's file of synonyms where it stands beside."""
    words = {label: label for record in detections for label in record.labels}
    if (Path(split) / SYNONYMS).is_file():
        for line in (Path(split) / SYNONYMS).read_text(encoding="utf-8").splitlines():
            said = [word.strip() for word in line.split(",") if word.strip()]
            words |= dict.fromkeys(said, said[0]) if said else {}
    return words


# --- asking ------------------------------------------------------------------------------------------------

def predict_polls(
    model: VisionLanguageModel, processor: Processor, batch: Sequence[Sample], right: Sequence[Image.Image],
    wrong: Sequence[Image.Image], config: EvaluateConfig,
) -> list[dict]:
    """What the model says with either picture; None for the captions of a model that writes none."""
    said = (reply(model, processor, batch, images, config) for images in (right, wrong))
    return [{"right": one, "wrong": other} for one, other in zip(*said, strict=True)]


def reply(
    model: VisionLanguageModel, processor: Processor, batch: Sequence[Sample], images: Sequence[Image.Image],
    config: EvaluateConfig,
) -> list[str | None]:
    """An answer to each question, and a caption where there is none."""
    asked = [i for i, sample in enumerate(batch) if sample.question]
    captioned = [i for i, sample in enumerate(batch) if not sample.question and model.language_model is not None]
    said: list[str | None] = [None] * len(batch)
    if asked:
        questions, seen = [batch[i].question for i in asked], [images[i] for i in asked]
        for i, text in zip(asked, answer(model, processor, seen, questions, config.answer_tokens), strict=True):
            said[i] = text
    if captioned:
        seen = [images[i] for i in captioned]
        for i, text in zip(captioned, caption(model, processor, seen, config.caption_tokens), strict=True):
            said[i] = text
    return said


# --- scores ------------------------------------------------------------------------------------------------

def score_polls(samples: list[Sample], rows: list[dict]) -> Scores:
    """POPE's numbers in all and by strategy, with either picture; CHAIR's of the captions, if any names a thing."""
    said = {which: {sample.id: row[which] for sample, row in zip(samples, rows, strict=True)}
            for which in ("right", "wrong")}
    asked = [sample for sample in samples if sample.question]
    captioned = [sample for sample in samples if said["right"][sample.id] is not None and not sample.question]
    stored = {sample.id: {} for sample in samples}
    for sample in captioned:
        stored[sample.id] = {"prediction": said["right"][sample.id], "wrong_prediction": said["wrong"][sample.id]}
    counts = polled(asked, said, stored) | named(captioned, said["right"])
    wrong = {f"{name}_wrong_image": found for name, found in named(captioned, said["wrong"]).items()}
    return Scores.of(counts | wrong, stored)


def polled(asked: Sequence[Sample], said: Mapping[str, Mapping], stored: dict[str, dict]) -> dict[str, Counts]:
    """The blind guess is always yes or always no."""
    if not asked:
        return {}
    labels = {sample.id: sample.answers[0] == "yes" for sample in asked}
    right, wrong = (pope({key: said[which][key] for key in labels}, labels).per_sample for which in ("right", "wrong"))
    more = sum(labels.values()) * 2 >= len(labels)
    blind = {key: float(label == more) for key, label in labels.items()}
    for key in labels:
        stored[key] |= {
            "prediction": said["right"][key], "score": right[key], "wrong_prediction": said["wrong"][key],
            "wrong_score": wrong[key],
        }
    counts = judged("", labels, said["right"])
    for strategy in sorted({sample.slices["strategy"] for sample in asked if "strategy" in sample.slices}):
        some = {sample.id: labels[sample.id] for sample in asked if sample.slices.get("strategy") == strategy}
        counts |= judged(f".{slug(strategy)}", some, said["right"])
    gain = {key: hit - blind[key] for key, hit in right.items()}
    return counts | {
        "accuracy_wrong_image": means(wrong), "accuracy_blind": means(blind), "gain_over_blind": means(gain),
    }


def judged(ending: str, labels: Mapping[str, bool], said: Mapping[str, str]) -> dict[str, Counts]:
    """Accuracy, precision, recall and f1 of "yes", and the share of "yes". Precision is left out where nothing was
    said to be there, recall and f1 where nothing is."""
    pairs = {key: (says_yes(said[key]), label) for key, label in labels.items()}
    counts = {
        "accuracy": means({key: float(yes == label) for key, (yes, label) in pairs.items()}),
        "yes_ratio": means({key: float(yes) for key, (yes, _) in pairs.items()}),
    }
    if any(yes for yes, _ in pairs.values()):
        counts["precision"] = Counts("ratio", {key: (yes and label, yes) for key, (yes, label) in pairs.items()})
    if any(labels.values()):
        counts["recall"] = Counts("ratio", {key: (yes and label, label) for key, (yes, label) in pairs.items()})
        counts["f1"] = Counts(
            "f1", {key: (yes and label, yes and not label, label and not yes) for key, (yes, label) in pairs.items()}
        )
    return {f"{name}{ending}": Counts(c.form, _floats(c.samples)) for name, c in counts.items()}


def _floats(samples: Mapping[str, Sequence]) -> dict[str, tuple[float, ...]]:
    return {key: tuple(map(float, values)) for key, values in samples.items()}


def named(captioned: Sequence[Sample], said: Mapping[str, str]) -> dict[str, Counts]:
    """CHAIR's s (captions that name something that isn't there) and i (such namings of all); nothing where no caption
    names a thing, which is no number."""
    names = {sample.id: things_named(said[sample.id], sample.truth.vocabulary) for sample in captioned}
    if not any(names.values()):
        return {}
    wrong = {
        sample.id: sum(thing not in sample.truth.present for thing in names[sample.id]) for sample in captioned
    }
    namings = {key: (float(count), float(len(names[key]))) for key, count in wrong.items()}
    return {
        "chair.s": means({key: float(count > 0) for key, count in wrong.items()}),
        "chair.i": Counts("ratio", namings),
    }
