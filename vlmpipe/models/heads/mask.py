"""What a phrase means in a picture, pixel by pixel (CLIPSeg, arXiv 2112.10003).

Shapes: n pictures, B phrases, N image tokens, D width of the picture tower, F width of the decoder, E width of the
shared space, y and x pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.heads.grounding import Grounding
from vlmpipe.models.layers import Transformer, TransformerConfig
from vlmpipe.models.vision import VisionConfig


@dataclass(frozen=True)
class MaskConfig:
    """A decoder of one block for each of `taps`, the picture tower's blocks that it reads, counted from 0.

    It begins at the last one, and adds the next earlier one before each further block. `film`: the decoder's block
    before which the phrase comes in. `upsample`: one transposed convolution from a token to its pixels, or three
    layers ("refined").
    """

    taps: tuple[int, ...] = (3, 6, 9)
    width: int = 64
    heads: int = 4
    hidden: int = 2048
    film: int = 0
    upsample: Literal["simple", "refined"] = "refined"

    def __post_init__(self):
        if not self.taps or list(self.taps) != sorted(set(self.taps)) or self.taps[0] < 0:
            raise UserError(f"taps: found {list(self.taps)}; expected numbers of blocks from 0 on, ascending")
        if not 0 <= self.film < len(self.taps):
            raise UserError(f"film: found {self.film}; expected 0 to {len(self.taps) - 1}, one of the decoder's blocks")
        if self.width % 2 or self.hidden < 1:
            raise UserError(f"width, hidden: found {self.width}, {self.hidden}; expected an even width, hidden over 0")

    def transformer(self, norm_eps: float = 1e-5) -> TransformerConfig:
        """The decoder's blocks."""
        return TransformerConfig(
            self.width, len(self.taps), self.heads, hidden=self.hidden, norm_place="post", norm_eps=norm_eps,
            activation="relu",
        )


class FiLM(nn.Module):
    """Every channel times and plus what the condition says (arXiv 1709.07871)."""

    def __init__(self, condition_width: int, width: int):
        super().__init__()
        self.scale, self.shift = nn.Linear(condition_width, width), nn.Linear(condition_width, width)

    def forward(self, x_BNF: Tensor, condition_BE: Tensor) -> Tensor:
        return self.scale(condition_BE)[:, None] * x_BNF + self.shift(condition_BE)[:, None]


def simple_upsample(width: int, patch: int) -> nn.Module:
    return nn.ConvTranspose2d(width, 1, patch, stride=patch)


def refined_upsample(width: int, patch: int) -> nn.Module:
    """In two steps, the second fourfold."""
    if patch % 4:
        raise UserError(f"upsample: found 'refined' with patches of {patch} pixels; expected a multiple of 4")
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(width, width // 2, patch // 4, stride=patch // 4),
        nn.ReLU(),
        nn.ConvTranspose2d(width // 2, 1, 4, stride=4),
    )


UPSAMPLES = {"simple": simple_upsample, "refined": refined_upsample}


class Mask(nn.Module):
    """[B, y, x] logits, one for each pixel of the picture that each phrase is about."""

    def __init__(self, config: MaskConfig, vision: VisionConfig, condition_width: int):
        super().__init__()
        if config.taps[-1] >= vision.transformer.depth:
            raise UserError(
                f"taps: found {list(config.taps)} with {vision.transformer.depth} blocks in the picture tower; "
                f"expected numbers under that"
            )
        self.config = config
        self.reduce = nn.ModuleList(nn.Linear(vision.width, config.width) for _ in config.taps)
        self.film = FiLM(condition_width, config.width)
        self.transformer = Transformer(config.transformer(vision.transformer.norm_eps))
        self.upsample = UPSAMPLES[config.upsample](config.width, vision.patch_size)

    def forward(self, seen: Grounding, patches: Callable[[Tensor], Tensor]) -> Tensor:
        """`patches` takes the tokens that stand for a place, as the picture tower's method of this name does."""
        x_BNF = 0.0
        steps = zip(reversed(self.config.taps), self.reduce, self.transformer.blocks)
        for step, (tap, reduce, block) in enumerate(steps):
            x_BNF = reduce(seen.taps[tap])[seen.pictures] + x_BNF  # a picture is reduced once for all its phrases
            if step == self.config.film:
                x_BNF = self.film(x_BNF, seen.condition)
            x_BNF = block(x_BNF)
        grid_BFyx = patches(x_BNF).transpose(1, 2).unflatten(2, seen.grid)
        return self.upsample(grid_BFyx)[:, 0]
