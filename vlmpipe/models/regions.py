"""Pictures as features of regions, which a detector gave: ViLBERT, VisualBERT.

Shapes: n pictures, N regions of a picture, D numbers of a region.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vlmpipe.models.pixels import PixelEncoder


class Regions(PixelEncoder):
    """Stands where an encoder does, without weights: tokens are the features as they are. Where a region lies may be
    among its numbers: a linear layer over both is the sum of two (ViLBERT, arXiv 1908.02265, section 2.2)."""

    def __init__(self, config):
        super().__init__(config.mean, config.std)
        self.config = config

    def forward(
        self,
        images_nND: Tensor,
        weights: list | None = None,
        taps: list | None = None,
        grids: Tensor | None = None,
        frames: Tensor | None = None,
        embedded: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """[n, N, D]; `grids` [n, 3]: regions in its last column, for pictures that are filled up with zeros."""
        return images_nND if embedded is None else embedded(images_nND)

    def hide(self, x_nND: Tensor, hidden_nN: Tensor) -> Tensor:
        """Zeros where a region is hidden (section 3.2)."""
        return x_nND.masked_fill(hidden_nN[..., None], 0.0)

    def real(self, grids: Tensor, size: tuple[int, int]) -> Tensor:
        """[n, N] bool, for pictures of `size` (N, D)."""
        return torch.arange(size[0], device=grids.device) < grids[:, 2:]

    def patches(self, tokens_nND: Tensor) -> Tensor:
        return tokens_nND

    def pool(self, tokens_nND: Tensor) -> Tensor:
        """[n, D]"""
        return tokens_nND.mean(dim=1)
