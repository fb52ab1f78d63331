"""A space that pictures and texts share.

Shapes: B rows, D widths of the encoders, E width of the shared space.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# CLIP keeps the scale at 100 at most, lest training diverge (arXiv 2103.00020, section 2.5).
MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True)
class ProjectionConfig:
    """Both towers into one space of `width`, unit norm; `temperature` is where training starts."""

    width: int = 512
    temperature: float = 0.07


class Projection(nn.Module):
    """CLIP's two projections and its learned scale."""

    def __init__(self, config: ProjectionConfig, vision_width: int, text_width: int):
        super().__init__()
        self.image = nn.Linear(vision_width, config.width, bias=False)
        self.text = nn.Linear(text_width, config.width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))

    def embed_image(self, pooled_BD: Tensor) -> Tensor:
        return F.normalize(self.image(pooled_BD), dim=-1)

    def embed_text(self, pooled_BD: Tensor) -> Tensor:
        return F.normalize(self.text(pooled_BD), dim=-1)

    def scale(self) -> Tensor:
        return self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
