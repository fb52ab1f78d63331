"""What heads that point at places in a picture read: image tokens, and an embedding of what to look for.

Shapes: n pictures, B things to look for, N image tokens (class token included), D widths, E width of the shared space,
Q the most things that are looked for in one picture.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmpipe.errors import UserError


@dataclass(frozen=True)
class Grounding:
    """One pass of the picture tower, and what is looked for in its pictures.

    Attributes:
        tokens: [n, N, D], the tower's output.
        taps: the output of each of its blocks, [n, N, D].
        grid: rows and columns of patches.
        condition: [B, E] embeddings as the projection gives them, of any length; from a text or a picture.
        pictures: [B] ascending, the picture in which each thing is looked for.
    """

    tokens: Tensor
    taps: list[Tensor]
    grid: tuple[int, int]
    condition: Tensor
    pictures: Tensor


def pictures_of_rows(image_rows: Tensor | None, pictures: int, condition: Tensor) -> Tensor:
    """[B] the picture that each row is about: the last one that stands in this row or before it.

    So the rows from one picture's row up to the next picture's are all about that picture.

    Args:
        image_rows: [n] ascending, the row of each picture; None: one picture a row.

    Raises:
        UserError: without `image_rows`, rows and pictures are not equally many.
    """
    rows = torch.arange(len(condition), device=condition.device)
    if image_rows is not None:
        return torch.searchsorted(image_rows, rows, right=True) - 1
    if len(condition) != pictures:
        raise UserError(
            f"found {len(condition)} texts for {pictures} pictures; expected one a picture, or image_rows, which say "
            f"at which text each picture begins"
        )
    return rows


def by_picture(condition_BE: Tensor, pictures_B: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[n, Q, E] what is looked for in each of `count` pictures, filled up with zeros, and [n, Q] true where it isn't
    filling."""
    per_picture = torch.bincount(pictures_B, minlength=count)
    first = per_picture.cumsum(0) - per_picture
    places_B = torch.arange(len(pictures_B), device=pictures_B.device) - first[pictures_B]
    grouped = condition_BE.new_zeros(count, int(per_picture.max()), condition_BE.shape[1])
    grouped = grouped.index_put((pictures_B, places_B), condition_BE)
    asked = torch.arange(grouped.shape[1], device=pictures_B.device) < per_picture[:, None]
    return grouped, asked
