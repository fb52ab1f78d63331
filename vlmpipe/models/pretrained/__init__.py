"""Weights from Hugging Face: a family is a config reader and a key map, right when both models give equal outputs.

A key map says for each of our tensors which of theirs it is made of, so that whatever is left over or missing on
either side has a name. `{i}` stands for the layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.layers import TransformerConfig
from vlmpipe.models.text import TextConfig, TextModel
from vlmpipe.models.vision import VisionConfig, VisionEncoder


@dataclass(frozen=True)
class Rows:
    """Our tensor is theirs, several stacked by output row; `transpose` for GPT-2, which stores input by output."""

    names: tuple[str, ...]
    transpose: bool = False

    def merge(self, tensors: list[Tensor]) -> Tensor:
        merged = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        return merged.T if self.transpose and merged.ndim == 2 else merged


@dataclass(frozen=True)
class Family:
    """How one Hugging Face architecture becomes one of our parts."""

    build: Callable[[Mapping[str, Any]], nn.Module]
    keys: Mapping[str, Rows]


HIDDEN_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "relu": "relu",
}


def pair(ours: str, theirs: str | tuple[str, ...], transpose: bool = False, bias: bool = True) -> dict[str, Rows]:
    """Weight and bias of one layer."""
    names = (theirs,) if isinstance(theirs, str) else theirs
    kinds = ("weight", "bias") if bias else ("weight",)
    return {f"{ours}.{kind}": Rows(tuple(f"{name}.{kind}" for name in names), transpose) for kind in kinds}


def clip_layers() -> dict[str, Rows]:
    ours, theirs = "transformer.blocks.{i}", "encoder.layers.{i}"
    projections = tuple(f"{theirs}.self_attn.{name}_proj" for name in "qkv")
    return {
        **pair(f"{ours}.attention_norm", f"{theirs}.layer_norm1"),
        **pair(f"{ours}.attention.qkv", projections),
        **pair(f"{ours}.attention.out", f"{theirs}.self_attn.out_proj"),
        **pair(f"{ours}.feed_forward_norm", f"{theirs}.layer_norm2"),
        **pair(f"{ours}.feed_forward.up", f"{theirs}.mlp.fc1"),
        **pair(f"{ours}.feed_forward.down", f"{theirs}.mlp.fc2"),
    }


def clip_transformer(config: Mapping[str, Any]) -> TransformerConfig:
    return TransformerConfig(
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        hidden=config["intermediate_size"],
        norm_eps=config["layer_norm_eps"],
        activation=activation(config["hidden_act"]),
    )


def clip_vision(config: Mapping[str, Any]) -> VisionEncoder:
    return VisionEncoder(
        VisionConfig(
            clip_transformer(config),
            image_size=config["image_size"],
            patch_size=config["patch_size"],
            stem_bias=False,
            class_token=True,
            pool="class",
            input_norm=True,
        )
    )


def clip_text(config: Mapping[str, Any]) -> TextModel:
    return TextModel(
        TextConfig(clip_transformer(config), vocab_size=config["vocab_size"], context=config["max_position_embeddings"])
    )


def gpt2(config: Mapping[str, Any]) -> TextModel:
    transformer = TransformerConfig(
        width=config["n_embd"],
        depth=config["n_layer"],
        heads=config["n_head"],
        hidden=config["n_inner"] or 0,
        norm_eps=config["layer_norm_epsilon"],
        activation=activation(config["activation_function"]),
    )
    return TextModel(TextConfig(transformer, vocab_size=config["vocab_size"], context=config["n_positions"]))


def llama(config: Mapping[str, Any]) -> TextModel:
    rope = config["rope_parameters"]
    if rope["rope_type"] != "default":
        raise UserError(f"rope_type: found {rope['rope_type']!r}; expected 'default'; this scaling is not supported")
    transformer = TransformerConfig(
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        head_width=config["head_dim"],
        kv_heads=config["num_key_value_heads"],
        hidden=config["intermediate_size"],
        norm="rms",
        norm_eps=config["rms_norm_eps"],
        activation=activation(config["hidden_act"]),
        gated=True,
        bias=False,
    )
    return TextModel(
        TextConfig(
            transformer,
            vocab_size=config["vocab_size"],
            context=config["max_position_embeddings"],
            positions="rotary",
            rotary_theta=rope["rope_theta"],
        )
    )


def activation(name: str) -> str:
    if name not in HIDDEN_ACTIVATIONS:
        raise UserError(f"activation: found {name!r}; expected one of {', '.join(HIDDEN_ACTIVATIONS)}")
    return HIDDEN_ACTIVATIONS[name]


def gpt2_layers() -> dict[str, Rows]:
    ours, theirs = "transformer.blocks.{i}", "h.{i}"
    return {
        **pair(f"{ours}.attention_norm", f"{theirs}.ln_1"),
        **pair(f"{ours}.attention.qkv", f"{theirs}.attn.c_attn", transpose=True),
        **pair(f"{ours}.attention.out", f"{theirs}.attn.c_proj", transpose=True),
        **pair(f"{ours}.feed_forward_norm", f"{theirs}.ln_2"),
        **pair(f"{ours}.feed_forward.up", f"{theirs}.mlp.c_fc", transpose=True),
        **pair(f"{ours}.feed_forward.down", f"{theirs}.mlp.c_proj", transpose=True),
    }


def llama_layers() -> dict[str, Rows]:
    ours, theirs = "transformer.blocks.{i}", "layers.{i}"
    projections = tuple(f"{theirs}.self_attn.{name}_proj" for name in "qkv")
    return {
        **pair(f"{ours}.attention_norm", f"{theirs}.input_layernorm", bias=False),
        **pair(f"{ours}.attention.qkv", projections, bias=False),
        **pair(f"{ours}.attention.out", f"{theirs}.self_attn.o_proj", bias=False),
        **pair(f"{ours}.feed_forward_norm", f"{theirs}.post_attention_layernorm", bias=False),
        **pair(f"{ours}.feed_forward.gate", f"{theirs}.mlp.gate_proj", bias=False),
        **pair(f"{ours}.feed_forward.up", f"{theirs}.mlp.up_proj", bias=False),
        **pair(f"{ours}.feed_forward.down", f"{theirs}.mlp.down_proj", bias=False),
    }


FAMILIES = {
    "clip_vision_model": Family(
        clip_vision,
        {
            "class_embedding": Rows(("embeddings.class_embedding",)),
            "stem.weight": Rows(("embeddings.patch_embedding.weight",)),
            "position_embedding": Rows(("embeddings.position_embedding.weight",)),
            **pair("input_norm", "pre_layrnorm"),  # sic
            **clip_layers(),
            **pair("norm", "post_layernorm"),
        },
    ),
    "clip_text_model": Family(
        clip_text,
        {
            "token_embedding.weight": Rows(("embeddings.token_embedding.weight",)),
            "position_embedding.weight": Rows(("embeddings.position_embedding.weight",)),
            **clip_layers(),
            **pair("norm", "final_layer_norm"),
        },
    ),
    "gpt2": Family(
        gpt2,
        {
            "token_embedding.weight": Rows(("wte.weight",)),
            "position_embedding.weight": Rows(("wpe.weight",)),
            **gpt2_layers(),
            **pair("norm", "ln_f"),
        },
    ),
    "llama": Family(
        llama,
        {
            "token_embedding.weight": Rows(("embed_tokens.weight",)),
            **llama_layers(),
            **pair("norm", "norm", bias=False),
        },
    ),
}


def part_from_hugging_face(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    """Our vision encoder or text model with the weights of a Hugging Face one.

    Args:
        config: their config as a mapping; `model_type` chooses the family.
        weights: the state of their base model, without a head.

    Raises:
        UserError: an unknown family, or keys that don't map, named.
    """
    kind = config["model_type"]
    if kind not in FAMILIES:
        raise UserError(f"model_type: found {kind!r}; expected one of {', '.join(FAMILIES)}")
    model = FAMILIES[kind].build(config)
    depth = model.config.transformer.depth
    model.load_state_dict(convert(weights, expand(FAMILIES[kind].keys, depth)))
    return model.eval()


def expand(keys: Mapping[str, Rows], depth: int) -> dict[str, Rows]:
    """The key map with `{i}` written out for each layer."""
    expanded = {}
    for ours, rows in keys.items():
        for layer in range(depth) if "{i}" in ours else (0,):
            names = tuple(name.format(i=layer) for name in rows.names)
            expanded[ours.format(i=layer)] = Rows(names, rows.transpose)
    return expanded


def convert(weights: Mapping[str, Tensor], keys: Mapping[str, Rows]) -> dict[str, Tensor]:
    """Our state from theirs; nothing is skipped and nothing is left at random."""
    wanted = {name for rows in keys.values() for name in rows.names}
    missing, extra = sorted(wanted - weights.keys()), sorted(weights.keys() - wanted)
    if missing or extra:
        raise UserError(f"weights: found keys that don't map {extra[:5]} and none for {missing[:5]}; expected all")
    return {ours: rows.merge([weights[name] for name in rows.names]).clone() for ours, rows in keys.items()}
