"""CLIP (arXiv 2103.00020): the whole model and its two towers, whose layers SigLIP and others share."""

from typing import Any

from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.fusion import FusionConfig
from vlmpipe.models.heads import HeadsConfig, ProjectionConfig
from vlmpipe.models.layers import TransformerConfig
from vlmpipe.models.pretrained.family import (
    Family,
    Inputs,
    Names,
    Theirs,
    activation,
    activation_name,
    pixels,
    qkv,
    real,
    require,
    run_text,
    square,
    words,
)
from vlmpipe.models.pretrained.keys import KeyMap, one, pair, prefixed, repeat
from vlmpipe.models.text import TextConfig
from vlmpipe.models.vision import VisionConfig
from vlmpipe.models.vlm import VLMConfig

# Configs of old checkpoints say that texts end with this token and mean the highest one.
LEGACY_END = 2

# --- configs ---------------------------------------------------------------------------------------------


def read_transformer(theirs: Theirs) -> TransformerConfig:
    return TransformerConfig(
        width=theirs["hidden_size"],
        depth=theirs["num_hidden_layers"],
        heads=theirs["num_attention_heads"],
        hidden=theirs["intermediate_size"],
        norm_eps=theirs["layer_norm_eps"],
        activation=activation(theirs["hidden_act"]),
    )


def write_transformer(config: TransformerConfig | None) -> dict[str, Any]:
    if config is None:
        raise UserError("transformer: found none; expected a vision transformer")
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden or 4 * config.width,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": activation_name(config.activation),
    }


def read_vision(theirs: Theirs, names: Names = frozenset()) -> VisionConfig:
    require(theirs, num_channels=3)
    return VisionConfig(
        read_transformer(theirs),
        image_size=square(theirs["image_size"], "image_size"),
        patch_size=square(theirs["patch_size"], "patch_size"),
        stem_bias=False,
        class_token=True,
        pool="class",
        input_norm=True,
    )


def write_vision(config: VisionConfig) -> dict[str, Any]:
    sizes = {"image_size": config.image_size, "patch_size": config.patch_size}
    return {**write_transformer(config.transformer), **sizes}


def read_text(theirs: Theirs, names: Names = frozenset()) -> TextConfig:
    context = theirs["max_position_embeddings"]
    return TextConfig(read_transformer(theirs), vocab_size=theirs["vocab_size"], context=context)


def write_text(config: TextConfig) -> dict[str, Any]:
    sizes = {"vocab_size": config.vocab_size, "max_position_embeddings": config.context}
    return {**write_transformer(config.transformer), **sizes}


def read_whole(theirs: Theirs, names: Names = frozenset()) -> VLMConfig:
    return VLMConfig(
        vision=read_vision(theirs["vision_config"]),
        text=read_text(theirs["text_config"]),
        fusion=FusionConfig("none"),
        heads=HeadsConfig(projection=ProjectionConfig(width=theirs["projection_dim"], max_scale=None)),
    )


def write_whole(config: VLMConfig) -> dict[str, Any]:
    if config.heads.projection is None:
        raise UserError("heads: found no projection; expected heads.projection, as CLIP has")
    width = {"projection_dim": config.heads.projection.width}
    return {
        **width,
        "vision_config": {**write_vision(config.vision), **width},
        "text_config": {**write_text(config.text), **width},
    }


# --- keys ------------------------------------------------------------------------------------------------


def layers(config: TransformerConfig) -> KeyMap:
    """Of both towers, and of SigLIP's."""
    ours, theirs = "transformer.blocks.{i}", "encoder.layers.{i}"
    attention = f"{theirs}.self_attn"
    keys = {
        **pair(f"{ours}.attention_norm", f"{theirs}.layer_norm1"),
        **qkv(config, f"{ours}.attention.qkv", (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")),
        **pair(f"{ours}.attention.out", f"{attention}.out_proj"),
        **pair(f"{ours}.feed_forward_norm", f"{theirs}.layer_norm2"),
        **pair(f"{ours}.feed_forward.up", f"{theirs}.mlp.fc1"),
        **pair(f"{ours}.feed_forward.down", f"{theirs}.mlp.fc2"),
    }
    return repeat(keys, config.depth)


def vision_keys(config: VisionConfig) -> KeyMap:
    return {
        "class_embedding": one("embeddings.class_embedding"),
        "stem.weight": one("embeddings.patch_embedding.weight"),
        "position_embedding": one("embeddings.position_embedding.weight"),
        **pair("input_norm", "pre_layrnorm"),  # sic
        **layers(config.transformer),
        **pair("norm", "post_layernorm"),
    }


def text_keys(config: TextConfig) -> KeyMap:
    return {
        "token_embedding.weight": one("embeddings.token_embedding.weight"),
        "position_embedding.weight": one("embeddings.position_embedding.weight"),
        **layers(config.transformer),
        **pair("norm", "final_layer_norm"),
    }


def whole_keys(config: VLMConfig) -> KeyMap:
    return {
        **prefixed(vision_keys(config.vision), "vision.", "vision_model."),
        **prefixed(text_keys(config.text), "text.", "text_model."),
        "projection.image.weight": one("visual_projection.weight"),
        "projection.text.weight": one("text_projection.weight"),
        "projection.logit_scale": one("logit_scale"),
    }


# --- parity ----------------------------------------------------------------------------------------------


def text_inputs(theirs: Theirs, processor: Any) -> Inputs:
    """Texts that end as the checkpoint looks for it: see LEGACY_END."""
    end = theirs["eos_token_id"]
    return words(theirs, processor, end=theirs["vocab_size"] - 1 if end == LEGACY_END else end)


def whole_inputs(theirs: Theirs, processor: Any) -> Inputs:
    return {**pixels(theirs["vision_config"], processor), **text_inputs(theirs["text_config"], processor)}


def found_vision(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    tokens = model(inputs["pixel_values"])
    return {"tokens": tokens, "pooled": model.pool(tokens)}


def expected_vision(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    """Theirs norms the pooled token only."""
    outputs = model(**inputs)
    return {"tokens": model.post_layernorm(outputs.last_hidden_state), "pooled": outputs.pooler_output}


def found_text(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    tokens = run_text(model, inputs)
    return {"tokens": real(tokens, inputs), "pooled": model.pool(tokens, inputs["attention_mask"])}


def expected_text(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    outputs = model(**inputs)
    return {"tokens": real(outputs.last_hidden_state, inputs), "pooled": outputs.pooler_output}


def found_whole(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    """`logits` of every text for every picture, with a bias where the model learned one."""
    tokens = inputs["input_ids"]
    outputs = model(
        images=inputs["pixel_values"],
        tokens=tokens,
        segments=inputs.get("attention_mask", tokens.new_ones(tokens.shape)),
        positions=torch_positions(tokens),
    )
    logits = outputs.scale * outputs.text_embedding @ outputs.image_embedding.T
    logits = logits if outputs.bias is None else logits + outputs.bias
    return {"image_embedding": outputs.image_embedding, "text_embedding": outputs.text_embedding, "logits": logits}


def torch_positions(tokens: Tensor) -> Tensor:
    """[B, T] 0, 1, 2, … in every row."""
    return (tokens.new_ones(tokens.shape).cumsum(dim=1)) - 1


def expected_whole(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    outputs = model(**inputs)
    return {
        "image_embedding": outputs.image_embeds,
        "text_embedding": outputs.text_embeds,
        "logits": outputs.logits_per_text,
    }


TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
TINY_VISION = {**TOWER, "image_size": 20, "patch_size": 5}
TINY_TEXT = {**TOWER, "hidden_size": 30, "vocab_size": 31, "max_position_embeddings": 19, "eos_token_id": 30}

VISION = Family(
    "CLIPVisionModel", VisionConfig, read_vision, write_vision, vision_keys,
    pixels, found_vision, expected_vision, TINY_VISION,
    heads=(r"(visual|text)_projection\.weight", r"text_model\..*", r"logit_scale", r"classifier\..*"),
    image_processor="CLIPImageProcessorPil",
)
TEXT = Family(
    "CLIPTextModel", TextConfig, read_text, write_text, text_keys,
    text_inputs, found_text, expected_text, TINY_TEXT,
    heads=(r"(visual|text)_projection\.weight", r"vision_model\..*", r"logit_scale"),
    reserved=(LEGACY_END,),
)
WHOLE = Family(
    "CLIPModel", VLMConfig, read_whole, write_whole, whole_keys,
    whole_inputs, found_whole, expected_whole,
    {"projection_dim": 18, "vision_config": TINY_VISION, "text_config": TINY_TEXT},
    reserved=(LEGACY_END,),
    image_processor="CLIPImageProcessorPil",
)
