"""The unit of an evaluation's dispatch: some samples of one task, asked of one model."""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlmpipe.data.task import TaskConfig
from vlmpipe.errors import UserError
from vlmpipe.evaluate.store import CHALLENGER, CHAMPION
from vlmpipe.evaluate.tasks.base import EvaluateConfig, Sample, Task, decode, encoded, keys_of
from vlmpipe.evaluate.tasks.look import look
from vlmpipe.evaluate.tasks.order import neighbours
from vlmpipe.evaluate.tasks.resume import fingerprint, read_rows, write_rows
from vlmpipe.models import Processor, VisionLanguageModel, read_model

# Sample ids name the files of attention maps.
FILE_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Contender:
    """A model that is evaluated: challenger or champion, its directory, and what names its files."""

    role: str
    directory: Path
    sha256: str = ""


@dataclass(frozen=True)
class Chunk:
    """Its samples travel without their pictures: a worker reads those from `place`, as `files` says."""

    name: str
    task: str
    place: Path
    samples: tuple[Sample, ...]
    files: TaskConfig = field(default_factory=TaskConfig)
    model: Contender = Contender(CHALLENGER, Path())
    attend: bool = False  # see where the model looks, rather than predict


@dataclass(frozen=True)
class Part:
    """What a chunk gives: a row for each sample and, of its right and of its wrong pictures, the sha256 of their bytes.

    `problem`: why the champion has no rows; a challenger's problem ends the evaluation.
    """

    rows: list[dict]
    pictures: list[tuple[str, str]] = field(default_factory=list)
    problem: str | None = None


def split(
    task: str, place: Path, samples: Sequence[Sample], size: int, files: TaskConfig | None = None,
    model: Contender = Contender(CHALLENGER, Path()),
) -> list[Chunk]:
    """The samples in chunks of `size`, those about the same pictures together.

    Raises:
        UserError: a sample id stands twice, or can't name a file.
    """
    counts = Counter(sample.id for sample in samples)
    odd = [key for key, count in counts.items() if count > 1 or not FILE_NAME.fullmatch(key)]
    if odd:
        raise UserError(f"{place}: found sample id {odd[0]!r}; expected each once and of letters, digits, . _ and -")
    samples = neighbours(samples)
    of = f" of the {CHAMPION}" if model.role == CHAMPION else ""
    return [
        Chunk(f"{task} from {at}{of}", task, place, tuple(samples[at : at + size]), files or TaskConfig(), model)
        for at in range(0, len(samples), size)
    ]


def run_chunk(
    chunk: Chunk, tasks: Mapping[str, Task], config: EvaluateConfig, protocol: str = "", state: Path | None = None
) -> Part:
    """What one worker does: load the model, then predict batch by batch, or see where it looks.

    Args:
        protocol: names everything but the chunk that the rows depend on. state: where rows that were had before lie.
    """
    task = tasks[chunk.task]
    pictures = task.pictures(chunk.place, keys_of(chunk.samples), chunk.files)
    if chunk.attend:
        return Part(see(chunk, pictures) if chunk.samples else [])
    seen = [(digest(pictures, sample.image), digest(pictures, sample.wrong_image)) for sample in chunk.samples]
    key = fingerprint([protocol, chunk.model.sha256, chunk.task, chunk.samples, seen])
    rows = None if state is None else read_rows(state, key)
    if rows is None:
        try:
            rows = predict(chunk, task, pictures, config)
        except UserError as error:
            if chunk.model.role != CHAMPION:
                raise
            return Part([], seen, str(error).replace(str(chunk.model.directory), CHAMPION))
        if state is not None:
            write_rows(state, key, rows)
    return Part(rows, seen)


def see(chunk: Chunk, pictures: Mapping[Any, bytes]) -> list[dict]:
    network, processor = read_model(chunk.model.directory, device())
    return look(network, processor, chunk.samples, pictures)


def predict(chunk: Chunk, task: Task, pictures: Mapping[Any, bytes], config: EvaluateConfig) -> list[dict]:
    network, processor = read_model(chunk.model.directory, device())
    return predict_samples(task, network, processor, chunk.samples, pictures, config)


def predict_samples(
    task: Task, network: VisionLanguageModel, processor: Processor, samples: Sequence[Sample],
    pictures: Mapping[Any, bytes], config: EvaluateConfig,
) -> list[dict]:
    """A row for each sample, batch by batch; in a batch each picture is decoded once."""
    rows = []
    for at in range(0, len(samples), config.batch_size):
        batch = samples[at : at + config.batch_size]
        seen = {key: decode(pictures, key) for key in keys_of(batch)}
        right, wrong = ([shown(seen, getattr(sample, which)) for sample in batch] for which in ("image", "wrong_image"))
        rows += task.predict(network, processor, batch, right, wrong, config)
    return rows


def shown(seen: Mapping[Any, Image.Image], key: Any) -> Image.Image | tuple[Image.Image, ...]:
    """A sample's picture, or its pictures."""
    return tuple(seen[one] for one in key) if isinstance(key, tuple) else seen[key]


def digest(pictures: Mapping[Any, bytes], key: Any) -> str:
    """Of the bytes of a sample's picture, or of all of its pictures in their order."""
    found = [hashlib.sha256(encoded(pictures, one)) for one in (key if isinstance(key, tuple) else (key,))]
    return found[0].hexdigest() if len(found) == 1 else hashlib.sha256(b"".join(f.digest() for f in found)).hexdigest()


def device() -> str:
    """The accelerator that this process was given, if any."""
    return "cuda" if torch.cuda.is_available() else "cpu"
