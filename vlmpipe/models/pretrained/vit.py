"""ViT (arXiv 2010.11929), with its pooler where the checkpoint has one."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from vlmpipe.models.layers import TransformerConfig
from vlmpipe.models.pretrained import clip
from vlmpipe.models.pretrained.family import (
    Family,
    Inputs,
    Names,
    Theirs,
    pixels,
    qkv,
    require,
    square,
)
from vlmpipe.models.pretrained.keys import KeyMap, Reshape, one, pair, repeat
from vlmpipe.models.vision import VisionConfig

HALF = (0.5, 0.5, 0.5)


def read(theirs: Theirs, names: Names) -> VisionConfig:
    pooled = "pooler.dense.weight" in names
    require(theirs, num_channels=3)
    if pooled:
        require(theirs, pooler_act="tanh", pooler_output_size=theirs["hidden_size"])
    transformer = replace(clip.read_transformer(theirs), qkv_bias=None if theirs["qkv_bias"] else False)
    return VisionConfig(
        transformer,
        image_size=square(theirs["image_size"], "image_size"),
        patch_size=square(theirs["patch_size"], "patch_size"),
        class_token=True,
        pool="class",
        pooler=pooled,
        mean=HALF,
        std=HALF,
    )


def write(config: VisionConfig) -> dict[str, Any]:
    return {**clip.write_vision(config), "qkv_bias": config.transformer.qkv_bias is not False}


def layers(config: TransformerConfig) -> KeyMap:
    ours, theirs = "transformer.blocks.{i}", "layers.{i}"
    attention, bias = f"{theirs}.attention", config.qkv_bias is not False
    names = (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")
    keys = {
        **pair(f"{ours}.attention_norm", f"{theirs}.layernorm_before"),
        **qkv(config, f"{ours}.attention.qkv", names, bias=bias),
        **pair(f"{ours}.attention.out", f"{attention}.o_proj"),
        **pair(f"{ours}.feed_forward_norm", f"{theirs}.layernorm_after"),
        **pair(f"{ours}.feed_forward.up", f"{theirs}.mlp.fc1"),
        **pair(f"{ours}.feed_forward.down", f"{theirs}.mlp.fc2"),
    }
    return repeat(keys, config.depth)


def keys(config: VisionConfig) -> KeyMap:
    width, places = config.width, config.side**2 + 1
    return {
        "class_embedding": one("embeddings.cls_token", Reshape((width,), (1, 1, width))),
        **pair("stem", "embeddings.patch_embeddings.projection"),
        "position_embedding": one("embeddings.position_embeddings", Reshape((places, width), (1, places, width))),
        **layers(config.transformer),
        **pair("norm", "layernorm"),
        **(pair("pooler", "pooler.dense") if config.pooler else {}),
    }


def found(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    tokens = model(inputs["pixel_values"])
    return {"tokens": tokens, **({"pooled": model.pool(tokens)} if model.config.pooler else {})}


def expected(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    outputs = model(**inputs)
    pooled = {} if model.pooler is None else {"pooled": outputs.pooler_output}
    return {"tokens": outputs.last_hidden_state, **pooled}


VIT = Family(
    "ViTModel", VisionConfig, read, write, keys, pixels, found, expected, clip.TINY_VISION,
    heads=(r"classifier\..*", r"decoder\..*", r"embeddings\.mask_token"),
    optional=("pooler",),
    image_processor="ViTImageProcessorPil",
)
