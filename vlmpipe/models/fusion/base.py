"""What every fusion gets and gives.

Shapes: B rows of text, n pictures (several may belong to one row), N tokens of a picture, T text tokens, D widths.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.layers import Cache


@dataclass(frozen=True)
class FusionConfig:
    """Where image meets text.

    `none` keeps the encoders apart (CLIP). `prefix` puts projected image tokens among the words (LLaVA).

    `merge` folds merge x merge neighbouring image tokens into one wider one before the projector, which makes the
    prefix merge² times shorter; `attention: full` lets the prefix tokens see each other in both directions.
    """

    kind: Literal["none", "prefix"] = "none"
    projector: Literal["linear", "mlp"] = "mlp"
    merge: int = 1
    attention: Literal["causal", "full"] = "causal"

    def __post_init__(self):
        if self.merge < 1:
            raise UserError(f"merge: found {self.merge}; expected at least 1")


@dataclass(frozen=True)
class Inputs:
    """What `VisionLanguageModel.forward` was given; see there."""

    images: Tensor | None = None
    tokens: Tensor | None = None
    segments: Tensor | None = None
    positions: Tensor | None = None
    types: Tensor | None = None
    image_places: Tensor | None = None
    image_rows: Tensor | None = None
    frames: Tensor | None = None
    grids: Tensor | None = None
    patch_mask: Tensor | None = None
    cache: Cache | None = None
    weights: list | None = None
    looks: list | None = None


@dataclass(frozen=True)
class Fused:
    """What heads read; None where the fusion has no such thing or got no such input."""

    text: Tensor | None = None  # [B, T, D], a token each
    image: Tensor | None = None  # [n, N, D], a token for each patch, after the fusion
    pooled: Tensor | None = None  # [B, D], picture and text together
