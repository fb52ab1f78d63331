"""Image tokens by the row of text that they belong to.

Shapes: n pictures, N tokens of a picture, B rows of text, P the most pictures of a row, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Where each picture stands: in row `row` [n] it is number `place` [n], counted from 0; `shape` is (B, P)."""

    row: Tensor
    place: Tensor
    shape: tuple[int, int]

    def gather(self, pictures: Tensor) -> Tensor:
        """[B, P, ...] of [n, ...]: zeros, or false, where a row has fewer pictures than another."""
        rows = pictures.new_zeros(*self.shape, *pictures.shape[1:])
        return rows.index_put((self.row, self.place), pictures)

    def spread(self, rows: Tensor) -> Tensor:
        """[n, ...] of [B, P, ...], the inverse of `gather`."""
        return rows[self.row, self.place]


def rows_of(pictures: int, image_rows: Tensor | None, rows: int, device: torch.device) -> Rows:
    """Places from `image_rows` [n], ascending; None is one picture a row."""
    if image_rows is None:
        row = torch.arange(pictures, device=device)
        return Rows(row, torch.zeros_like(row), (max(rows, pictures), 1))
    first = torch.searchsorted(image_rows, image_rows, right=False)
    place = torch.arange(pictures, device=device) - first
    return Rows(image_rows, place, (rows, int(place.max()) + 1))
