"""Pictures of several sizes in one batch: filled up with zeros to the largest, as ViLT's are.

Shapes: n pictures, C colours, Y and X pixels of the largest.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vlmpipe.errors import UserError


def fill_up(pictures: Sequence[np.ndarray], patch_size: int) -> dict[str, Tensor]:
    """`images` [n, C, Y, X], and where sizes differ `grids` [n, 3], the patches of each (see `VisionEncoder`).

    Args:
        pictures: each [C, y, x], of whole patches.

    Raises:
        UserError: a picture whose sides are no multiples of the patch size.
    """
    sizes = [picture.shape[1:] for picture in pictures]
    if len(set(sizes)) == 1:
        return {"images": torch.from_numpy(np.stack(pictures))}
    wrong = [size for size in sizes if size[0] % patch_size or size[1] % patch_size]
    if wrong:
        raise UserError(f"found a picture of {wrong[0][1]} x {wrong[0][0]} pixels; expected multiples of {patch_size}")
    largest = np.max(sizes, axis=0)
    filled = np.zeros((len(pictures), pictures[0].shape[0], *largest), pictures[0].dtype)
    for whole, picture in zip(filled, pictures, strict=True):
        whole[:, : picture.shape[1], : picture.shape[2]] = picture
    grids = [(1, down // patch_size, across // patch_size) for down, across in sizes]
    return {"images": torch.from_numpy(filled), "grids": torch.tensor(grids)}
