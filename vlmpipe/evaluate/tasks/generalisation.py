"""Generalisation: questions about pictures with combinations of colour and shape that no training picture has.

CLEVR's CoGenT (arXiv 1612.06890, section 4.7) is such a set: condition A to train, B, or both, to test.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from vlmpipe.data.fields import found_files
from vlmpipe.data.readers.clevr import ClevrScene, read_clevr, read_clevr_scenes
from vlmpipe.data.task import TaskConfig
from vlmpipe.errors import UserError
from vlmpipe.evaluate.store import Counts
from vlmpipe.evaluate.tasks.base import EvaluateConfig, Sample, Scores, by_slice
from vlmpipe.evaluate.tasks.conditions import hits
from vlmpipe.evaluate.tasks.questions import predict_answers, sampled, score_answers
from vlmpipe.models import Processor, VisionLanguageModel

TRAIN = "train"
KNOWN = ("accuracy_wrong_image", "accuracy_blind", "gain_over_blind")  # of the questions' own metrics
Look = tuple[str, str]  # colour and shape


def read_combinations(split: Path, task: TaskConfig) -> list[Sample]:
    """One sample per answered question of all `*questions.json`; slice `combination`: unseen where its picture has a
    thing of a colour and shape that no scene of `train/` has, else seen.

    Raises:
        UserError: the files are not CLEVR's, or there are no scenes.
    """
    split = Path(split)
    if task.reader != "clevr":
        raise UserError(f"task.reader: found '{task.reader}'; expected 'clevr' for the task 'generalisation', which "
                        f"reads what stands in each scene; choose another task group or other tasks in evaluate")
    known = looks(scenes_of(split.parent / TRAIN))
    shown = {scene.image: looks([scene]) for scene in scenes_of(split)}
    files = found_files(split, "*questions.json")
    records = [
        replace(record, id=f"{file.stem}-{record.id}" if len(files) > 1 else record.id)
        for file in files for record in read_clevr(file)
    ]
    lost = next((record for record in records if record.images[0] not in shown), None)
    if lost is not None:
        raise UserError(f"{split}: found no scene of {lost.images[0]}; expected those of all questions; add its file")
    marked = [
        replace(record, slices={**record.slices, "combination": combination(shown[record.images[0]], known)})
        for record in records
    ]
    return sampled(marked, split, task)


def scenes_of(split: Path) -> list[ClevrScene]:
    files = found_files(split, "*scenes.json")
    if not files:
        raise UserError(f"{split}: found no *scenes.json; expected CLEVR's scenes, to know what is combined there")
    return [scene for file in files for scene in read_clevr_scenes(file)]


def looks(scenes: Iterable[ClevrScene]) -> set[Look]:
    return {(thing.color, thing.shape) for scene in scenes for thing in scene.objects}


def combination(shown: set[Look], known: set[Look]) -> str:
    return "seen" if shown <= known else "unseen"


def predict_combinations(
    model: VisionLanguageModel, processor: Processor, batch: Sequence[Sample], right: Sequence[Image.Image],
    wrong: Sequence[Image.Image], config: EvaluateConfig,
) -> list[dict]:
    return predict_answers(model, processor, batch, right, wrong, config)


def score_combinations(samples: list[Sample], rows: list[dict]) -> Scores:
    """VQA's accuracy, with seen and with unseen combinations, and the gap between the two where there are both."""
    scores = score_answers(samples, rows)
    right = hits(scores)
    counts = by_slice("accuracy", right, samples, "combination") | {name: scores.counts[name] for name in KNOWN}
    if {"accuracy.seen", "accuracy.unseen"} <= set(counts):
        unseen = {sample.id: sample.slices["combination"] == "unseen" for sample in samples}
        counts["gap"] = Counts(
            "gap", {key: (0.0, 0.0, hit, 1.0) if unseen[key] else (hit, 1.0, 0.0, 0.0) for key, hit in right.items()}
        )
    return Scores.of(counts, scores.rows)
