"""The pictures of a run, decoded once: squares in one array, or each at its own size.

Shapes: N pictures, n of a batch, C colours, Y and X pixels, P patches of a batch.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.images import decode_rgb
from vlmpipe.models.fill import fill_up
from vlmpipe.models.native import pack_sized, sized
from vlmpipe.models.places import Grid
from vlmpipe.models.processor import Processor
from vlmpipe.models.vision import VisionConfig
from vlmpipe.models.vlm import VLMConfig

# Decoded pictures beyond this stay on disk and are mapped.
MEMORY_LIMIT = 2 * 2**30
# Fusions that tell a picture from what it is filled up with.
FILLED = ("single_stream", "co_attention", "multimodal")


@dataclass(frozen=True)
class OwnSizes:
    """Pictures [C, Y, X] one behind the other, for a tower that packs those of a batch, or takes them filled up to one
    size.

    Attributes:
        values: uint8, the pixels of all.
        sizes: [N, 2] Y and X, whole patches.
        vision: of the model; it packs where `native` is set.
    """

    values: np.ndarray
    sizes: np.ndarray
    vision: VisionConfig

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def several(self) -> bool:
        """Whether batches come packed or filled up."""
        return self.vision.native is not None or len(np.unique(self.sizes, axis=0)) > 1

    @cached_property
    def ends(self) -> np.ndarray:
        return np.cumsum(3 * self.sizes.prod(axis=1))

    def pixels(self, number: int) -> Tensor:
        """uint8 [1, C, Y, X]: a clip of one frame."""
        height, width = self.sizes[number].tolist()
        end = int(self.ends[number])
        return torch.from_numpy(self.values[end - 3 * height * width : end].reshape(1, 3, height, width))

    def grid(self, number: int) -> Grid:
        height, width = (self.sizes[number] // self.vision.patch_size).tolist()
        return 1, height, width


Pictures = np.ndarray | OwnSizes  # the array: uint8 [N, C, Y, X]


def inputs_of(pictures: Pictures, numbers: Sequence[int]) -> dict[str, Tensor]:
    """`images` [n, C, Y, X] of the forward pass, or packed [P, …]; `grids` [n, 3] where sizes differ."""
    if not isinstance(pictures, OwnSizes):
        return {"images": torch.from_numpy(pictures[list(numbers)])}
    clips, vision = [pictures.pixels(number) for number in numbers], pictures.vision
    if vision.native is None:
        return fill_up([clip[0].numpy() for clip in clips], vision.patch_size)
    return dict(zip(("images", "grids"), pack_sized(clips, vision), strict=True))


def decode_images(
    encoded: Iterable[bytes], count: int, processor: Processor, cache: Path, config: VLMConfig | None = None
) -> Pictures:
    """Decode `count` pictures once, in memory, or in a file at `cache` where they are many.

    Args:
        config: of a model that may take pictures of several sizes.

    Raises:
        UserError: the processor makes no uint8 squares, or pictures that are no whole patches.
    """
    read = None if config is None else reader_of_sizes(processor, config)
    if read is not None:
        return decode_own_sizes(encoded, read, config.vision, cache)
    shape = (count, 3, processor.image_size, processor.image_size)
    if int(np.prod(shape)) <= MEMORY_LIMIT:
        images = np.empty(shape, np.uint8)
    else:
        reserve(cache, int(np.prod(shape)))
        images = np.memmap(cache, np.uint8, mode="r+", shape=shape)
    for index, data in enumerate(encoded):
        images[index] = square(processor.image(decode_rgb(data)), processor.image_size)
    return images


def reader_of_sizes(processor: Processor, config: VLMConfig) -> Callable[[Image.Image], np.ndarray] | None:
    """What makes [C, Y, X] of a picture that keeps its size; None where all must have one."""
    vision = config.vision
    if vision is None or processor.config.resize != "native":
        return None
    if vision.native is not None:
        return lambda image: sized([image], vision)[0].numpy()
    if vision.transformer is not None and config.fusion.kind in FILLED:
        return lambda image: whole(processor.image(image), vision.patch_size)
    return None


def decode_own_sizes(
    encoded: Iterable[bytes], read: Callable[[Image.Image], np.ndarray], vision: VisionConfig, cache: Path
) -> OwnSizes:
    """What they take is known when they are decoded, so they go through the file."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    sizes = []
    with open(cache, "wb") as file:
        for data in encoded:
            pixels = read(decode_rgb(data))
            sizes.append(pixels.shape[1:])
            file.write(np.ascontiguousarray(pixels))
    small = cache.stat().st_size <= MEMORY_LIMIT
    values = np.fromfile(cache, np.uint8) if small else np.memmap(cache, np.uint8, mode="r+")
    return OwnSizes(values, np.array(sizes), vision)


def whole(pixels: np.ndarray, patch: int) -> np.ndarray:
    """The picture as it came.

    Raises:
        UserError: it is not in whole patches of bytes.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or any(side % patch for side in pixels.shape[1:]):
        raise UserError(
            f"found an image processor that makes {pixels.dtype} {list(pixels.shape)} of a picture; expected uint8 in "
            f"whole patches of {patch} x {patch} pixels to train on; start from a model whose preprocessor_config.json "
            f"has them as size_divisor, do_rescale true and rescale_factor 1/255"
        )
    return pixels


def square(pixels: np.ndarray, side: int) -> np.ndarray:
    """The picture as it came.

    Raises:
        UserError: it is not what pictures are kept as between the steps: image processors from elsewhere may pack
            patches, keep each picture's own shape or normalise otherwise than a model can.
    """
    if pixels.dtype != np.uint8 or pixels.shape != (3, side, side):
        size = f"of {side} x {side} pixels" if side else "of one size"
        raise UserError(
            f"found an image processor that makes {pixels.dtype} {list(pixels.shape)} of a picture; expected uint8 "
            f"squares {size} to train on; start from a model whose preprocessor_config.json resizes to a square and "
            f"has do_rescale true and rescale_factor 1/255, such as a CLIP's"
        )
    return pixels


def reserve(path: Path, size: int) -> None:
    """Make a file of `size` bytes that the disk has room for: a mapped one without ends the process by SIGBUS."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(file.fileno(), 0, size)
        file.truncate(size)
