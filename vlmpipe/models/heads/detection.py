"""Boxes around what is asked for (OWL-ViT, arXiv 2205.06230): every patch says where its thing is and what it is.

Shapes: n pictures, N patches, D width of the picture tower, E width of the shared space, Q the most queries of one
picture.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpipe.models.heads.grounding import Grounding, by_picture
from vlmpipe.models.vision import VisionConfig

# What a fresh model says to every query. From one half, the many patches with nothing in them would drown the loss
# (arXiv 1708.02002, section 4.1).
PRIOR = 0.01
EDGE = 1e-4  # keeps the logarithm of a place at the very border finite


@dataclass(frozen=True)
class DetectionConfig:
    """`location_bias`: an untrained box stands where its patch does, of its size."""

    location_bias: bool = True


class Detection(nn.Module):
    """Boxes and classes of every patch. The tower's tokens are weighed with the whole picture first."""

    def __init__(self, config: DetectionConfig, vision: VisionConfig, condition_width: int):
        super().__init__()
        self.config = config
        width = vision.width
        self.norm = nn.LayerNorm(width, eps=vision.transformer.norm_eps)
        self.box = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 4)
        )
        self.query = nn.Linear(width, condition_width)
        self.shift, self.scale = nn.Linear(width, 1, bias=False), nn.Linear(width, 1)
        self.shift_bias = nn.Parameter(torch.full((1,), -math.log(1 / PRIOR - 1)))

    def forward(
        self, seen: Grounding, patches: Callable[[Tensor], Tensor], pool: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """`patches` and `pool` are the picture tower's.

        Returns:
            boxes [n, N, 4]: centre x and y, width and height, in shares of the picture.
            classes [n, N, Q]: a logit for each query; the lowest finite number where a picture has fewer than Q.
        """
        x_nND = self.norm(patches(seen.tokens) * pool(seen.tokens)[:, None])
        queries_nQE, asked_nQ = by_picture(seen.condition, seen.pictures, len(x_nND))
        return self.boxes(x_nND, seen.grid), self.classes(x_nND, queries_nQE, asked_nQ)

    def boxes(self, x_nND: Tensor, grid: tuple[int, int]) -> Tensor:
        logits = self.box(x_nND)
        return (logits + location_bias(grid, logits) if self.config.location_bias else logits).sigmoid()

    def classes(self, x_nND: Tensor, queries_nQE: Tensor, asked_nQ: Tensor) -> Tensor:
        """Cosines with the queries, with a shift and a scale that each patch has learned for itself."""
        cosines_nNQ = unit(self.query(x_nND)) @ unit(queries_nQE).transpose(1, 2)
        logits = (cosines_nNQ + self.shift(x_nND) + self.shift_bias) * (F.elu(self.scale(x_nND)) + 1)
        return logits.masked_fill(~asked_nQ[:, None], torch.finfo(logits.dtype).min)


def unit(x: Tensor) -> Tensor:
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-6)


def location_bias(grid: tuple[int, int], like: Tensor) -> Tensor:
    """[N, 4] logits of a box of one patch, whose centre is the patch's far corner, as the released models have it."""
    rows, columns = grid
    y, x = torch.meshgrid(
        torch.arange(1, rows + 1, device=like.device, dtype=torch.float32) / rows,
        torch.arange(1, columns + 1, device=like.device, dtype=torch.float32) / columns,
        indexing="ij",
    )
    shares = torch.stack([x, y, torch.full_like(x, 1 / columns), torch.full_like(y, 1 / rows)], dim=-1).flatten(0, 1)
    return (torch.log(shares + EDGE) - torch.log1p(EDGE - shares)).to(like.dtype)
