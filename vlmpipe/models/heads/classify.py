"""One of several classes for picture and text: whether they match, which answer, whether a statement holds.

Shapes: B rows, k pictures of a row, D width of what is pooled, A classes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.fusion.base import Pooler
from vlmpipe.models.heads.reading import Reading


@dataclass(frozen=True)
class MatchingConfig:
    """Two classes: 0 no pair, 1 a pair. `pooler`: one of its own for the first token (FLAVA), not the fusion's."""

    pooler: bool = False


class Matching(nn.Module):
    """`matching` [B, 2]."""

    def __init__(self, config, widths):
        super().__init__()
        self.pooler = Pooler(widths.pooled) if config.heads.matching.pooler else None
        self.output = nn.Linear(widths.pooled, 2)

    def forward(self, reading: Reading) -> dict[str, Tensor]:
        if not reading.fused.met:
            return {}
        pooled = reading.fused.pooled if self.pooler is None else self.pooler(reading.fused.first)
        return {"matching": self.output(pooled)}


@dataclass(frozen=True)
class ClassifierConfig:
    """`classes` answers. `hidden`: width of a normed layer before the output (ViLT); 0: the output alone (VisualBERT).

    `reads`: the pooled token, or the word before a text's last, where VisualBERT puts a mask. `pictures`: so many
    passes, one a picture with the same text, are read together (NLVR2).
    """

    classes: int = 2
    hidden: int = 0
    reads: Literal["pooled", "before_end"] = "pooled"
    pictures: int = 1

    def __post_init__(self):
        if self.classes < 1 or self.pictures < 1 or self.hidden < 0:
            raise UserError(
                f"found classes {self.classes}, pictures {self.pictures}, hidden {self.hidden}; expected at least 1, 1 "
                f"and 0"
            )


class Classifier(nn.Module):
    """[B, A] logits under the name of the head; with several pictures, passes i * k ... i * k + k - 1 are row i."""

    def __init__(self, name: str, config, widths):
        super().__init__()
        self.name, self.config = name, getattr(config.heads, name)
        own = self.config
        width = own.pictures * (widths.pooled if own.reads == "pooled" else widths.text)
        layers = [nn.Linear(width, own.hidden), nn.LayerNorm(own.hidden), nn.GELU()] if own.hidden else []
        self.output = nn.Sequential(*layers, nn.Linear(own.hidden or width, own.classes))

    def forward(self, reading: Reading) -> dict[str, Tensor]:
        x_BD = reading.fused.pooled if self.config.reads == "pooled" else before_end(reading)
        if len(x_BD) % self.config.pictures:
            raise UserError(
                f"found {len(x_BD)} passes for the head '{self.name}'; expected {self.config.pictures} a row"
            )
        return {self.name: self.output(x_BD.unflatten(0, (-1, self.config.pictures)).flatten(1))}


def before_end(reading: Reading) -> Tensor:
    """[B, D] of the word before each text's last."""
    place_B = (reading.segments != 0).sum(dim=1) - 2
    return reading.fused.text[torch.arange(len(place_B), device=place_B.device), place_B]
