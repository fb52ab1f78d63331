"""A space that pictures and texts share.

Shapes: B rows, D widths of the encoders, E width of the shared space.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpipe.errors import UserError

Side = Literal["linear", "affine", "none"]


@dataclass(frozen=True)
class ProjectionConfig:
    """Both towers into one space of `width`, unit norm; `temperature` is where training starts.

    `image` and `text`: a matrix, a matrix and a bias, or what the tower pooled as it is. `bias`: where the bias of the
    logits starts, which the sigmoid objective learns (SigLIP, arXiv 2303.15343); null: there is none. `max_scale`: what
    the learned scale is held under, lest training diverge (arXiv 2103.00020, section 2.5); null: nothing.
    """

    width: int = 512
    temperature: float = 0.07
    image: Side = "linear"
    text: Side = "linear"
    bias: float | None = None
    max_scale: float | None = 100.0

    def __post_init__(self):
        if self.temperature <= 0 or (self.max_scale is not None and self.max_scale <= 0):
            raise UserError(
                f"projection: found temperature {self.temperature}, max_scale {self.max_scale}; expected both above 0"
            )


def side(kind: Side, name: str, width: int, shared: int) -> nn.Module:
    """From a tower's width to the shared one."""
    if kind == "none":
        if width != shared:
            raise UserError(f"projection.{name}: found 'none' from width {width} to {shared}; expected equal widths")
        return nn.Identity()
    return nn.Linear(width, shared, bias=kind == "affine")


class Projection(nn.Module):
    """CLIP's two projections and its learned scale, and SigLIP's bias."""

    def __init__(self, config: ProjectionConfig, vision_width: int, text_width: int):
        super().__init__()
        self.image = side(config.image, "image", vision_width, config.width)
        self.text = side(config.text, "text", text_width, config.width)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))
        self.logit_bias = None if config.bias is None else nn.Parameter(torch.tensor(config.bias))
        self.max_logit_scale = math.inf if config.max_scale is None else math.log(config.max_scale)

    def embed_image(self, pooled_BD: Tensor) -> Tensor:
        return F.normalize(self.image(pooled_BD), dim=-1)

    def embed_text(self, pooled_BD: Tensor) -> Tensor:
        return F.normalize(self.text(pooled_BD), dim=-1)

    def scale(self) -> Tensor:
        return self.logit_scale.clamp(max=self.max_logit_scale).exp()
