"""Where tokens stand: positions in time, down and across for rows with pictures in them (Qwen2-VL, arXiv 2409.12191).

Shapes: B rows, T tokens of a row, M tokens of a picture. A grid is (times, patches down, patches across); merge x merge
patches are one token.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.text import PADDING, SHARED

Grid = tuple[int, int, int]


def token_count(grid: Grid, merge: int) -> int:
    return grid[0] * (grid[1] // merge) * (grid[2] // merge)


def picture_positions(grid: Grid, merge: int, interval: float = 1.0) -> Tensor:
    """[M, 3] int64 from 0: time, row and column of each token; times are `interval` apart, rounded down."""
    times = (torch.arange(grid[0]) * interval).long()
    axes = torch.meshgrid(times, torch.arange(grid[1] // merge), torch.arange(grid[2] // merge), indexing="ij")
    return torch.stack(axes, dim=-1).flatten(0, 2)


def row_positions(
    segments_BT: Tensor, places_BT: Tensor, grids: Sequence[Grid], merge: int, intervals: Sequence[float] | None = None
) -> Tensor:
    """[B, T, 3] int64: words step by one in all three numbers, a picture's tokens say where in it they stand, and what
    follows starts one after the largest number before it (arXiv 2409.12191, section 2.1).

    `transformers` 5.23 differs for long videos: there, words start after the larger side of the last picture, however
    long it lasts.

    Args:
        segments_BT: as in `text.visible`; each text of a row starts where the shared prefix ends, padding stands at 0.
        places_BT: bool, the tokens of pictures, whole and in order.
        grids: one for each picture.
        intervals: steps in time between the frames of each picture; None: 1.
    """
    positions = torch.zeros(*segments_BT.shape, 3, dtype=torch.int64)
    steps = [1.0] * len(grids) if intervals is None else intervals
    pictures = iter(zip(grids, steps, strict=True))
    for row, (segments, places) in enumerate(zip(segments_BT.tolist(), places_BT.tolist(), strict=True)):
        starts = {SHARED: 0}
        at = 0
        while at < len(segments):
            start = starts.get(segments[at], starts[SHARED])
            found = next_picture(pictures, merge) if places[at] else torch.zeros(1, 3, dtype=torch.int64)
            if places[at] and places[at : at + len(found)] != [True] * len(found):
                raise UserError(f"row {row}: found a picture of {len(found)} tokens cut at {at}; expected it whole")
            if segments[at] != PADDING:
                positions[row, at : at + len(found)] = found + start
                starts[segments[at]] = start + int(found.max()) + 1
            at += len(found)
    if next(pictures, None) is not None:
        raise UserError(f"found more than {len(grids) - 1} grids; expected one for each picture in the rows")
    return positions.to(segments_BT.device)


def next_picture(pictures: Iterator[tuple[Grid, float]], merge: int) -> Tensor:
    found = next(pictures, None)
    if found is None:
        raise UserError("found fewer grids than pictures in the rows; expected one for each")
    return picture_positions(found[0], merge, found[1])
