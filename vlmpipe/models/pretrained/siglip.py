"""SigLIP (arXiv 2303.15343): the whole model and its vision tower, pooled by attention."""

from typing import Any

from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.fusion import FusionConfig
from vlmpipe.models.heads import HeadsConfig, ProjectionConfig
from vlmpipe.models.pretrained import clip
from vlmpipe.models.pretrained.family import Family, Inputs, Names, Theirs, pixels, require, square, words
from vlmpipe.models.pretrained.keys import KeyMap, Reshape, Rows, one, pair, prefixed
from vlmpipe.models.text import TextConfig
from vlmpipe.models.vision import VisionConfig
from vlmpipe.models.vlm import VLMConfig

HALF = (0.5, 0.5, 0.5)


def read_vision(theirs: Theirs, names: Names = frozenset()) -> VisionConfig:
    require(theirs, num_channels=3)
    return VisionConfig(
        clip.read_transformer(theirs),
        image_size=square(theirs["image_size"], "image_size"),
        patch_size=square(theirs["patch_size"], "patch_size"),
        pool="attention" if theirs.get("vision_use_head", True) else "mean",
        mean=HALF,
        std=HALF,
    )


def write_vision(config: VisionConfig) -> dict[str, Any]:
    return {**clip.write_vision(config), "vision_use_head": config.pool == "attention"}


def read_text(theirs: Theirs) -> TextConfig:
    transformer, context = clip.read_transformer(theirs), theirs["max_position_embeddings"]
    return TextConfig(transformer, vocab_size=theirs["vocab_size"], context=context, causal=False)


def read_whole(theirs: Theirs, names: Names = frozenset()) -> VLMConfig:
    """Pictures are embedded by the pooling itself, texts by a linear layer with a bias."""
    text = theirs["text_config"]
    width = text.get("projection_size") or text["hidden_size"]
    projection = ProjectionConfig(width=width, image="none", text="affine", bias=-10.0, max_scale=None)
    return VLMConfig(
        vision=read_vision(theirs["vision_config"]),
        text=read_text(text),
        fusion=FusionConfig("none"),
        heads=HeadsConfig(projection=projection),
    )


def write_whole(config: VLMConfig) -> dict[str, Any]:
    if config.heads.projection is None:
        raise UserError("heads: found no projection; expected heads.projection, as SigLIP has")
    text = {**clip.write_text(config.text), "projection_size": config.heads.projection.width}
    return {"vision_config": write_vision(config.vision), "text_config": text}


def pool_keys(config: VisionConfig) -> KeyMap:
    """Of the attention pooling, whose query and key-value layers theirs stacks in one tensor."""
    width = config.transformer.width
    keys = {"pooling.probe": one("head.probe", Reshape((1, width), (1, 1, width)))}
    for kind in ("weight", "bias"):
        whole = (f"head.attention.in_proj_{kind}",)
        keys[f"pooling.attention.query.{kind}"] = Rows(whole, part=(0, width))
        keys[f"pooling.attention.key_value.{kind}"] = Rows(whole, part=(width, 3 * width))
    return {
        **keys,
        **pair("pooling.attention.out", "head.attention.out_proj"),
        **pair("pooling.norm", "head.layernorm"),
        **pair("pooling.feed_forward.up", "head.mlp.fc1"),
        **pair("pooling.feed_forward.down", "head.mlp.fc2"),
    }


def vision_keys(config: VisionConfig) -> KeyMap:
    return {
        **pair("stem", "embeddings.patch_embedding"),
        "position_embedding": one("embeddings.position_embedding.weight"),
        **clip.layers(config.transformer),
        **pair("norm", "post_layernorm"),
        **(pool_keys(config) if config.pool == "attention" else {}),
    }


def whole_keys(config: VLMConfig) -> KeyMap:
    return {
        **prefixed(vision_keys(config.vision), "vision.", "vision_model."),
        **prefixed(clip.text_keys(config.text), "text.", "text_model."),
        **pair("projection.text", "text_model.head"),
        "projection.logit_scale": one("logit_scale", Reshape((), (1,))),
        "projection.logit_bias": one("logit_bias", Reshape((), (1,))),
    }


def whole_inputs(theirs: Theirs, processor: Any) -> Inputs:
    """Rows as long as the positions allow, whose padding the model sees: so it was trained."""
    text = theirs["text_config"]
    if processor is not None and processor.tokenizer is not None:
        from vlmpipe.models.pretrained.family import SENTENCES

        limit = text["max_position_embeddings"]
        encoded = processor.tokenizer(
            list(SENTENCES), padding="max_length", truncation=True, max_length=limit, return_tensors="pt"
        )
        tokens = encoded["input_ids"]
    else:
        tokens = words(text, None)["input_ids"]
    return {**pixels(theirs["vision_config"], processor), "input_ids": tokens}


def found_vision(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    tokens = model(inputs["pixel_values"])
    return {"tokens": tokens, **({"pooled": model.pool(tokens)} if model.config.pool == "attention" else {})}


def expected_vision(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    outputs = model(**inputs)
    pooled = {"pooled": outputs.pooler_output} if model.use_head else {}
    return {"tokens": outputs.last_hidden_state, **pooled}


VISION = Family(
    "SiglipVisionModel", VisionConfig, read_vision, write_vision, vision_keys,
    pixels, found_vision, expected_vision, clip.TINY_VISION,
    heads=(r"text_model\..*", r"logit_(scale|bias)", r"classifier\..*"),
    image_processor="SiglipImageProcessorPil",
)
WHOLE = Family(
    "SiglipModel", VLMConfig, read_whole, write_whole, whole_keys,
    whole_inputs, clip.found_whole, clip.expected_whole,
    {"vision_config": clip.TINY_VISION, "text_config": {**clip.TINY_TEXT, "projection_size": 24}},
    image_processor="SiglipImageProcessorPil", fills_text=True,
)
