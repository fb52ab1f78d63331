"""The vision encoder: uint8 pictures in, one token per patch out.

Shapes: B batch, C colours, Y and X pixels, N patch tokens (class token first where there is one), D width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.collective import BatchNorm
from vlmpipe.models.layers import CrossAttention, FeedForward, Transformer, TransformerConfig, build_norm
from vlmpipe.models.native import NativeConfig, NativeViT
from vlmpipe.models.pixels import PixelEncoder
from vlmpipe.models.regions import Regions
from vlmpipe.models.resnet import ResNet, ResNetConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionConfig:
    """A vision transformer, at pictures' own sizes where `native` is set, a residual network, or features of regions.

    `patch_size` is the side in pixels of what becomes one token, whatever the stem; a residual network gives its own.
    """

    transformer: TransformerConfig | None = None
    resnet: ResNetConfig | None = None
    native: NativeConfig | None = None
    regions: int = 0  # numbers of a region, where pictures come as the features that a detector gave
    image_size: int = 224
    patch_size: int = 16
    stem: Literal["patch", "conv"] = "patch"
    stem_width: int = 32  # channels after the first convolution of a conv stem; doubles up to the width
    stem_bias: bool = True
    class_token: bool = False
    pool: Literal["class", "mean", "attention"] = "mean"  # a residual network with `pool_heads` pools by attention
    pooler: bool = False  # ViT's dense layer and tanh over what was pooled
    positions: Literal["learned", "none"] = "learned"  # other picture sizes get them interpolated
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # bilinear: corner to corner, as ViLT does
    final_norm: bool | None = None  # null: where norms come first
    mask_token: bool = False  # a learned token stands for hidden patches (BEiT, arXiv 2106.08254)
    frames: int = 0  # learned positions in time, for so many frames of a clip
    patch_dropout: float = 0.0  # share of the patches left out in training (FLIP, arXiv 2212.00794)
    input_norm: bool = False  # CLIP's extra norm before the first block
    layer: int = -1  # whose output the tokens are: -1 the last block's, normed; -2 the one before it, as LLaVA takes
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self):
        given = [name for name in ("transformer", "resnet", "regions") if getattr(self, name)]
        if len(given) != 1:
            raise UserError(f"transformer, resnet, regions: found {given}; expected exactly one of them")
        if self.pooler and self.pool != "class":
            raise UserError(f"pooler: found true with pool '{self.pool}'; expected pool: class")
        if self.resnet is not None:
            return check_resnet(self)
        if self.regions:
            return None
        if self.native is not None:
            check_native(self)
        if self.image_size % self.patch_size:
            raise UserError(
                f"patch_size: found {self.patch_size} for image_size {self.image_size}; expected a divisor of it"
            )
        if self.stem == "conv" and self.patch_size & (self.patch_size - 1):
            raise UserError(f"patch_size: found {self.patch_size}; a conv stem expects a power of two")
        if self.pool == "class" and not self.class_token:
            raise UserError("pool: found 'class' without a class token; expected class_token: true or pool: mean")
        if not 0 <= self.patch_dropout < 1:
            raise UserError(f"patch_dropout: found {self.patch_dropout}; expected at least 0 and under 1")
        if not -max(self.transformer.depth, 1) <= self.layer <= -1:
            raise UserError(f"layer: found {self.layer}; expected -{self.transformer.depth} to -1")

    @property
    def width(self) -> int:
        """Of a token."""
        if self.resnet is not None:
            return self.resnet.widths[-1]
        if self.regions:
            return self.regions
        return self.transformer.width * (self.native.merge**2 if self.native else 1)

    @property
    def side(self) -> int:
        """Tokens along one side of a picture of the configured size."""
        return self.image_size // (self.patch_size * (self.native.merge if self.native else 1))

    @property
    def tokens(self) -> int:
        """The most tokens of one picture, the class token not counted."""
        if self.native is None:
            return self.side**2
        return max(self.side**2, self.native.max_pixels // (self.patch_size * self.native.merge) ** 2)


def check_resnet(config: VisionConfig) -> None:
    """A residual network has neither a class token nor positions nor a stem of its own kind."""
    stride = config.resnet.stride
    if config.patch_size != stride or config.image_size % stride:
        raise UserError(
            f"patch_size: found {config.patch_size} for pictures of {config.image_size}; expected {stride}, the stride "
            "of this resnet, and a multiple of it"
        )
    if config.class_token or config.native or config.frames or config.patch_dropout:
        raise UserError("resnet: found class_token, native, frames or patch_dropout beside it; expected none of them")


def check_native(config: VisionConfig) -> None:
    """Positions are rotary; sizes must fit whole tokens."""
    native, token = config.native, config.patch_size * config.native.merge
    if config.class_token or config.frames or config.patch_dropout or config.positions != "none":
        raise UserError(
            "native: found class_token, frames, patch_dropout or learned positions beside it; expected positions: none "
            "and none of the others"
        )
    if config.image_size % token or native.window % token:
        raise UserError(
            f"native: found image_size {config.image_size} and window {native.window}; expected multiples of {token}, "
            "the side of a token"
        )
    if config.transformer.per_head % 4:
        raise UserError(f"heads: found a width of {config.transformer.per_head}; expected a multiple of 4")
    if config.transformer.norm_place != "pre" or config.layer != -1 or config.input_norm or config.stem != "patch":
        raise UserError("native: found norm_place post, layer, input_norm or a conv stem beside it; expected none")
    if any(layer >= config.transformer.depth for layer in native.full_layers):
        raise UserError(f"full_layers: found {list(native.full_layers)}; expected under {config.transformer.depth}")


def patch_stem(config: VisionConfig) -> nn.Module:
    size = config.patch_size
    return nn.Conv2d(3, config.transformer.width, size, stride=size, bias=config.stem_bias)


def conv_stem(config: VisionConfig) -> nn.Module:
    """Halve the side until a patch is a pixel: small models learn much faster than from patches (arXiv 2106.14881).

    Batch norm is what makes it quick. Asked which of four shapes are in a scene, where 60% is chance, 300 steps bring
    this stem to 96%; with layer norm instead to 66%, with group norm to 67%.
    """
    layers, channels = [], 3
    for step in range(int(math.log2(config.patch_size))):
        wider = min(config.stem_width * 2**step, config.transformer.width)
        layers += [nn.Conv2d(channels, wider, 3, stride=2, padding=1, bias=False), BatchNorm(wider), nn.GELU()]
        channels = wider
    return nn.Sequential(*layers, nn.Conv2d(channels, config.transformer.width, 1, bias=config.stem_bias))


STEMS = {"patch": patch_stem, "conv": conv_stem}


def sine_cosine_2d(side: int, width: int) -> Tensor:
    """[side * side, width]: where a patch is, in waves of x in one half and of y in the other (arXiv 2111.06377, A.1).

    What positions start from: from noise, a model that trains for minutes hardly learns where things are.
    """
    per_axis = width // 2
    rates = 10000.0 ** -(torch.arange(0, per_axis, 2) / per_axis)
    angles = torch.arange(side)[:, None] * rates  # [side, ceil(per_axis / 2)]
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)[:, :per_axis]
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.cat([axis[x.flatten()], axis[y.flatten()]], dim=1)
    return F.pad(places, (0, width - places.shape[1]))


class AttentionPooling(nn.Module):
    """One learned query looks at all tokens, then a feed-forward with a residual (SigLIP, after arXiv 2106.04560)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, config.width) * config.width**-0.5)
        self.attention = CrossAttention(config, config.width)
        self.norm, self.feed_forward = build_norm(config), FeedForward(config)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        seen_BD = self.attention(self.probe.expand(len(tokens_BND), -1, -1), tokens_BND)[:, 0]
        return seen_BD + self.feed_forward(self.norm(seen_BD))


class VisionEncoder(PixelEncoder):
    """Stem, positions, blocks, norm."""

    def __init__(self, config: VisionConfig):
        super().__init__(config.mean, config.std)
        self.config = config
        width = config.transformer.width
        self.stem = STEMS[config.stem](config)
        self.class_embedding = nn.Parameter(torch.randn(width) * 0.02) if config.class_token else None
        self.position_embedding = None
        if config.positions == "learned":
            places = sine_cosine_2d(config.side, width)
            nowhere = torch.zeros(int(config.class_token), width)  # a class token has no place
            self.position_embedding = nn.Parameter(torch.cat([nowhere, places]))
        self.frame_embedding = nn.Embedding(config.frames, width) if config.frames else None
        self.input_norm = build_norm(config.transformer) if config.input_norm else nn.Identity()
        self.transformer = Transformer(config.transformer)
        normed = config.transformer.norm_place == "pre" if config.final_norm is None else config.final_norm
        self.norm = build_norm(config.transformer) if normed else nn.Identity()
        self.mask_embedding = nn.Parameter(torch.randn(width) * 0.02) if config.mask_token else None
        self.pooling = AttentionPooling(config.transformer) if config.pool == "attention" else None
        self.pooler = nn.Linear(width, width) if config.pooler else None

    def forward(
        self,
        images_BCYX: Tensor,
        weights: list | None = None,
        taps: list | None = None,
        grids: Tensor | None = None,
        frames: Tensor | None = None,
        embedded: Callable[[Tensor], Tensor] | None = None,
        pooled: bool = False,
    ) -> Tensor:
        """[B, N, D] after the last norm, or of an earlier `config.layer`.

        Args:
            images_BCYX: uint8 is normalised here, on its device; floats are taken as normalised.
            weights, taps: lists filled with each block's attention and output.
            grids: [B, 3] how many patches down and across are of the picture, in its last two columns, where smaller
                ones are filled up to a common size; see `real`. The patch dropout leaves such pictures alone.
            frames: [B] the number of each picture in its clip.
            embedded: what to do with the patch tokens of the stem [B, N, D] before positions are added (masking).
            pooled: nothing is wanted but what `pool` makes of it: where that is one token, [B, 1, D] of it.
        """
        grid_BDyx = self.stem(self.normalise(images_BCYX))
        x_BND = grid_BDyx.flatten(2).transpose(1, 2)
        x_BND = self.place(x_BND if embedded is None else embedded(x_BND), tuple(grid_BDyx.shape[-2:]), grids)
        if self.frame_embedding is not None and frames is not None:
            x_BND = x_BND + self.frame_embedding(frames)[:, None]
        x_BND = self.input_norm(self.drop(x_BND) if grids is None else x_BND)
        outputs: list[Tensor] = [] if taps is None else taps
        mask = None if grids is None else self.real(grids, tuple(images_BCYX.shape[-2:]))[:, None, None]
        wanted = self.config.layer + 1 if taps is None and weights is None else 0
        alone = pooled and self.config.pool == "class" and self.config.layer == -1
        only_B = torch.zeros(len(x_BND), dtype=torch.int64, device=x_BND.device) if alone else None
        x_BND = self.transformer(x_BND, outputs, wanted or None, only_B, mask=mask, weights=weights)
        return self.norm(x_BND) if self.config.layer == -1 else outputs[-1 if wanted else self.config.layer]

    def hide(self, x_BND: Tensor, hidden_BN: Tensor) -> Tensor:
        """The mask token in place of hidden patches, before positions are added."""
        if self.mask_embedding is None:
            raise UserError("found hidden patches without vision.mask_token; expected mask_token: true")
        return torch.where(hidden_BN[..., None], self.mask_embedding.to(x_BND.dtype), x_BND)

    def real(self, grids: Tensor, size: tuple[int, int]) -> Tensor:
        """[B, N] bool: which tokens are of the picture, in pictures filled up to `size` (Y, X)."""
        down, across = (
            torch.arange(side // self.config.patch_size, device=grids.device) < grids[:, axis : axis + 1]
            for axis, side in enumerate(size, start=1)
        )
        real_BN = (down[:, :, None] & across[:, None]).flatten(1)
        return F.pad(real_BN, (int(self.config.class_token), 0), value=True)

    def place(self, x_BND: Tensor, shape: tuple[int, int], grids: Tensor | None = None) -> Tensor:
        """Class token and positions added; `shape`: rows and columns of patches."""
        if self.class_embedding is not None:
            x_BND = torch.cat([self.class_embedding.expand(len(x_BND), 1, -1), x_BND], dim=1)
        if self.position_embedding is None:
            return x_BND
        return x_BND + (self.positions_for(shape) if grids is None else self.positions_of(grids, shape))

    def positions_of(self, grids: Tensor, shape: tuple[int, int]) -> Tensor:
        """[B, N, D]: each picture's positions for its own size; what it is filled up with has none."""
        extra, width = int(self.config.class_token), self.position_embedding.shape[1]
        rows = []
        for down, across in grids[:, 1:].tolist():
            own = self.positions_for((down, across))
            grid = own[extra:].view(down, across, width)
            filled = F.pad(grid, (0, 0, 0, shape[1] - across, 0, shape[0] - down)).flatten(0, 1)
            rows.append(torch.cat([own[:extra], filled]))
        return torch.stack(rows)

    def positions_for(self, shape: tuple[int, int]) -> Tensor:
        """[N, D]: as learned, or interpolated to pictures of another size (bicubically in DINO and ViT)."""
        side, extra = self.config.side, int(self.config.class_token)
        if shape == (side, side):
            return self.position_embedding
        learned = self.position_embedding[extra:].T.unflatten(1, (side, side))[None]
        mode = self.config.interpolation
        resized = F.interpolate(learned, size=shape, mode=mode, align_corners=mode == "bilinear")[0].flatten(1).T
        return torch.cat([self.position_embedding[:extra], resized])

    def drop(self, x_BND: Tensor) -> Tensor:
        """In training, a random share of each picture's patches is left out; the class token stays."""
        if not (self.training and self.config.patch_dropout):
            return x_BND
        extra = int(self.config.class_token)
        count = x_BND.shape[1] - extra
        kept = max(1, round(count * (1 - self.config.patch_dropout)))
        order = torch.rand(len(x_BND), count, device=x_BND.device).argsort(dim=1)[:, :kept] + extra
        chosen = x_BND.gather(1, order[..., None].expand(-1, -1, x_BND.shape[2]))
        return torch.cat([x_BND[:, :extra], chosen], dim=1)

    def patches(self, tokens_BND: Tensor) -> Tensor:
        """The tokens that stand for a place in the picture."""
        return tokens_BND[:, 1:] if self.config.class_token else tokens_BND

    def pool(self, tokens_BND: Tensor) -> Tensor:
        """[B, D] for the whole picture."""
        if self.pooling is not None:
            return self.pooling(tokens_BND)
        pooled_BD = tokens_BND[:, 0] if self.config.pool == "class" else self.patches(tokens_BND).mean(dim=1)
        return pooled_BD if self.pooler is None else self.pooler(pooled_BD).tanh()


def build_vision(config: VisionConfig) -> nn.Module:
    """The encoder that the config describes; all have `forward`, `patches`, `pool`, `config`, `mean` and `std`."""
    if config.resnet is not None:
        return ResNet(config)
    if config.regions:
        return Regions(config)
    return VisionEncoder(config) if config.native is None else NativeViT(config)
