"""Llama (arXiv 2302.13971) and what is Llama but for a detail: SmolLM, Qwen2, Qwen3, SmolLM3."""

from dataclasses import replace
from typing import Any

from vlmpipe.errors import UserError
from vlmpipe.models.layers import TransformerConfig
from vlmpipe.models.pretrained.family import (
    Family,
    Names,
    Theirs,
    activation,
    activation_name,
    expected_text,
    found_text,
    qkv,
    require,
    words,
)
from vlmpipe.models.pretrained.keys import KeyMap, one, pair, repeat
from vlmpipe.models.text import TextConfig

PLAIN_ROPE = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}


def read_rope(theirs: Theirs) -> float:
    """The base of the rotary frequencies; scaled ones (yarn, llama3, …) are refused."""
    rope = theirs["rope_parameters"]
    require(rope, **PLAIN_ROPE)
    unknown = sorted(rope.keys() - PLAIN_ROPE.keys() - {"rope_theta", "mrope_section"})
    if unknown:
        raise UserError(f"rope_parameters: found {', '.join(unknown)}; expected unscaled rotary positions")
    return float(rope["rope_theta"])


def read_transformer(theirs: Theirs) -> TransformerConfig:
    heads = theirs["num_attention_heads"]
    return TransformerConfig(
        width=theirs["hidden_size"],
        depth=theirs["num_hidden_layers"],
        heads=heads,
        head_width=theirs.get("head_dim") or theirs["hidden_size"] // heads,
        kv_heads=theirs["num_key_value_heads"],
        hidden=theirs["intermediate_size"],
        norm="rms",
        norm_eps=theirs["rms_norm_eps"],
        activation=activation(theirs["hidden_act"]),
        gated=True,
        bias=False,
    )


def read_text(theirs: Theirs, transformer: TransformerConfig) -> TextConfig:
    return TextConfig(
        transformer,
        vocab_size=theirs["vocab_size"],
        context=theirs["max_position_embeddings"],
        positions="rotary",
        rotary_theta=read_rope(theirs),
    )


def read_llama(theirs: Theirs, names: Names = frozenset()) -> TextConfig:
    bias = theirs["attention_bias"]
    require(theirs, mlp_bias=bias)
    return read_text(theirs, replace(read_transformer(theirs), bias=bias))


def read_qwen2(theirs: Theirs, names: Names = frozenset()) -> TextConfig:
    """Biases on queries, keys and values alone."""
    refuse_windows(theirs)
    return read_text(theirs, replace(read_transformer(theirs), qkv_bias=True))


def read_qwen3(theirs: Theirs, names: Names = frozenset()) -> TextConfig:
    """Norms of each query and key."""
    refuse_windows(theirs)
    require(theirs, attention_bias=False)
    return read_text(theirs, replace(read_transformer(theirs), head_norm=True))


def read_smollm3(theirs: Theirs, names: Names = frozenset()) -> TextConfig:
    """Layers without positions (NoPE), regularly."""
    refuse_windows(theirs)
    require(theirs, attention_bias=False, mlp_bias=False)
    turned = [bool(each) for each in theirs["no_rope_layers"][: theirs["num_hidden_layers"]]]
    every = turned.index(False) + 1 if False in turned else 0
    if turned != [not every or (layer + 1) % every != 0 for layer in range(len(turned))]:
        raise UserError(f"no_rope_layers: found {theirs['no_rope_layers']}; expected every n-th layer")
    return read_text(theirs, replace(read_transformer(theirs), unturned=every))


def refuse_windows(theirs: Theirs) -> None:
    windows = sorted(set(theirs.get("layer_types") or ()) - {"full_attention"})
    if windows:
        raise UserError(f"layer_types: found {', '.join(windows)}; expected full_attention in every layer")


def write_llama(config: TextConfig) -> dict[str, Any]:
    """What all of them have; their configs ignore the rest."""
    transformer = config.transformer
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "hidden_size": transformer.width,
        "num_hidden_layers": transformer.depth,
        "num_attention_heads": transformer.heads,
        "num_key_value_heads": transformer.kv_heads or transformer.heads,
        "head_dim": transformer.per_head,
        "intermediate_size": transformer.hidden or 4 * transformer.width,
        "rms_norm_eps": transformer.norm_eps,
        "hidden_act": activation_name(transformer.activation),
        "attention_bias": transformer.bias,
        "mlp_bias": transformer.bias,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_theta},
    }


def write_smollm3(config: TextConfig) -> dict[str, Any]:
    every, depth = config.transformer.unturned, config.transformer.depth
    turned = [int(not every or (layer + 1) % every != 0) for layer in range(depth)]
    return {**write_llama(config), "no_rope_layers": turned, "no_rope_layer_interval": every or depth + 1}


def keys(config: TextConfig) -> KeyMap:
    ours, theirs = "transformer.blocks.{i}", "layers.{i}"
    transformer, attention = config.transformer, f"{theirs}.self_attn"
    bias = transformer.bias
    qkv_bias = bias if transformer.qkv_bias is None else transformer.qkv_bias
    names = (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")
    layer = {
        **pair(f"{ours}.attention_norm", f"{theirs}.input_layernorm", bias=False),
        **qkv(transformer, f"{ours}.attention.qkv", names, bias=qkv_bias),
        **pair(f"{ours}.attention.out", f"{attention}.o_proj", bias=bias),
        **pair(f"{ours}.feed_forward_norm", f"{theirs}.post_attention_layernorm", bias=False),
        **pair(f"{ours}.feed_forward.gate", f"{theirs}.mlp.gate_proj", bias=bias),
        **pair(f"{ours}.feed_forward.up", f"{theirs}.mlp.up_proj", bias=bias),
        **pair(f"{ours}.feed_forward.down", f"{theirs}.mlp.down_proj", bias=bias),
    }
    if transformer.head_norm:
        layer |= pair(f"{ours}.attention.query_norm", f"{attention}.q_norm", bias=False)
        layer |= pair(f"{ours}.attention.key_norm", f"{attention}.k_norm", bias=False)
    return {
        "token_embedding.weight": one("embed_tokens.weight"),
        **repeat(layer, transformer.depth),
        **pair("norm", "norm", bias=False),
    }


HEADS = (r"lm_head\.weight", r"score\.weight")


TINY = {
    "vocab_size": 31, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 19, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}


def family(architecture: str, read: Any, write: Any = write_llama, **tiny: Any) -> Family:
    found = (words, found_text, expected_text)
    return Family(architecture, TextConfig, read, write, keys, *found, {**TINY, **tiny}, heads=HEADS)


LLAMA = family("LlamaModel", read_llama)
QWEN2 = family("Qwen2Model", read_qwen2)
QWEN3 = family("Qwen3Model", read_qwen3, head_dim=6)
SMOLLM3 = family("SmolLM3Model", read_smollm3, write_smollm3, no_rope_layer_interval=2)
