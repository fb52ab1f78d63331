"""Where image meets text. Each fusion is a config and a module, found in FUSIONS by its `kind`.

Shapes: B batch, N image tokens, P prefix tokens, D widths of the two sides.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from vlmpipe.errors import UserError


@dataclass(frozen=True)
class FusionConfig:
    """`none` keeps the encoders apart (CLIP). `prefix` puts projected image tokens before the text (LLaVA).

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


def linear_projector(vision_width: int, text_width: int) -> nn.Module:
    return nn.Linear(vision_width, text_width)


def mlp_projector(vision_width: int, text_width: int) -> nn.Module:
    """LLaVA 1.5's two layers."""
    return nn.Sequential(nn.Linear(vision_width, text_width), nn.GELU(), nn.Linear(text_width, text_width))


PROJECTORS = {"linear": linear_projector, "mlp": mlp_projector}


class Apart(nn.Module):
    """No fusion: text never sees image tokens."""

    def __init__(self, config: FusionConfig, side: int, vision_width: int, text_width: int):
        super().__init__()


class Prefix(nn.Module):
    """Image tokens [B, N, D] to text embeddings [B, P, D]."""

    def __init__(self, config: FusionConfig, side: int, vision_width: int, text_width: int):
        super().__init__()
        if side % config.merge:
            raise UserError(f"merge: found {config.merge}; expected a divisor of the {side} patches of a side")
        self.merge = config.merge
        self.side = side // config.merge
        self.length = self.side**2
        self.projector = PROJECTORS[config.projector](vision_width * config.merge**2, text_width)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        if self.merge > 1:
            grid = tokens_BND.unflatten(1, (self.side, self.merge, self.side, self.merge))
            tokens_BND = grid.transpose(2, 3).flatten(3).flatten(1, 2)
        return self.projector(tokens_BND)


FUSIONS = {"none": Apart, "prefix": Prefix}
