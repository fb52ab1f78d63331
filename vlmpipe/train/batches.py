"""Training data: decoded pictures, texts as token ids, batches as a pure function of the step.

Shapes: N pictures, B rows of this process, C colours, Y and X pixels, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.processor import EncodedText, Processor, stack
from vlmpipe.train.pictures import Pictures, inputs_of


@dataclass(frozen=True)
class Pair:
    """One thing to learn about picture number `image`, or about several; an empty question asks for a caption."""

    image: int | tuple[int, ...]
    question: str
    answer: str


@dataclass(frozen=True)
class Dataset:
    """Pictures, and rows: each row is a picture, or several, and the texts learned about it in one go.

    `mark`: the token with which a text says where its pictures stand; a row has one such text at most.
    """

    images: Pictures
    rows: tuple[tuple[int | tuple[int, ...], tuple[EncodedText, ...]], ...]
    mark: int | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """What `inputs_of` gives and the [B, T] tensors of `processor.stack`; `image_rows` [n] where rows have
        other numbers of pictures than one."""
        batch = {**self.pictures_of(indices), **stack([self.rows[index][1] for index in indices])}
        if len(batch["image_rows"]) == len(indices):
            del batch["image_rows"]
        return batch

    @property
    def marked(self) -> bool:
        """Whether any text says where its pictures stand."""
        return self.mark is not None and any(self.mark in text.ids for _, texts in self.rows for text in texts)

    def numbers(self, index: int) -> tuple[int, ...]:
        """The pictures of a row."""
        image = self.rows[index][0]
        return image if isinstance(image, tuple) else (image,)

    def pictures_of(self, indices: Sequence[int], rows: Sequence[int] | None = None) -> dict[str, Tensor]:
        """What `inputs_of` gives, and `image_rows` [n]: which of `rows`, one for each index, a picture is in."""
        numbers = [self.numbers(index) for index in indices]
        rows = np.repeat(np.arange(len(indices)) if rows is None else rows, [len(found) for found in numbers])
        seen = inputs_of(self.images, [number for found in numbers for number in found])
        return {**seen, "image_rows": torch.from_numpy(rows)}


def group(pairs: Sequence[Pair], per_row: int) -> list[list[Pair]]:
    """Pairs about one picture, at most `per_row` together, in the order given: a picture is encoded once a row."""
    by_image: dict[int | tuple[int, ...], list[Pair]] = {}
    for pair in pairs:
        by_image.setdefault(pair.image, []).append(pair)
    return [found[at : at + per_row] for found in by_image.values() for at in range(0, len(found), per_row)]


def make_dataset(
    images: Pictures, pairs: Sequence[Pair], processor: Processor, decoder: bool, per_row: int = 1
) -> Dataset:
    """Tokenize once. A decoder learns `per_row` answers in a row, or one where a text may mark its pictures' place; a
    dual encoder embeds "question answer"."""
    if not pairs:
        raise UserError("found no text to train on; expected a caption or question; check the data directory")
    encode = encode_learned if decoder else encode_joined
    rows = group(pairs, per_row if decoder and processor.picture is None else 1)
    texts = tuple((row[0].image, tuple(encode(processor, pair) for pair in row)) for row in rows)
    return Dataset(images, texts, processor.picture)


def encode_learned(processor: Processor, pair: Pair) -> EncodedText:
    return processor.encode_answer(pair.question, pair.answer)


def encode_joined(processor: Processor, pair: Pair) -> EncodedText:
    return processor.encode(f"{pair.question} {pair.answer}".strip())


class Batches:
    """Endless batches; `at(step)` depends on nothing but its arguments, so a run can go on from any step.

    The stream is one shuffled epoch after another, cut into batches of `batch_size` rows over all processes: every row
    is seen exactly once an epoch whatever the number of processes, and all batches have the same size. A process takes
    its own contiguous part of each batch.
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1):
        if batch_size % world or batch_size < world:
            raise UserError(
                f"batch_size: found {batch_size} for {world} workers; expected a multiple of the number of workers"
            )
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world = rank, world
        self._orders: dict[int, Sequence] = {}

    def shuffled(self, epoch: int) -> Sequence:
        """The rows of the dataset in the order of this epoch."""
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))

    def order(self, epoch: int) -> Sequence:
        if epoch not in self._orders:
            # Two are enough: a batch may straddle one boundary, or it recomputes.
            self._orders = {key: value for key, value in self._orders.items() if key == epoch - 1}
            self._orders[epoch] = self.shuffled(epoch)
        return self._orders[epoch]

    def locate(self, row: int) -> tuple[int, int]:
        """The epoch that row `row` of the stream is in, and its place there."""
        return divmod(row, len(self.dataset))

    def indices(self, step: int) -> list:
        """What this process's rows of batch `step`, counted from 0, hold: numbers of the dataset's rows."""
        share = self.batch_size // self.world
        start = step * self.batch_size + self.rank * share
        places = (self.locate(row) for row in range(start, start + share))
        return [self.order(epoch)[place] for epoch, place in places]

    def at(self, step: int) -> dict[str, Tensor]:
        return self.dataset.collate(self.indices(step))
