"""The next token.

Shapes: B rows, T tokens, D width, V vocabulary.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LanguageModelConfig:
    """Next-token logits; `tied` reuses the token embedding as the output matrix."""

    tied: bool = True


class LanguageModel(nn.Module):
    """Logits over the vocabulary. The tied matrix belongs to the text model and is passed in, so it is saved once."""

    def __init__(self, config: LanguageModelConfig, text_width: int, vocab_size: int):
        super().__init__()
        self.output = None if config.tied else nn.Linear(text_width, vocab_size, bias=False)

    def forward(self, x_BTD: Tensor, token_embedding_VD: Tensor) -> Tensor:
        return F.linear(x_BTD, token_embedding_VD) if self.output is None else self.output(x_BTD)
