"""Residual networks (arXiv 1512.03385, version 1.5)."""

from typing import Any

import torch
from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.pretrained.family import Family, Inputs, Names, Theirs, random_pixels, require
from vlmpipe.models.pretrained.keys import KeyMap, one
from vlmpipe.models.resnet import ResNetConfig
from vlmpipe.models.vision import VisionConfig

STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def read(theirs: Theirs, names: Names = frozenset()) -> VisionConfig:
    require(theirs, num_channels=3, hidden_act="relu")
    first = theirs["downsample_in_bottleneck"] and theirs["layer_type"] == "bottleneck"
    resnet = ResNetConfig(
        widths=tuple(theirs["hidden_sizes"]),
        depths=tuple(theirs["depths"]),
        block=theirs["layer_type"],
        stem_width=theirs["embedding_size"],
        shrink="first" if first else "middle",
        shrink_first_stage=theirs["downsample_in_first_stage"],
    )
    return VisionConfig(resnet=resnet, patch_size=resnet.stride, image_size=7 * resnet.stride)


def write(config: VisionConfig) -> dict[str, Any]:
    resnet = config.resnet
    if resnet is None or resnet.stem != "single" or resnet.shrink == "average" or resnet.pool_heads:
        raise UserError("resnet: found none, or CLIP's; expected stem: single, shrink: middle or first, no pool_heads")
    return {
        "embedding_size": resnet.stem_width,
        "hidden_sizes": list(resnet.widths),
        "depths": list(resnet.depths),
        "layer_type": resnet.block,
        "downsample_in_first_stage": resnet.shrink_first_stage,
        "downsample_in_bottleneck": resnet.shrink == "first",
    }


def layer(ours: str, number: int, theirs: str) -> KeyMap:
    """A convolution and the norm after it, numbers `number` and `number` + 1 of a sequence of ours."""
    norm = {f"{ours}.{number + 1}.{name}": one(f"{theirs}.normalization.{name}") for name in STATE}
    return {f"{ours}.{number}.weight": one(f"{theirs}.convolution.weight"), **norm}


def keys(config: VisionConfig) -> KeyMap:
    resnet, found = config.resnet, layer("stem", 0, "embedder.embedder")
    channels = resnet.stem_width
    for stage, (width, depth) in enumerate(zip(resnet.widths, resnet.depths, strict=True)):
        for block in range(depth):
            ours, theirs = f"stages.{stage}.{block}", f"encoder.stages.{stage}.layers.{block}"
            for number in range(2 if resnet.block == "basic" else 3):
                found |= layer(f"{ours}.branch", 3 * number, f"{theirs}.layer.{number}")
            halved = block == 0 and (stage > 0 or resnet.shrink_first_stage)
            if halved or channels != width:
                found |= layer(f"{ours}.shortcut", 0, f"{theirs}.shortcut")
            channels = width
    return found


def inputs(theirs: Theirs, processor: Any) -> Inputs:
    return {"pixel_values": random_pixels(75)}


def found(model: Any, given: Inputs) -> dict[str, Tensor]:
    tokens = model(given["pixel_values"])
    return {"tokens": tokens, "pooled": model.pool(tokens)}


def expected(model: Any, given: Inputs) -> dict[str, Tensor]:
    outputs = model(**given)
    tokens = outputs.last_hidden_state.flatten(2).transpose(1, 2)
    return {"tokens": tokens, "pooled": torch.flatten(outputs.pooler_output, 1)}


RESNET = Family(
    "ResNetModel", VisionConfig, read, write, keys, inputs, found, expected,
    {"embedding_size": 6, "hidden_sizes": [8, 12, 20], "depths": [2, 1, 2]},
    heads=(r"classifier\..*",), image_processor="ConvNextImageProcessorPil",
)
