"""What heads over a fusion read, and what several of them share.

Shapes: B rows, T words, D width, V vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from vlmpipe.models.fusion.base import Fused
from vlmpipe.models.layers import ACTIVATIONS, TransformerConfig


@dataclass(frozen=True)
class Reading:
    """One pass of the model as its heads see it.

    Attributes:
        fused: what the fusion gave.
        segments: [B, T] of the words, 0 for padding; None without words.
        select: [B, T] bool, the words that are scored; None: all.
        table: [V, D] the token embedding, for heads that share it.
    """

    fused: Fused
    segments: Tensor | None
    select: Tensor | None
    table: Tensor


class Transform(nn.Module):
    """BERT's layer before its output matrix: as wide, activated, normed (arXiv 1810.04805)."""

    def __init__(self, width: int, like: TransformerConfig):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.activation = ACTIVATIONS[like.activation]()
        self.norm = nn.LayerNorm(width, eps=like.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(x)))
