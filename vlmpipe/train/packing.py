"""Several samples in one row, so that little of a batch is padding; each sees itself alone.

Shapes: B rows of this process, n pictures, M tokens that a picture takes in its row, T tokens of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.places import Grid, picture_positions
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
    """Makes rows of `capacity` tokens out of the samples of `dataset`, whose pictures' tokens stand at `places`."""

    dataset: Dataset
    capacity: int
    places: Places

    def lengths(self) -> np.ndarray:
        """Tokens of each sample: its pictures and its texts.

        Raises:
            UserError: one is longer than a row.
        """
        seen = [sum(len(self.places(picture)) for picture in self.dataset.numbers(n)) for n in range(len(self.dataset))]
        found = np.array(seen) + [sum(len(text.ids) for text in texts) for _, texts in self.dataset.rows]
        longest = int(found.argmax())
        if found[longest] > self.capacity:
            raise UserError(
                f"pack: found a sample of {found[longest]} tokens, {seen[longest]} of them of pictures, in rows of "
                f"{self.capacity}; expected rows that hold any sample; raise pack, or lower per_row"
            )
        return found

    def collate(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """The pictures' inputs, `image_rows` [n], and [B, T] tokens, segments, positions, labels, image_places.

        The pictures of the g-th sample of a row stand before its texts, in segment -g; the texts have the segments
        that see them (see `vlmpipe.models.text`). Positions start anew with each sample; [B, T, 3] where places are.
        """
        shape = len(rows), self.capacity
        found = {name: np.zeros(shape, np.int64) for name in ("tokens", "segments")}
        found["positions"] = np.zeros(shape + self.places(0).shape[1:], np.int64)
        found["labels"] = np.full(shape, -100, np.int64)
        found["image_places"] = np.zeros(shape, bool)
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
        start, end = 0, at
        for picture in self.dataset.numbers(number):
            places = self.places(picture)
            at, end = end, end + len(places)
            row["image_places"][at:end] = True
            row["segments"][at:end] = -1 - group
            row["positions"][at:end] = start + places
            start += int(places.max()) + 1
        for place, text in enumerate(self.dataset.rows[number][1], start=1):
            at, end = end, end + len(text.ids)
            row["tokens"][at:end] = text.ids
            row["segments"][at:end] = group * TEXTS + place
            steps = np.arange(start, start + len(text.ids))
            row["positions"][at:end] = steps.reshape(-1, *[1] * (row["positions"].ndim - 1))
            first = max(text.start, 1)
            row["labels"][at + first - 1 : end - 1] = text.ids[first:]
        return end


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
