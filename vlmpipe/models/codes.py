"""Pictures as rows of numbers and back: a codebook of patches, learned from pictures by k-means.

What a text-to-image model writes, and what masked image modelling with discrete targets predicts.

Shapes: n pictures, C colours, Y and X pixels, N patches of a picture, U distinct patches, K codes, D values of a patch.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vlmpipe.errors import UserError


@dataclass(frozen=True)
class ImageCodesConfig:
    """`size` codes for patches of `patch_size` pixels, of pictures of `image_size` pixels a side.

    The codebook is learned from at most `patches` patches, in `steps` rounds of k-means.
    """

    size: int = 512
    image_size: int = 64
    patch_size: int = 8
    patches: int = 20_000
    steps: int = 10

    def __post_init__(self):
        if self.size < 2 or self.patches < self.size or self.steps < 1:
            raise UserError(
                f"codes: found size {self.size}, patches {self.patches}, steps {self.steps}; expected at least 2 "
                f"codes, as many patches to learn them from, and 1 step"
            )
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise UserError(f"codes.patch_size: found {self.patch_size}; expected a divisor of {self.image_size}")

    @property
    def side(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def length(self) -> int:
        """Codes of one picture, row by row from the top left."""
        return self.side**2

    @property
    def start(self) -> int:
        """The number before the first code, where a picture that is written begins."""
        return self.size


class ImageCodes(nn.Module):
    """Each patch is the number of the nearest entry of the codebook, which is saved with the model's weights."""

    def __init__(self, config: ImageCodesConfig):
        super().__init__()
        self.config = config
        self.register_buffer("codebook", torch.zeros(config.size, 3 * config.patch_size**2))  # in 0..1

    @torch.no_grad()
    def fit(self, images: Tensor | np.ndarray, seed: int = 0) -> None:
        """Learn the codebook from pictures uint8 [n, C, Y, X]; the same pictures and seed give the same one."""
        generator = torch.Generator().manual_seed(seed)
        needed = -(-self.config.patches // self.config.length)
        chosen = torch.randperm(len(images), generator=generator)[:needed].sort().values
        picked = images[chosen.numpy()] if isinstance(images, np.ndarray) else images[chosen]
        patches = self.patches(torch.as_tensor(picked)).flatten(0, 1)
        patches_UD, counts_U = torch.unique(patches, dim=0, return_counts=True)
        patches_UD = patches_UD.float() / 255
        if len(patches_UD) > self.config.size:
            patches_UD = k_means(patches_UD, counts_U.float(), self.config.size, self.config.steps, generator)
        # Too few distinct patches: the last one fills the book, and its first entry stands for it.
        rest = patches_UD[-1:].expand(self.config.size - len(patches_UD), -1)
        self.codebook.copy_(torch.cat([patches_UD, rest]))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """[n, N] int64 codes of pictures uint8 [n, C, Y, X].

        Raises:
            UserError: pictures of another size or type, or a codebook that was never learned.
        """
        size = self.config.image_size
        if images.dtype != torch.uint8 or images.shape[1:] != (3, size, size):
            raise UserError(
                f"found pictures {images.dtype} {list(images.shape[1:])}; expected torch.uint8 [3, {size}, {size}]"
            )
        if not torch.compiler.is_compiling() and not self.codebook.any():
            raise UserError("found an empty codebook of image codes; expected a learned one; call codes.fit(images)")
        patches = self.patches(images).flatten(0, 1).to(self.codebook.dtype) / 255
        return nearest(patches, self.codebook)[0].unflatten(0, (len(images), -1))

    @torch.no_grad()
    def decode(self, codes_nN: Tensor) -> Tensor:
        """uint8 [n, C, Y, X]: the picture of the codebook's patches."""
        side, patch = self.config.side, self.config.patch_size
        pixels = (self.codebook[codes_nN].float() * 255).round().clamp(0, 255).to(torch.uint8)
        grid = pixels.unflatten(2, (3, patch, patch)).unflatten(1, (side, side))  # [n, y, x, C, Y, X]
        return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def patches(self, images: Tensor) -> Tensor:
        """[n, N, D] of [n, C, Y, X]."""
        side, patch = self.config.side, self.config.patch_size
        grid = images.unflatten(3, (side, patch)).unflatten(2, (side, patch))  # [n, C, y, Y, x, X]
        return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def opening(self, codes_nN: Tensor) -> Tensor:
        """[n, N] what a model has read when it writes each of these codes: the start, and all but the last."""
        start = codes_nN.new_full((len(codes_nN), 1), self.config.start)
        return torch.cat([start, codes_nN[:, :-1]], dim=1)


def nearest(points_UD: Tensor, centres_KD: Tensor, part: int = 4096) -> tuple[Tensor, Tensor]:
    """The number of each point's nearest centre, the lower where two tie, and the squared distance to it [U]."""
    found = []
    for points in points_UD.split(part):
        distances = centres_KD.square().sum(1) - 2 * points @ centres_KD.T + points.square().sum(1, keepdim=True)
        found.append(distances.min(dim=1))
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found]).clamp(min=0)


def k_means(points_UD: Tensor, weights_U: Tensor, size: int, steps: int, generator: torch.Generator) -> Tensor:
    """[K, D] centres of distinct points that count `weights_U` times each (Lloyd, from k-means++'s start)."""
    centres_KD = spread_start(points_UD, weights_U, size, generator)
    for _ in range(steps):
        owner_U, distance_U = nearest(points_UD, centres_KD)
        total_K = torch.zeros(size).index_add(0, owner_U, weights_U)
        sums_KD = torch.zeros_like(centres_KD).index_add(0, owner_U, points_UD * weights_U[:, None])
        empty_K = total_K == 0
        centres_KD = torch.where(empty_K[:, None], centres_KD, sums_KD / total_K.clamp(min=1)[:, None])
        # A centre that nobody is nearest to moves to where the error is largest.
        worst = (distance_U * weights_U).topk(int(empty_K.sum())).indices
        centres_KD[empty_K] = points_UD[worst]
    return centres_KD


def spread_start(points_UD: Tensor, weights_U: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """`size` of the points, each drawn in proportion to its squared distance from those before (k-means++)."""
    chosen = [torch.multinomial(weights_U, 1, generator=generator)]
    distance_U = (points_UD - points_UD[chosen[0]]).square().sum(1)
    for _ in range(size - 1):
        chosen.append(torch.multinomial((distance_U * weights_U).clamp(min=1e-12), 1, generator=generator))
        distance_U = torch.minimum(distance_U, (points_UD - points_UD[chosen[-1]]).square().sum(1))
    return points_UD[torch.cat(chosen)]
