"""The next piece of a picture that is being written.

Shapes: B rows, N codes of a picture, K codes to choose from.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from vlmpipe.models.heads.reading import Reading


@dataclass(frozen=True)
class ImageTokensConfig:
    """Logits of the codes of `VLMConfig.codes`, from a matrix of their own, as Parti's (arXiv 2206.10789)."""

    bias: bool = False


class ImageTokens(nn.Module):
    """`image_logits` [B, N, K]."""

    def __init__(self, config: ImageTokensConfig, width: int, codes: int):
        super().__init__()
        self.output = nn.Linear(width, codes, bias=config.bias)

    def forward(self, reading: Reading) -> dict[str, Tensor]:
        return {"image_logits": self.output(reading.fused.text)}
