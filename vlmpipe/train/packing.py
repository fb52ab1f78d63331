"""Several samples in one row, so that little of a batch is padding; each sees itself alone.

Shapes: B rows of this process, n pictures, M tokens that a picture takes in its row, T tokens of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.places import Grid, picture_positions
from vlmpipe.models.processor import EncodedText
from vlmpipe.models.text import TEXTS
from vlmpipe.models.vlm import VisionLanguageModel
from vlmpipe.train.batches import Batches, Dataset
from vlmpipe.train.pictures import OwnSizes, Pictures

# Samples that are packed among themselves: more leave less padding, and make longer work of an epoch's start.
WINDOW = 1024


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Numbers of samples, in rows of at most `capacity` tokens: each goes, longest first, to the first with room.

    At most 11/9 of the fewest rows and 6/9 of one more (Dósa 2007).
    """
    rows: list[list[int]] = []
    free = np.zeros(len(lengths), np.int64)
    for number in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        fits = np.flatnonzero(free[: len(rows)] >= lengths[number])
        row = int(fits[0]) if len(fits) else len(rows)
        if row == len(rows):
            rows.append([])
            free[row] = capacity
        rows[row].append(number)
        free[row] -= lengths[number]
    return rows


Places = Callable[[int], np.ndarray]


def places_of(model: VisionLanguageModel, pictures: Pictures) -> Places:
    """From a picture's number to the positions of its tokens in the row, from 0: [M], or [M, 3] where the model counts
    in time, down and across (see `models.places`)."""
    native, positions = model.config.vision.native, np.arange(model.fusion.length)
    if native is None:
        return lambda number: positions

    @lru_cache(maxsize=4096)
    def of_grid(grid: Grid) -> np.ndarray:
        found = picture_positions(grid, native.merge).numpy()
        return found if model.config.text.rotary_sections else np.arange(len(found))

    if isinstance(pictures, OwnSizes):
        return lambda number: of_grid(pictures.grid(number))
    same = (1, *(side // model.config.vision.patch_size for side in pictures.shape[-2:]))
    return lambda number: of_grid(same)


@dataclass(frozen=True)
class Packer:
    """Makes rows of `capacity` tokens out of the samples of `dataset`, whose pictures' tokens stand at `places`; null:
    rows that hold any sample."""

    dataset: Dataset
    capacity: int | None
    places: Places

    def lengths(self) -> np.ndarray:
        """Tokens of each sample: its pictures and its texts.

        Raises:
            UserError: one is longer than a row.
        """
        seen = [sum(len(self.places(picture)) for picture in self.dataset.numbers(n)) for n in range(len(self.dataset))]
        found = np.array(seen) + [
            sum(len(text.ids) - (self.dataset.mark in text.ids) for text in texts) for _, texts in self.dataset.rows
        ]
        longest = int(found.argmax())
        if self.capacity is not None and found[longest] > self.capacity:
            raise UserError(
                f"pack: found a sample of {found[longest]} tokens, {seen[longest]} of them of pictures, in rows of "
                f"{self.capacity}; expected rows that hold any sample; raise pack, or lower per_row"
            )
        return found

    def collate(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """The pictures' inputs, `image_rows` [n], and [B, T] tokens, segments, positions, labels, prefix, image_places.

        The pictures of the g-th sample of a row stand before its texts, in segment -g; the texts have the segments
        that see them (see `vlmpipe.models.text`). A text that marks where they stand has them in itself. Positions
        start anew with each sample; [B, T, 3] where places are.
        """
        shape = len(rows), self.capacity
        found = {name: np.zeros(shape, np.int64) for name in ("tokens", "segments")}
        found["positions"] = np.zeros(shape + self.places(0).shape[1:], np.int64)
        found["labels"] = np.full(shape, -100, np.int64)
        found |= {name: np.zeros(shape, bool) for name in ("prefix", "image_places")}
        for row, samples in enumerate(rows):
            views = {name: values[row] for name, values in found.items()}
            at = 0
            for group, number in enumerate(samples):
                at = self.write(views, at, group, number)
        owners = np.repeat(np.arange(len(rows)), [len(samples) for samples in rows])
        pictures = self.dataset.pictures_of([number for samples in rows for number in samples], owners)
        return pictures | {name: torch.from_numpy(values) for name, values in found.items()}

    def write(self, row: dict[str, np.ndarray], at: int, group: int, number: int) -> int:
        """Put one sample into a row from token `at` on; returns where it ends."""
        _, texts = self.dataset.rows[number]
        if self.dataset.mark in texts[0].ids:
            return self.write_around(row, at, group, number)
        end, start = self.put_pictures(row, at, number, 0)
        row["segments"][at:end] = -1 - group
        for place, text in enumerate(texts, start=1):
            at, end = end, put_words(row, end, text.ids, start)
            row["segments"][at:end] = group * TEXTS + place
            put_targets(row, at, end, text)
        return end

    def write_around(self, row: dict[str, np.ndarray], at: int, group: int, number: int) -> int:
        """The same where the text marks the place of its pictures, which then are a part of it."""
        [text] = self.dataset.rows[number][1]
        mark = text.ids.index(self.dataset.mark)
        end, start = self.put_pictures(row, put_words(row, at, text.ids[:mark], 0), number, mark)
        end = put_words(row, end, text.ids[mark + 1 :], start)
        row["segments"][at:end] = group * TEXTS + 1
        put_targets(row, at, end, text)
        return end

    def put_pictures(self, row: dict[str, np.ndarray], at: int, number: int, start: int) -> tuple[int, int]:
        """Those of a sample, from position `start` on; returns where they end, and the position after them."""
        for picture in self.dataset.numbers(number):
            places = self.places(picture)
            end = at + len(places)
            row["image_places"][at:end] = True
            row["positions"][at:end] = start + places
            at, start = end, start + int(places.max()) + 1
        return at, start


def put_words(row: dict[str, np.ndarray], at: int, ids: Sequence[int], start: int) -> int:
    end = at + len(ids)
    row["tokens"][at:end] = ids
    steps = np.arange(start, start + len(ids))
    row["positions"][at:end] = steps.reshape(-1, *[1] * (row["positions"].ndim - 1))
    return end


def put_targets(row: dict[str, np.ndarray], at: int, end: int, text: EncodedText) -> None:
    """What is learned of a text that stands from `at` to `end`, as in `processor.stack`."""
    learned = text.ids[max(text.start, 1) :]
    row["labels"][end - 1 - len(learned) : end - 1] = learned
    row["prefix"][at : end - 1 - len(learned)] = True


class MarkedBatches(Batches):
    """Batches of rows with a sample each, whose pictures stand where its text marks them."""

    def __init__(self, packer: Packer, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1):
        super().__init__(packer.dataset, batch_size, seed, rank, world)
        self.packer, self.lengths = packer, packer.lengths()

    def at(self, step: int) -> dict[str, Tensor]:
        numbers = self.indices(step)
        fitting = replace(self.packer, capacity=int(self.lengths[numbers].max()))
        return fitting.collate([[number] for number in numbers])


class PackedBatches(Batches):
    """Endless batches of packed rows; every sample is in exactly one row of each epoch.

    An epoch's samples are shuffled, packed window by window, and the rows shuffled again. How many rows there are
    depends on the epoch, so going on at a late step packs the epochs before once more; it depends on nothing else.
    """

    def __init__(
        self, packer: Packer, batch_size: int, seed: int = 0, rank: int = 0, world: int = 1, window: int = WINDOW
    ):
        super().__init__(packer.dataset, batch_size, seed, rank, world)
        self.packer, self.window, self.lengths = packer, window, packer.lengths()
        self.starts = [0]  # the row of the stream that each epoch begins with, as far as known

    def shuffled(self, epoch: int) -> list[list[int]]:
        """The packed rows of this epoch: numbers of samples."""
        random = np.random.default_rng([self.seed, epoch])
        order, rows = random.permutation(len(self.lengths)), []
        for at in range(0, len(order), self.window):
            window = order[at : at + self.window]
            packed = first_fit_decreasing(self.lengths[window], self.packer.capacity)
            rows += [window[members].tolist() for members in packed]
        return [rows[number] for number in random.permutation(len(rows))]

    def locate(self, row: int) -> tuple[int, int]:
        while self.starts[-1] <= row:
            self.starts.append(self.starts[-1] + len(self.order(len(self.starts) - 1)))
        epoch = int(np.searchsorted(self.starts, row, side="right")) - 1
        return epoch, row - self.starts[epoch]

    def at(self, step: int) -> dict[str, Tensor]:
        return self.packer.collate(self.indices(step))
