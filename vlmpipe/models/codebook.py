"""Pictures to discrete codes, one a patch: what masked image modelling predicts. Codebooks are never trained here.

Shapes: n pictures, C colours, Y and X pixels, y and x patches, K codes.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpipe.errors import UserError

DALLE_STRIDE = 8  # pixels that a code of the discrete autoencoder stands for
DALLE_MARGIN = 0.1  # its pixels lie in margin .. 1 - margin


@dataclass(frozen=True)
class CodebookConfig:
    """`dalle`: the encoder of DALL-E's discrete autoencoder (arXiv 2102.12092), whose released weights BEiT and FLAVA
    predict. `random`: the nearest of fixed random vectors to a fixed random projection of the patch (arXiv 2202.01855),
    which needs no training."""

    kind: Literal["dalle", "random"] = "random"
    width: int = 256  # of `dalle`, after the first layer
    blocks: int = 2  # of `dalle`, in each of the four groups


class RandomCodebook(nn.Module):
    """BEST-RQ's quantizer for patches: 16 numbers a patch, unit norm, the code with the largest cosine."""

    def __init__(self, config: CodebookConfig, codes: int, patch_size: int):
        super().__init__()
        self.patch_size = patch_size
        self.register_buffer("projection", torch.randn(3 * patch_size**2, 16))
        self.register_buffer("codes", F.normalize(torch.randn(codes, 16), dim=-1))

    def forward(self, images_nCYX: Tensor) -> Tensor:
        """[n, y * x] int64."""
        patches = patchify(unit(images_nCYX) - 0.5, self.patch_size)
        return (patches @ self.projection @ self.codes.T).argmax(dim=-1)


class DalleBlock(nn.Module):
    """Four activated convolutions, whose sum with what came in is scaled down by the number of blocks squared."""

    def __init__(self, channels_in: int, channels: int, gain: float):
        super().__init__()
        self.gain, hidden = gain, channels // 4
        self.skip = nn.Identity() if channels_in == channels else nn.Conv2d(channels_in, channels, 1)
        widths = [channels_in, hidden, hidden, hidden]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, size, padding=size // 2)
            for before, after, size in zip(widths, [*widths[1:], channels], (3, 3, 3, 1), strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        change = x
        for convolution in self.convolutions:
            change = convolution(change.relu())
        return self.skip(x) + self.gain * change


class DalleCodebook(nn.Module):
    """Pictures are brought to 8 pixels a patch and to 0.1 .. 0.9; three of the four groups halve the sides."""

    def __init__(self, config: CodebookConfig, codes: int, patch_size: int):
        super().__init__()
        self.patch_size, width = patch_size, config.width
        gain = 1 / (4 * config.blocks) ** 2
        self.input = nn.Conv2d(3, width, 7, padding=3)
        groups, before = OrderedDict(), width
        for group, after in enumerate((width, 2 * width, 4 * width, 8 * width)):
            blocks = [DalleBlock(before if block == 0 else after, after, gain) for block in range(config.blocks)]
            groups[str(group)] = nn.Sequential(*blocks)
            before = after
        self.groups = nn.Sequential(groups)
        self.output = nn.Conv2d(before, codes, 1)

    def forward(self, images_nCYX: Tensor) -> Tensor:
        """[n, y * x] int64."""
        size = [side // self.patch_size * DALLE_STRIDE for side in images_nCYX.shape[-2:]]
        pixels = F.interpolate(unit(images_nCYX), size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.logits(DALLE_MARGIN + (1 - 2 * DALLE_MARGIN) * pixels).flatten(2).argmax(dim=1)

    def logits(self, pixels_nCYX: Tensor) -> Tensor:
        """[n, K, Y / 8, X / 8] for pixels in 0.1 .. 0.9."""
        x = self.input(pixels_nCYX)
        for number, group in enumerate(self.groups):
            x = group(x)
            x = F.max_pool2d(x, 2) if number < len(self.groups) - 1 else x
        return self.output(x.relu())


CODEBOOKS = {"random": RandomCodebook, "dalle": DalleCodebook}


def unit(images: Tensor) -> Tensor:
    """Pixels in 0 .. 1.

    Raises:
        UserError: they are not raw pixels.
    """
    if images.dtype != torch.uint8:
        raise UserError(f"found pictures of type {images.dtype}; a codebook expects raw pixels (uint8)")
    return images.float() / 255


def patchify(images_nCYX: Tensor, size: int) -> Tensor:
    """[n, y * x, size * size * C]: the numbers of each patch, by row, column, colour."""
    grid = images_nCYX.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # n C y p x q
    return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
