"""Masks as COCO writes them: run lengths, compressed or not, and polygons; decoded to pixels when asked for.

Run lengths go down the columns and begin with a run of background. Compressed, they are differences to the run two
before, in groups of 5 bits from the lowest, a sixth bit for "more follows", shifted to printable characters.
Source: the COCO data format, https://cocodataset.org/#format-data, and its mask module, whose pixels these equal.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FIRST = 48  # the character of 0
MORE, SIGN, BITS = 0x20, 0x10, 5
GRID = 5  # an outline is walked on a grid this much finer than the pixels


@dataclass(frozen=True)
class Rle:
    """A mask of `height` x `width` pixels as compressed run lengths."""

    height: int
    width: int
    counts: bytes

    @classmethod
    def of_runs(cls, height: int, width: int, runs: Sequence[int] | np.ndarray) -> "Rle":
        """From plain run lengths.

        Raises:
            ValueError: a run is negative, or they don't sum to the number of pixels.
        """
        runs = np.asarray(runs, np.int64)
        check_runs(runs, height, width)
        return cls(height, width, compress(runs))

    @classmethod
    def of_pixels(cls, pixels: np.ndarray) -> "Rle":
        """From bool [H, W]."""
        height, width = pixels.shape
        flat = np.concatenate([[False], pixels.ravel(order="F").astype(bool)])
        edges = np.flatnonzero(flat[1:] != flat[:-1])
        return cls.of_runs(height, width, np.diff(np.concatenate([[0], edges, [height * width]])))

    @property
    def runs(self) -> np.ndarray:
        """Run lengths, int64 [R], background first.

        Raises:
            ValueError: the counts are damaged.
        """
        runs = decompress(self.counts)
        check_runs(runs, self.height, self.width)
        return runs

    def pixels(self) -> np.ndarray:
        """bool [H, W]."""
        runs = self.runs
        flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return flat.reshape(self.width, self.height).T

    def rle(self) -> "Rle":
        return self

    @property
    def area(self) -> int:
        return int(self.runs[1::2].sum())


@dataclass(frozen=True)
class Polygons:
    """The union of filled outlines, each x0, y0, x1, y1, ... in pixels, in a picture of `height` x `width`."""

    height: int
    width: int
    outlines: tuple[tuple[float, ...], ...]

    def pixels(self) -> np.ndarray:
        """bool [H, W]."""
        filled = np.zeros((self.height, self.width), bool)
        for outline in self.outlines:
            filled |= fill(np.reshape(outline, (-1, 2)), self.height, self.width)
        return filled

    def rle(self) -> Rle:
        return Rle.of_pixels(self.pixels())

    @property
    def area(self) -> int:
        return int(self.pixels().sum())


Mask = Rle | Polygons


def check_runs(runs: np.ndarray, height: int, width: int) -> None:
    """Raises ValueError where the runs can't be those of such a picture."""
    if runs.size and runs.min() < 0:
        raise ValueError(f"a run of {runs.min()} pixels")
    if runs.sum() != height * width:
        raise ValueError(f"runs of {runs.sum()} pixels in all, where {height} x {width} are {height * width}")


# --- the compressed form -----------------------------------------------------------------------------------

def compress(runs: np.ndarray) -> bytes:
    """Run lengths int64 [R] as printable characters."""
    steps = runs.copy()
    steps[3:] -= runs[1:-2]
    return bytes(itertools.chain.from_iterable(_characters(step) for step in steps.tolist()))


def _characters(step: int) -> list[int]:
    characters = []
    while True:
        low, step = step & (MORE - 1), step >> BITS
        done = step == (-1 if low & SIGN else 0)  # the rest is what the sign bit says
        characters.append(FIRST + (low if done else low | MORE))
        if done:
            return characters


def decompress(counts: bytes) -> np.ndarray:
    """Run lengths int64 [R].

    Raises:
        ValueError: a character that can't be there, or an end in the middle of a number.
    """
    codes = np.frombuffer(counts, np.uint8).astype(np.int64) - FIRST
    if codes.size == 0:
        return codes
    if codes.min() < 0 or codes.max() >= 2 * MORE:
        raise ValueError("characters that run lengths don't have")
    last = np.flatnonzero(codes & MORE == 0)
    if last.size == 0 or last[-1] != len(codes) - 1:
        raise ValueError("run lengths that break off")
    first = np.concatenate([[0], last[:-1] + 1])
    if (last - first).max() > 11:
        raise ValueError("a run length past 60 bits")
    place = np.arange(len(codes)) - np.repeat(first, last - first + 1)
    steps = np.add.reduceat((codes & (MORE - 1)) << (BITS * place), first)
    steps -= np.where(codes[last] & SIGN, np.int64(1) << (BITS * (last - first + 1)), 0)
    steps[1::2], steps[2::2] = np.cumsum(steps[1::2]), np.cumsum(steps[2::2])
    return steps


# --- filling -----------------------------------------------------------------------------------------------

def fill(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels inside an outline, bool [H, W]; points float [P, 2] as (x, y), closed from the last to the first.

    The outline is walked on the fine grid. Wherever it passes the middle of a column, the pixels below it in that
    column turn over; what is turned over an odd number of times is inside.
    """
    grid = np.trunc(GRID * points + 0.5).astype(np.int64)
    path = _walk(grid, np.roll(grid, -1, 0))
    before, after = path[:-1], path[1:]
    crossed = before[:, 0] != after[:, 0]
    before, after = before[crossed], after[crossed]
    column = (np.minimum(before[:, 0], after[:, 0]) + 0.5) / GRID - 0.5
    seen = (column == np.floor(column)) & (column >= 0) & (column <= width - 1)
    row = np.ceil(np.clip((np.minimum(before[:, 1], after[:, 1]) + 0.5) / GRID - 0.5, 0, height))
    turns = column[seen].astype(np.int64) * height + row[seen].astype(np.int64)
    inside = np.cumsum(np.bincount(turns, minlength=height * width + 1)) % 2 == 1
    return inside[: height * width].reshape(width, height).T


def _walk(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """The grid points along E edges one after the other, int64 [N, 2]; start and end int64 [E, 2].

    Each edge goes a step at a time along its longer axis, both ends included. Points are computed from the lower end of
    that axis, so that an edge has the same points in either direction.
    """
    steep = np.abs(end - start)[:, 1] > np.abs(end - start)[:, 0]
    start, end = (np.where(steep[:, None], ends[:, ::-1], ends) for ends in (start, end))  # as (longer, shorter)
    back = start[:, 0] > end[:, 0]
    low, high = (np.where(back[:, None], *ends) for ends in ((end, start), (start, end)))
    length = high[:, 0] - low[:, 0]
    slope = (high[:, 1] - low[:, 1]) / np.maximum(length, 1)
    edge = np.repeat(np.arange(len(length)), length + 1)
    step = np.arange(len(edge)) - np.repeat(np.cumsum(length + 1) - length - 1, length + 1)
    step = np.where(back[edge], length[edge] - step, step)
    points = np.stack([low[edge, 0] + step, np.trunc(low[edge, 1] + slope[edge] * step + 0.5).astype(np.int64)], 1)
    return np.where(steep[edge, None], points[:, ::-1], points)
