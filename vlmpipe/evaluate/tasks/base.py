"""What every task shares: its config, samples and scores, and which wrong picture stands in for the right one."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from vlmpipe.data.records import Record
from vlmpipe.data.task import TaskConfig, read_pictures, read_records
from vlmpipe.errors import UserError
from vlmpipe.evaluate.store import Counts
from vlmpipe.evaluate.tasks.corruptions import RobustnessConfig
from vlmpipe.evaluate.tasks.options import DrawingConfig, FairnessConfig
from vlmpipe.images import NotAnImage, decode_rgb

TaskName = Literal[
    "captioning", "vqa", "classification", "statements", "segmentation", "referring", "detection", "compositionality",
    "retrieval", "matching", "hallucination", "robustness", "generalisation", "text_prior", "few_shot",
    "text_to_image", "fairness",
]
TRAIN = "train"  # beside the split; the names of pictures that are shown as examples begin with it
MOST_SHOTS = 8  # answered questions that are kept at hand as examples
TEMPLATES = ("{}", "a {}", "a photo of a {}", "a picture of a {}", "there is a {}")


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure and how.

    limit: at most so many samples of each task, drawn with `seed`; null takes all. chunk: samples that one worker
    takes at once; batch_size: samples in one forward pass. attention_samples: pictures with attention maps, of models
    that can show where they look. templates: sentences for the classes that a dual encoder chooses among. robustness:
    under which corruptions and resolutions. drawing: how pictures are drawn, and who judges them. fairness: which
    groups are compared. shots: how many examples stand before a question of `few_shot`.
    cost_samples: with how many samples seconds and memory are measured, and whether the checkpoint gives the same model
    again; 0 measures neither.
    """

    tasks: tuple[TaskName, ...] = ("captioning", "vqa")
    batch_size: int = 64
    chunk: int = 256
    limit: int | None = None
    answer_tokens: int = 16
    caption_tokens: int = 64
    attention_samples: int = 12
    seed: int = 0
    templates: tuple[str, ...] = TEMPLATES
    robustness: RobustnessConfig = field(default_factory=RobustnessConfig)
    drawing: DrawingConfig = field(default_factory=DrawingConfig)
    fairness: FairnessConfig = field(default_factory=FairnessConfig)
    shots: tuple[int, ...] = (0, 2, 4)
    cost_samples: int = 0

    def __post_init__(self):
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise UserError(f"tasks: found {list(self.tasks)}; expected at least one, each once")
        for name, least in (("batch_size", 1), ("chunk", 1), ("answer_tokens", 1), ("caption_tokens", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: found {getattr(self, name)}; expected at least {least}")
        if min(self.attention_samples, self.cost_samples) < 0 or (self.limit is not None and self.limit < 1):
            raise UserError("attention_samples, cost_samples, limit: expected at least 0, 0 and 1; null is no limit")
        if not self.templates or any(text.count("{}") != 1 for text in self.templates):
            raise UserError(f"templates: found {list(self.templates)}; expected texts with one {{}} each")
        if not self.shots or list(self.shots) != sorted(set(self.shots) & set(range(MOST_SHOTS + 1))):
            raise UserError(f"shots: found {list(self.shots)}; expected numbers from 0 to {MOST_SHOTS}, rising")


@dataclass(frozen=True)
class Sample:
    """One thing to ask; an empty question asks for a caption.

    `image`, `wrong_image`: keys of the task's pictures, or tuples of keys. `truth`: what answers can't say, such as a
    mask; `wrong_truth`: the same of the wrong picture, where a task needs it; `choices`: what there is to choose among.
    """

    id: str
    image: Any
    wrong_image: Any
    question: str
    answers: tuple[str, ...]
    slices: Mapping[str, str] = field(default_factory=dict)
    truth: Any = None
    wrong_truth: Any = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scores:
    """A task's numbers, on how many samples each rests (`n`), and per sample (by id) the row for samples.parquet.

    `counts`: for each metric that has any, what each sample gives to it; their sum makes the metric again.
    """

    metrics: dict[str, float]
    n: dict[str, int]
    rows: dict[str, dict]
    details: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, Counts] = field(default_factory=dict)

    @classmethod
    def of(
        cls, counts: dict[str, Counts], rows: dict[str, dict], details: Mapping[str, Any] | None = None
    ) -> "Scores":
        """Of metrics that are all made of counts."""
        metrics = {name: found.value for name, found in counts.items()}
        return cls(metrics, {name: len(found.samples) for name, found in counts.items()}, rows, dict(details or {}),
                   counts)


@dataclass(frozen=True)
class Task:
    """read: the samples of a split. pictures: its encoded images by key. predict: the model's part, a row of plain
    values for each sample of a batch. score: the metrics of all rows. packed: whether the split is of the packed
    dataset rather than of the task's own files. version: rises whenever the same answers would score otherwise."""

    read: Callable[[Path, TaskConfig], list[Sample]]
    pictures: Callable[[Path, set, TaskConfig], Mapping[Any, bytes]]
    predict: Callable[..., list[dict]]
    score: Callable[[list[Sample], list[dict]], Scores]
    packed: bool = False
    version: int = 1


# --- counts ------------------------------------------------------------------------------------------------

def means(per_sample: Mapping[str, float]) -> Counts:
    """Of a metric that is the mean over samples."""
    return Counts("ratio", {key: (float(value), 1.0) for key, value in per_sample.items()})


def by_slice(
    metric: str, per_sample: Mapping[str, float], samples: Sequence[Sample], name: str
) -> dict[str, Counts]:
    """`means` in all, as `metric`, and for each value that the slice `name` has, as `metric.value`."""
    return by_kind(metric, per_sample, {sample.id: sample.slices.get(name) for sample in samples})


def by_kind(metric: str, per_sample: Mapping[str, float], kinds: Mapping[str, str | None]) -> dict[str, Counts]:
    """`means` in all, as `metric`, and for each kind, as `metric.kind`."""
    found: dict[str, dict[str, float]] = {}
    for key, value in per_sample.items():
        if kinds[key] is not None:
            found.setdefault(slug(kinds[key]), {})[key] = value
    return {metric: means(per_sample), **{f"{metric}.{kind}": means(found[kind]) for kind in sorted(found)}}


# --- pictures ----------------------------------------------------------------------------------------------

def decode(pictures: Mapping[Any, bytes], key: Any) -> Image.Image:
    """One picture as RGB.

    Raises:
        UserError: there is no such picture, or it does not decode.
    """
    try:
        return decode_rgb(encoded(pictures, key))
    except NotAnImage as error:
        raise _unseen(str(error), key) from None


def encoded(pictures: Mapping[Any, bytes], key: Any) -> bytes:
    """One picture's bytes.

    Raises:
        UserError: there is no such picture.
    """
    try:
        return pictures[key]
    except KeyError:
        raise _unseen("no picture", key) from None


def _unseen(what: str, key: Any) -> UserError:
    return UserError(f"found {what} for {key!r}; expected a picture that decodes; mend the evaluation set")


def decode_all(pictures: Mapping[Any, bytes], key: Any) -> Image.Image | tuple[Image.Image, ...]:
    """A sample's picture, or its pictures."""
    return tuple(decode(pictures, one) for one in key) if isinstance(key, tuple) else decode(pictures, key)


def keys_of(samples: Sequence[Sample]) -> set:
    """Of every picture that the samples show, right or wrong."""
    shown = [key for sample in samples for key in (sample.image, sample.wrong_image)]
    return {one for key in shown for one in (key if isinstance(key, tuple) else (key,))}


def own_names(sample: Sample) -> tuple[str, ...]:
    """Of the pictures that the sample asks about, without those of examples from training."""
    names = tuple(map(str, sample.image if isinstance(sample.image, tuple) else (sample.image,)))
    return tuple(name for name in names if not name.startswith(f"{TRAIN}/")) or names


def task_pictures(split: Path, keys: set, task: TaskConfig) -> dict[Any, bytes]:
    """The pictures of a task's own files."""
    found = read_pictures(split, task)
    return {key: found[key] for key in keys}


def mismatch(keys: Mapping[Any, str], what: str) -> dict[Any, Any]:
    """For each id another id whose key differs: the distinct keys in random order, each paired with the next.

    Raises:
        UserError: fewer than two distinct keys.
    """
    ids_of: dict[str, list] = {}
    for sample, key in keys.items():
        ids_of.setdefault(key, []).append(sample)
    if len(ids_of) < 2:
        raise UserError(f"found {len(ids_of)} distinct {what}; expected at least 2, so that one can be the wrong one")
    # The pairing belongs to the data set, not to a run: every model is shown the same wrong pictures.
    distinct = sorted(ids_of)
    order = [distinct[index] for index in np.random.default_rng(0).permutation(len(distinct))]
    follower = dict(zip(order, order[1:] + order[:1], strict=True))
    wrong = {}
    for key, members in ids_of.items():
        donors = ids_of[follower[key]]
        wrong |= {sample: donors[index % len(donors)] for index, sample in enumerate(members)}
    return wrong


# --- records -----------------------------------------------------------------------------------------------

def records_of(split: Path, task: TaskConfig, kinds: type | tuple[type, ...], name: str) -> list[Record]:
    """The records of a split, which are of these kinds.

    Raises:
        UserError: they are others, or none.
    """
    found = list(read_records(split, task))
    wrong = next((record for record in found if not isinstance(record, kinds)), None)
    if not found or wrong is not None:
        said = type(wrong).__name__ if found else "no record"
        expected = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise UserError(
            f"{split}: found {said} by the reader '{task.reader}'; expected {expected} for the task '{name}'; choose "
            f"another task group or set evaluate.finetune.tasks"
        )
    return found


def file_id(text: str) -> str:
    """An id that can name a file: `red_circle/000001.jpg` becomes `red_circle-000001.jpg`."""
    return re.sub(r"[^\w.-]+", "-", text)


def slug(text: str) -> str:
    """A name that fits behind a dot: `what color is the` becomes `what_color_is_the`."""
    return re.sub(r"\W+", "_", text.strip().lower()).strip("_") or "none"
