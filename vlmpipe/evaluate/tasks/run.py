"""Evaluation: the configured tasks on a model directory, in one dispatch."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from vlmpipe.data.task import TaskConfig
from vlmpipe.dispatch import Cluster, map_shards
from vlmpipe.errors import UserError
from vlmpipe.evaluate.tasks.base import EvaluateConfig, Sample, Task, decode_all, keys_of, task_pictures
from vlmpipe.evaluate.tasks.captions import packed_pictures, predict_captions, read_captions, score_captions
from vlmpipe.evaluate.tasks.classes import predict_classes, read_classes, score_classes
from vlmpipe.evaluate.tasks.compositionality import predict_contrasts, read_contrasts, score_contrasts
from vlmpipe.evaluate.tasks.detection import predict_detections, read_detections, score_detections
from vlmpipe.evaluate.tasks.look import look, spread, write_attention
from vlmpipe.evaluate.tasks.matching import predict_matches, read_matches, score_matches
from vlmpipe.evaluate.tasks.questions import predict_answers, read_questions, score_answers
from vlmpipe.evaluate.tasks.regions import (
    predict_boxes,
    predict_masks,
    read_expressions,
    read_masks,
    score_boxes,
    score_masks,
)
from vlmpipe.evaluate.tasks.retrieval import predict_retrieval, read_retrieval, score_retrieval
from vlmpipe.evaluate.tasks.statements import predict_statements, read_statements, score_statements
from vlmpipe.models import load
from vlmpipe.shards import write_json, write_table

TASKS: dict[str, Task] = {
    "captioning": Task(read_captions, packed_pictures, predict_captions, score_captions, packed=True),
    "vqa": Task(read_questions, task_pictures, predict_answers, score_answers),
    "classification": Task(read_classes, task_pictures, predict_classes, score_classes),
    "statements": Task(read_statements, task_pictures, predict_statements, score_statements),
    "segmentation": Task(read_masks, task_pictures, predict_masks, score_masks),
    "referring": Task(read_expressions, task_pictures, predict_boxes, score_boxes),
    "detection": Task(read_detections, task_pictures, predict_detections, score_detections),
    "compositionality": Task(read_contrasts, task_pictures, predict_contrasts, score_contrasts),
    "retrieval": Task(read_retrieval, task_pictures, predict_retrieval, score_retrieval),
    "matching": Task(read_matches, task_pictures, predict_matches, score_matches),
}
# Sample ids name the files of attention maps.
FILE_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Chunk:
    """The unit of dispatch. Its samples travel without their pictures: a worker reads those from `place`, as `files`
    says."""

    name: str
    task: str
    place: Path
    samples: tuple[Sample, ...]
    files: TaskConfig = field(default_factory=TaskConfig)
    attend: bool = False  # see where the model looks, rather than predict


def evaluate(
    name: str, model: Path, packed: Path, questions: Path, out: Path, metrics: Path, config: EvaluateConfig,
    cluster: Cluster, task: TaskConfig | None = None,
) -> None:
    """Run the configured tasks on a model directory.

    Writes `out`/samples.parquet (a row per sample: task, sample_id, image_id, question, prediction, answers, score,
    wrong_image_id, wrong_prediction, wrong_score, slices), `out`/attention/TASK-ID.npz (`map` [h, w] float32 summing
    to 1, `picture` [Y, X, 3] uint8), and `metrics`: {"metrics": {name: number}, "n": {name: count}, "details": {…}}.

    Args:
        packed: a packed dataset; captioning reads its `test`. questions: the folder of the task's own files, of which
            the other tasks read `test`; `task` says in which format (by default VQAv2's).

    Raises:
        UserError: no test data, a sample that can't be scored, or a model that can't do the task.
    """
    out, metrics, files = Path(out), Path(metrics), task or TaskConfig()
    folders = {key: Path(packed if TASKS[key].packed else questions).absolute() / "test" for key in config.tasks}
    asked = {key: choose_samples(TASKS[key].read(folders[key], files), config) for key in config.tasks}
    chunks = [chunk for key in config.tasks for chunk in split(key, folders[key], asked[key], config.chunk, files)]
    # Answers to questions show best where a model looks.
    key = "vqa" if "vqa" in asked else config.tasks[0]
    shown = Chunk("attention", key, folders[key], tuple(spread(asked[key], config.attention_samples)), files, True)
    # One dispatch for everything: joining a cluster costs seconds.
    *parts, looks = map_shards(
        partial(run_chunk, model=Path(model).absolute(), config=config), [*chunks, shown], cluster, f"evaluate {name}"
    )
    merged: dict[str, dict] = {"metrics": {}, "n": {}, "details": {}}
    table = []
    for key, samples in asked.items():
        rows = [row for chunk, part in zip(chunks, parts, strict=True) if chunk.task == key for row in part]
        scores = TASKS[key].score(samples, rows)
        for field_name in merged:
            merged[field_name].update({f"{key}.{said}": value for said, value in getattr(scores, field_name).items()})
        table += [store_row(key, sample, scores.rows[sample.id]) for sample in samples]
    write_table(out / "samples.parquet", pa.Table.from_pylist(table, schema=STORE))
    names = (f"{shown.task}-{sample.id}" for sample in shown.samples)
    write_attention(out / "attention", dict(zip(names, looks)))
    write_json(metrics, merged)


STORE = pa.schema(
    [(name, pa.string()) for name in ("task", "sample_id", "image_id", "question", "prediction")]
    + [("images", pa.list_(pa.string()))]
    + [("answers", pa.list_(pa.string())), ("score", pa.float64()), ("wrong_image_id", pa.string())]
    + [("wrong_prediction", pa.string()), ("wrong_score", pa.float64())]
    + [("slices", pa.map_(pa.string(), pa.string()))]
)


def store_row(task: str, sample: Sample, scored: Mapping[str, Any]) -> dict:
    """A row of the score store; what a task doesn't give is null."""
    return {
        "task": task,
        "sample_id": sample.id,
        "image_id": str(sample.image),
        "images": list(map(str, sample.image if isinstance(sample.image, tuple) else (sample.image,))),
        "question": sample.question,
        "answers": list(sample.answers),
        "wrong_image_id": str(sample.wrong_image),
        "slices": sorted(sample.slices.items()),
        **scored,
    }


# --- running a task ----------------------------------------------------------------------------------------

def split(
    task: str, place: Path, samples: Sequence[Sample], size: int, files: TaskConfig | None = None
) -> list[Chunk]:
    """The samples in chunks of `size`.

    Raises:
        UserError: a sample id stands twice, or can't name a file.
    """
    counts = Counter(sample.id for sample in samples)
    odd = [key for key, count in counts.items() if count > 1 or not FILE_NAME.fullmatch(key)]
    if odd:
        raise UserError(f"{place}: found sample id {odd[0]!r}; expected each once and of letters, digits, . _ and -")
    return [
        Chunk(f"{task} from {at}", task, place, tuple(samples[at : at + size]), files or TaskConfig())
        for at in range(0, len(samples), size)
    ]


def run_chunk(chunk: Chunk, model: Path, config: EvaluateConfig) -> list[dict]:
    """What one worker does: load the model, then predict batch by batch, or see where it looks."""
    network, processor = load(model, device())
    task = TASKS[chunk.task]
    pictures = task.pictures(chunk.place, keys_of(chunk.samples), chunk.files)
    if chunk.attend:
        return look(network, processor, chunk.samples, pictures)
    rows = []
    for at in range(0, len(chunk.samples), config.batch_size):
        batch = chunk.samples[at : at + config.batch_size]
        right = [decode_all(pictures, sample.image) for sample in batch]
        wrong = [decode_all(pictures, sample.wrong_image) for sample in batch]
        rows += task.predict(network, processor, batch, right, wrong, config)
    return rows


def device() -> str:
    """The accelerator that this process was given, if any."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_samples(samples: list[Sample], config: EvaluateConfig) -> list[Sample]:
    """All samples, or `limit` of them drawn with the seed, in their order."""
    if config.limit is None or len(samples) <= config.limit:
        return samples
    chosen = np.random.default_rng(config.seed).choice(len(samples), config.limit, replace=False)
    return [samples[index] for index in sorted(chosen)]
