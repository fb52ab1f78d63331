"""Residual networks (arXiv 1512.03385): pictures in, one token for each place of the last feature map out.

Shapes: n pictures, C channels, Y and X pixels or places, N tokens, D width.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.collective import BatchNorm
from vlmpipe.models.pixels import PixelEncoder

REDUCTION = 4  # a bottleneck is a quarter as wide inside as outside


@dataclass(frozen=True)
class ResNetConfig:
    """A residual network. Every stage but the first halves the sides.

    `stem`: `single` is a 7 x 7 convolution and a maximum pool, `triple` the three 3 x 3 convolutions and average pool
    of CLIP (arXiv 2103.00020, section 2.4). `shrink`: where a stage halves: `middle`, in the 3 x 3 convolution of its
    first block (version 1.5); `first`, in the 1 x 1 before it (the paper); `average`, by average pools, which alias
    less (CLIP). `pool_heads`: heads of CLIP's attention pool, 0 for none.
    """

    widths: tuple[int, ...] = (256, 512, 1024, 2048)  # channels after each stage
    depths: tuple[int, ...] = (3, 4, 6, 3)  # blocks of each stage
    block: Literal["basic", "bottleneck"] = "bottleneck"
    stem: Literal["single", "triple"] = "single"
    stem_width: int = 64
    shrink: Literal["middle", "first", "average"] = "middle"
    shrink_first_stage: bool = False
    pool_heads: int = 0

    def __post_init__(self):
        if len(self.widths) != len(self.depths) or not self.widths:
            raise UserError(f"depths: found {len(self.depths)} for {len(self.widths)} widths; expected one a stage")
        if min(*self.widths, *self.depths, self.stem_width) < 1:
            raise UserError("widths, depths, stem_width: found a number under 1; expected at least 1")
        if self.block == "bottleneck" and any(width % REDUCTION for width in self.widths):
            raise UserError(f"widths: found {list(self.widths)}; a bottleneck expects multiples of {REDUCTION}")
        if self.block == "basic" and self.shrink != "middle":
            raise UserError(f"shrink: found {self.shrink!r} with basic blocks; expected 'middle'")
        if self.pool_heads and self.widths[-1] % self.pool_heads:
            raise UserError(f"pool_heads: found {self.pool_heads}; expected a divisor of {self.widths[-1]}")

    @property
    def stride(self) -> int:
        """Pixels of the picture along a side of one token."""
        return 4 * 2 ** (len(self.widths) - 1 + self.shrink_first_stage)


def norm_after(channels_in: int, channels: int, size: int, stride: int = 1) -> list[nn.Module]:
    """A convolution that keeps the sides but for its stride, and batch norm."""
    return [nn.Conv2d(channels_in, channels, size, stride, padding=size // 2, bias=False), BatchNorm(channels)]


def single_stem(width: int) -> nn.Sequential:
    return nn.Sequential(*norm_after(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1))


def triple_stem(width: int) -> nn.Sequential:
    sizes = ((3, width // 2, 2), (width // 2, width // 2, 1), (width // 2, width, 1))
    layers = [[*norm_after(channels_in, channels, 3, stride), nn.ReLU()] for channels_in, channels, stride in sizes]
    return nn.Sequential(*itertools.chain(*layers), nn.AvgPool2d(2))


STEMS = {"single": single_stem, "triple": triple_stem}


class Residual(nn.Module):
    """One block: what the convolutions add to the shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int, config: ResNetConfig):
        super().__init__()
        averaged = config.shrink == "average" and stride > 1
        build = basic if config.block == "basic" else bottleneck
        self.branch = nn.Sequential(*build(channels_in, channels, stride, config.shrink))
        self.shortcut = nn.Identity()
        if channels_in != channels or stride > 1:
            pool = [nn.AvgPool2d(stride)] if averaged else []
            self.shortcut = nn.Sequential(*pool, *norm_after(channels_in, channels, 1, 1 if averaged else stride))

    def forward(self, x_nCYX: Tensor) -> Tensor:
        return F.relu(self.branch(x_nCYX) + self.shortcut(x_nCYX))


def basic(channels_in: int, channels: int, stride: int, shrink: str) -> list[nn.Module]:
    return [*norm_after(channels_in, channels, 3, stride), nn.ReLU(), *norm_after(channels, channels, 3)]


def bottleneck(channels_in: int, channels: int, stride: int, shrink: str) -> list[nn.Module]:
    inner = channels // REDUCTION
    strides = {"first": (stride, 1), "middle": (1, stride), "average": (1, 1)}[shrink]
    pool = [nn.AvgPool2d(stride)] if shrink == "average" and stride > 1 else []
    return [
        *norm_after(channels_in, inner, 1, strides[0]), nn.ReLU(),
        *norm_after(inner, inner, 3, strides[1]), nn.ReLU(), *pool,
        *norm_after(inner, channels, 1),
    ]


class AttentionPool(nn.Module):
    """The mean of the places asks all of them and itself (CLIP); its last matrix is the head's projection."""

    def __init__(self, width: int, heads: int, places: int):
        super().__init__()
        self.heads = heads
        self.position_embedding = nn.Parameter(torch.randn(1 + places, width) * width**-0.5)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x_nND: Tensor) -> Tensor:
        """[n, D]."""
        if x_nND.shape[1] + 1 != len(self.position_embedding):
            raise UserError(
                f"found {x_nND.shape[1]} places; the attention pool expects {len(self.position_embedding) - 1}; "
                "give pictures of the configured size"
            )
        x_nMD = torch.cat([x_nND.mean(dim=1, keepdim=True), x_nND], dim=1) + self.position_embedding
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(x_nMD[:, :1]), self.key(x_nMD), self.value(x_nMD))
        )
        return F.scaled_dot_product_attention(query, key, value).flatten(1)


class ResNet(PixelEncoder):
    """Stem and stages. `config` is a VisionConfig whose `resnet` is set."""

    def __init__(self, config):
        super().__init__(config.mean, config.std)
        self.config, sizes = config, config.resnet
        self.stem = STEMS[sizes.stem](sizes.stem_width)
        stages, channels = [], sizes.stem_width
        for index, (width, depth) in enumerate(zip(sizes.widths, sizes.depths, strict=True)):
            stride = 2 if index or sizes.shrink_first_stage else 1
            inputs = (channels,) + (width,) * (depth - 1)
            blocks = [Residual(wide, width, stride if at == 0 else 1, sizes) for at, wide in enumerate(inputs)]
            stages.append(nn.Sequential(*blocks))
            channels = width
        self.stages = nn.ModuleList(stages)
        self.attention_pool = AttentionPool(channels, sizes.pool_heads, config.side**2) if sizes.pool_heads else None
        initialize_convolutions(self)

    def forward(
        self, images: Tensor, weights: None = None, taps: list | None = None, grids: None = None, frames: None = None
    ) -> Tensor:
        """[n, N, D]: the last feature map, row by row.

        Args:
            images: [n, C, Y, X]; uint8 is normalised here.
            taps: a list to which the feature map [n, C, Y, X] after each stage is appended.
            weights, grids, frames: of other encoders; a residual network has no use for them.
        """
        x_nCYX = self.stem(self.normalise(images))
        for stage in self.stages:
            x_nCYX = stage(x_nCYX)
            if taps is not None:
                taps.append(x_nCYX)
        return x_nCYX.flatten(2).transpose(1, 2)

    def patches(self, tokens_nND: Tensor) -> Tensor:
        """All tokens stand for a place in the picture."""
        return tokens_nND

    def pool(self, tokens_nND: Tensor) -> Tensor:
        """[n, D] for the whole picture."""
        return tokens_nND.mean(dim=1) if self.attention_pool is None else self.attention_pool(tokens_nND)


def initialize_convolutions(model: nn.Module) -> None:
    """He's normal weights (arXiv 1502.01852), and blocks that start as their shortcut (arXiv 1706.02677, 5.1)."""
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
    for block in blocks_of(model):
        nn.init.zeros_(block.branch[-1].weight)


def blocks_of(model: nn.Module) -> Sequence[Residual]:
    return [part for part in model.modules() if isinstance(part, Residual)]
