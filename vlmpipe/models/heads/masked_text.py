"""Which words were hidden.

Shapes: B rows, T words, M scored words, D width, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.heads.reading import Reading, Transform


@dataclass(frozen=True)
class MaskedTextConfig:
    """BERT's head. `tied` reuses the token embedding as the output matrix; `alone`: a text without a picture has a head
    of its own (FLAVA).

    `mask_token` stands where a word is hidden; tokens under `first_word` are special: never hidden, never put in.
    The defaults are those of a tokenizer that is trained with the model.
    """

    tied: bool = True
    alone: bool = False
    mask_token: int = 4
    first_word: int = 5

    def __post_init__(self):
        if not 0 <= self.mask_token < self.first_word:
            raise UserError(
                f"mask_token: found {self.mask_token} with first_word {self.first_word}; expected a special token"
            )


class WordPredictor(nn.Module):
    """Transform, output matrix, bias."""

    def __init__(self, config, width: int):
        super().__init__()
        text, tied = config.text, config.heads.masked_text.tied
        if tied and width != text.transformer.width:
            raise UserError(
                f"heads.masked_text.tied: found true with tokens of width {width} and an embedding of width "
                f"{text.transformer.width}; expected tied: false"
            )
        self.transform = Transform(width, text.transformer)
        self.output = None if tied else nn.Linear(width, text.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(text.vocab_size))

    def forward(self, x: Tensor, table_VD: Tensor) -> Tensor:
        return F.linear(self.transform(x), table_VD if self.output is None else self.output.weight, self.bias)


class MaskedText(nn.Module):
    """`text_logits` [B, T, V], or [M, V] of the selected words."""

    def __init__(self, config, widths):
        super().__init__()
        self.config = config.heads.masked_text
        self.met = WordPredictor(config, widths.text)
        self.alone = WordPredictor(config, config.text.transformer.width) if self.config.alone else None

    def forward(self, reading: Reading) -> dict[str, Tensor]:
        if reading.fused.text is None:
            return {}
        predictor = self.met if self.alone is None or reading.fused.met else self.alone
        return {"text_logits": predictor(reading.words, reading.table)}
