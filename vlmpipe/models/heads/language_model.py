"""The next token.

Shapes: B rows, T tokens, M selected tokens, V vocabulary.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from vlmpipe.models.heads.reading import Reading


@dataclass(frozen=True)
class LanguageModelConfig:
    """Next-token logits; `tied` reuses the token embedding as the output matrix."""

    tied: bool = True


class LanguageModel(nn.Module):
    """`logits` [B, T, V], or [M, V] of the selected words. The tied matrix is the text model's, so it is saved once."""

    def __init__(self, config: LanguageModelConfig, text_width: int, vocab_size: int):
        super().__init__()
        self.output = None if config.tied else nn.Linear(text_width, vocab_size, bias=False)

    def forward(self, reading: Reading) -> dict[str, Tensor]:
        return {"logits": self.logits(reading.words, reading.table)}

    def logits(self, x: Tensor, table_VD: Tensor) -> Tensor:
        """[..., V] of tokens [..., D]; `table_VD` is the text model's embedding."""
        return F.linear(x, table_VD) if self.output is None else self.output(x)
