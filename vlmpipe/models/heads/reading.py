"""What heads over a fusion read, and what several of them share.

Shapes: B rows, T words, M selected words, D width, V vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from vlmpipe.models.fusion.base import Fused
from vlmpipe.models.layers import ACTIVATIONS, TransformerConfig, taken


@dataclass(frozen=True)
class Reading:
    """One pass of the model as its heads see it.

    Attributes:
        fused: what the fusion gave.
        segments: [B, T] of the words, 0 for padding; None without words.
        select: [B, T] bool, the words that are scored; None: all.
        only: [B] the one word of each row that is scored; None: all.
        table: [V, D] the token embedding, for heads that share it.
    """

    fused: Fused
    segments: Tensor | None
    select: Tensor | None
    only: Tensor | None
    table: Tensor

    @property
    def words(self) -> Tensor:
        """[B, T, D], [B, 1, D] or [M, D] of the words that are scored."""
        text = self.fused.text
        text = taken(text, None if text.shape[1] == 1 else self.only)
        return text if self.select is None else text[self.select]


class Transform(nn.Module):
    """BERT's layer before its output matrix: as wide, activated, normed (arXiv 1810.04805)."""

    def __init__(self, width: int, like: TransformerConfig):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.activation = ACTIVATIONS[like.activation]()
        self.norm = nn.LayerNorm(width, eps=like.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.activation(self.dense(x)))
