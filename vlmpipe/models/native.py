"""Pictures at their own size: a batch is one row of patches, attention stays in windows (Qwen2.5-VL, arXiv 2502.13923).

Shapes: n pictures, P patches of all of them, M = P / merge² tokens of all of them, C colours, p side of a patch in
pixels, t frames of a patch, D width of a patch, K width of a head. A grid is (frames / t, Y / p, X / p) of a picture.

Patches stand picture by picture and frame by frame; inside a frame, merge x merge neighbours stand together, since
they become one token: blocks row by row, then the rows of a block.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.images import to_rgb
from vlmpipe.models.layers import Transformer, build_norm
from vlmpipe.models.pixels import PixelEncoder
from vlmpipe.models.places import Grid

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class NativeConfig:
    """A picture keeps its shape; only its sides are rounded to whole tokens and its area is bounded.

    A video is a picture of several frames. `tokens_per_second`: how far positions in time move in a second of it.
    """

    merge: int = 2  # patches along a side that become one token
    frames: int = 2  # that make one patch; a picture is repeated
    window: int = 112  # pixels along a side that see each other; 0: the whole frame
    full_layers: tuple[int, ...] = ()  # where every patch sees its whole frame
    theta: float = 10000.0
    min_pixels: int = 0
    max_pixels: int = 0  # 0: image_size²
    tokens_per_second: float = 2.0

    def __post_init__(self):
        if self.merge < 1 or self.frames < 1:
            raise UserError(f"merge, frames: found {self.merge}, {self.frames}; expected at least 1")
        if min(self.window, self.min_pixels, self.max_pixels) < 0:
            raise UserError("window, min_pixels, max_pixels: found a negative number; expected at least 0")
        if self.max_pixels and self.min_pixels > self.max_pixels:
            raise UserError(f"min_pixels: found {self.min_pixels} over max_pixels {self.max_pixels}")


def patchify(frames_fCYX: Tensor, patch: int, config: NativeConfig) -> Tensor:
    """Frames of one size to packed patches [P, C * t * p * p]; every t frames are one in time."""
    merge = config.merge
    rows, columns = (size // patch for size in frames_fCYX.shape[-2:])
    blocks = frames_fCYX.unflatten(-1, (columns // merge, merge, patch)).unflatten(2, (rows // merge, merge, patch))
    # [T, t, C, y, my, py, x, mx, px] -> [T, y, x, my, mx, C, t, py, px]
    blocks = blocks.unflatten(0, (-1, config.frames)).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return blocks.flatten(5).flatten(0, 4)


def fit(height: int, width: int, token: int, least: int, most: int) -> tuple[int, int]:
    """The sides that a picture is resized to: multiples of `token`, of about its shape, and of `least` to `most`
    pixels in all (Qwen2-VL's rule)."""
    if max(height, width) > 200 * min(height, width):
        raise UserError(f"found a picture of {width} x {height}; expected sides within a factor of 200; crop it")
    sides = [round(side / token) * token for side in (height, width)]
    if sides[0] * sides[1] > most:
        shrink = math.sqrt(height * width / most)
        sides = [max(token, math.floor(side / shrink / token) * token) for side in (height, width)]
    elif sides[0] * sides[1] < least:
        grow = math.sqrt(least / (height * width))
        sides = [math.ceil(side * grow / token) * token for side in (height, width)]
    return sides[0], sides[1]


def sized(clip: Sequence[Image.Image], vision) -> Tensor:
    """uint8 [f, C, Y, X]: the frames of a picture or video at the size that `NativeViT` takes.

    Args:
        clip: frames of one size; a picture is a clip of one frame.
        vision: a VisionConfig whose `native` is set.
    """
    native, token = vision.native, vision.patch_size * vision.native.merge
    most = native.max_pixels or vision.image_size**2
    height, width = fit(clip[0].height, clip[0].width, token, native.min_pixels, most)
    frames = [np.asarray(to_rgb(frame).resize((width, height), Image.Resampling.BICUBIC)) for frame in clip]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def pack_sized(clips: Sequence[Tensor], vision) -> tuple[Tensor, Tensor]:
    """What `sized` made of several: patches [P, C * t * p * p] of all of them, and grids [n, 3].

    The last frame of each is repeated until they fill whole patches.
    """
    native, size, patches, grids = vision.native, vision.patch_size, [], []
    for clip_fCYX in clips:
        missing = -len(clip_fCYX) % native.frames
        frames_fCYX = torch.cat([clip_fCYX, clip_fCYX[-1:].expand(missing, -1, -1, -1)])
        patches.append(patchify(frames_fCYX, size, native))
        grids.append((len(frames_fCYX) // native.frames, *(side // size for side in clip_fCYX.shape[-2:])))
    return torch.cat(patches), torch.tensor(grids)


def pack(clips: Sequence[Sequence[Image.Image]], vision) -> tuple[Tensor, Tensor]:
    """Pictures and videos for `NativeViT`, see `sized` and `pack_sized`."""
    return pack_sized([sized(clip, vision) for clip in clips], vision)


def frame_counts(grids: Sequence[Grid]) -> list[int]:
    """Patches of each frame of each picture."""
    return [y * x for t, y, x in grids for _ in range(t)]


def patch_places(grids: Sequence[Grid], merge: int) -> np.ndarray:
    """[P, 2]: row and column of each patch in its frame."""
    parts = []
    for t, y, x in grids:
        rows, columns = np.meshgrid(np.arange(y), np.arange(x), indexing="ij")
        places = np.stack([rows, columns], axis=-1).reshape(y // merge, merge, x // merge, merge, 2)
        parts.append(np.tile(places.transpose(0, 2, 1, 3, 4).reshape(-1, 2), (t, 1)))
    return np.concatenate(parts)


def spans_by_length(labels_P: np.ndarray) -> tuple[np.ndarray, Spans]:
    """An order of the patches in which those of one label stand together and labels of equal count beside each other,
    and the (labels, patches of each) of every count: each is one batch of attention without a mask."""
    _, inverse, counts = np.unique(labels_P, return_inverse=True, return_counts=True)
    order = np.lexsort((inverse, counts[inverse]))
    lengths, labels = np.unique(counts, return_counts=True)
    return order, tuple(zip(labels.tolist(), lengths.tolist(), strict=True))


@dataclass(frozen=True)
class Plan:
    """Who sees whom, of pictures of these grids: orders of the patches and the spans in them."""

    places: np.ndarray  # [P, 2], of patches as they come
    windows: tuple[np.ndarray, Spans]
    frames: tuple[np.ndarray, Spans]


@lru_cache(maxsize=64)
def plan(grids: tuple[Grid, ...], merge: int, window: int) -> Plan:
    """`window`: patches along a side, 0 for the whole frame. Windows are cut from a frame's first corner, so those
    at its far sides may be smaller."""
    places = patch_places(grids, merge)
    counts = frame_counts(grids)
    frame_P = np.repeat(np.arange(len(counts)), counts)
    frames = spans_by_length(frame_P)
    if not window:
        return Plan(places, frames, frames)
    down, across = places[:, 0] // window, places[:, 1] // window
    labels_P = (frame_P * (down.max() + 1) + down) * (across.max() + 1) + across
    return Plan(places, spans_by_length(labels_P), frames)


def rotary_2d(places_P2: Tensor, per_head: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1, 1, P, K / 2]: half of the frequencies turn with the row, the same ones with the column."""
    quarter = per_head // 4
    rates = theta ** -(torch.arange(quarter, device=places_P2.device, dtype=torch.float32) / quarter)
    angles = (places_P2.float()[..., None] * rates).flatten(1)[None, None]
    return angles.cos(), angles.sin()


class NativeViT(PixelEncoder):
    """Patches, blocks, norm, and merge x merge patches in one token. `config`: a VisionConfig with `native` set."""

    def __init__(self, config):
        super().__init__(config.mean, config.std)
        self.config, self.native = config, config.native
        values = 3 * self.native.frames * config.patch_size**2
        self.stem = nn.Linear(values, config.transformer.width, bias=config.stem_bias)
        self.transformer = Transformer(config.transformer)
        self.norm = build_norm(config.transformer)

    def forward(
        self, images: Tensor, weights: None = None, taps: list | None = None, grids: Tensor | None = None,
        frames: None = None,
    ) -> Tensor:
        """[1, M, merge² D] for packed patches, [n, N, merge² D] for pictures of one size.

        Args:
            images: packed patches [P, C * t * p * p], or pictures [n, C, Y, X]; uint8 is normalised here.
            grids: [n, 3] of packed patches.
            taps: a list to which each block's output [P, D] is appended, in the order of the patches.
            weights, frames: of other encoders. Frames of a clip are in its grid.
        """
        pictures = len(images) if images.ndim == 4 else 1
        patches, shapes = self.patches_of(images, grids)
        way = plan(tuple(shapes), self.native.merge, self.native.window // self.config.patch_size)
        x_1PD = self.blocks(self.stem(patches)[None], way, taps)
        x_1PD = self.norm(x_1PD)
        return x_1PD.view(pictures, -1, self.config.width)

    def patches_of(self, images: Tensor, grids: Tensor | None) -> tuple[Tensor, list[Grid]]:
        size, merge = self.config.patch_size, self.native.merge
        if images.ndim == 4:
            if any(side % (size * merge) for side in images.shape[-2:]):
                raise UserError(
                    f"found pictures of {tuple(images.shape[-2:])} pixels; expected multiples of {size * merge}"
                )
            frames = self.normalise(images).repeat_interleave(self.native.frames, dim=0)
            grid = (1, images.shape[2] // size, images.shape[3] // size)
            return patchify(frames, size, self.native), [grid] * len(images)
        if grids is None:
            raise UserError("found packed patches without grids; expected one grid a picture")
        shapes = [tuple(grid) for grid in grids.tolist()]
        found, expected = len(images), sum(t * y * x for t, y, x in shapes)
        if found != expected or any(side % merge for _, *sides in shapes for side in sides):
            raise UserError(
                f"found {found} patches for grids {shapes[:4]}; expected {expected}, with sides that {merge} divides"
            )
        return self.normalise(images.view(found, 3, -1)).view(found, -1), shapes

    def blocks(self, x_1PD: Tensor, way: Plan, taps: list | None) -> Tensor:
        """Patches are put in the order in which their spans stand together, and back at the end."""
        places, tables = torch.from_numpy(way.places), {}
        now = came = np.arange(len(way.places))
        for layer, block in enumerate(self.transformer.blocks):
            full = layer in self.native.full_layers
            wanted, spans = way.frames if full else way.windows
            x_1PD, now = reorder(x_1PD, now, wanted), wanted
            if full not in tables:
                turned = places[torch.from_numpy(wanted)].to(x_1PD.device)
                tables[full] = rotary_2d(turned, self.config.transformer.per_head, self.native.theta)
            x_1PD = block(x_1PD, rotary=tables[full], spans=spans)
            if taps is not None:
                taps.append(reorder(x_1PD, now, came)[0])
        return reorder(x_1PD, now, came)

    def patches(self, tokens: Tensor) -> Tensor:
        """All tokens stand for a place in the picture."""
        return tokens

    def pool(self, tokens_nND: Tensor) -> Tensor:
        """[n, merge² D] for the whole picture, of pictures of one size."""
        return tokens_nND.mean(dim=1)


def reorder(x_1PD: Tensor, now: np.ndarray, wanted: np.ndarray) -> Tensor:
    """Patches in the order `wanted`, from those in the order `now` (numbers of patches as they came)."""
    if np.array_equal(now, wanted):
        return x_1PD
    where = np.empty_like(now)
    where[now] = np.arange(len(now))
    return x_1PD.index_select(1, torch.from_numpy(where[wanted]).to(x_1PD.device))
