"""Where captioned pictures come from: a packed dataset, a trusted shard directory. Other tasks: `train.tasks`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmpipe.errors import UserError
from vlmpipe.models.processor import Processor
from vlmpipe.models.vlm import VisionLanguageModel
from vlmpipe.shards import iter_images, read_manifest, read_rows, read_shard_rows
from vlmpipe.train.batches import Dataset, Pair, make_dataset


@dataclass(frozen=True)
class Source:
    """Encoded pictures, and pairs that point at them by number."""

    images: Sequence[bytes]
    pairs: tuple[Pair, ...]

    @property
    def texts(self) -> list[str]:
        """Everything a tokenizer should know, in order."""
        return [text for pair in self.pairs for text in (pair.question, pair.answer) if text]

    def answers_for(self, model: VisionLanguageModel) -> tuple[str, ...]:
        """Captions have no answers to choose among."""
        return ()

    def lessons(
        self, images: np.ndarray, model: VisionLanguageModel, processor: Processor, per_row: int
    ) -> tuple[Dataset, None]:
        """The training data; what objective fits is up to the model."""
        return make_dataset(images, self.pairs, processor, model.language_model is not None, per_row), None

    def concat(self, other: "Source") -> "Source":
        shift = len(self.images)
        moved = tuple(Pair(moved_by(shift, pair.image), pair.question, pair.answer) for pair in other.pairs)
        return Source([*self.images, *other.images], self.pairs + moved)


def moved_by(shift: int, image: int | tuple[int, ...]) -> int | tuple[int, ...]:
    """Numbers of pictures when `shift` others come before them."""
    return tuple(number + shift for number in image) if isinstance(image, tuple) else image + shift


def read_packed(directory: Path) -> Source:
    """One split of a packed dataset: parquet files with `image` {bytes, path} and `caption`, in name order.

    Raises:
        UserError: no parquet there, a damaged one, or not one row.
    """
    directory = Path(directory)
    files = sorted(directory.glob("*.parquet"))
    if not files:
        raise UserError(f"found no parquet files in {directory}; expected a packed split; rerun the pack stage")
    images, pairs = [], []
    for file in files:
        table = read_shard_rows(directory.parent, f"{directory.name}/{file.stem}", ["image", "caption"])
        for image, caption in zip(table["image"].to_pylist(), table["caption"].to_pylist(), strict=True):
            pairs.append(Pair(len(images), "", caption))
            images.append(image["bytes"])
    if not images:
        raise UserError(f"found 0 rows in {directory}; expected at least one pair; look at the selection's funnel")
    return Source(images, tuple(pairs))


def read_shards(directory: Path) -> Source:
    """A shard directory of pictures with captions, such as the scorer's trusted set."""
    rows = read_rows(directory, ["uid", "caption"])
    captions = dict(zip(rows["uid"].to_pylist(), rows["caption"].to_pylist(), strict=True))
    images, pairs = [], []
    for shard in read_manifest(directory)["shards"]:
        for uid, data in iter_images(directory, shard["name"]):
            pairs.append(Pair(len(images), "", captions[uid]))
            images.append(data)
    if not images:
        raise UserError(f"found 0 pictures in {directory}; expected at least one pair; rerun the stage that writes it")
    return Source(images, tuple(pairs))
