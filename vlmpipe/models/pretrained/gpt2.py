"""GPT-2."""

from typing import Any

from vlmpipe.models.layers import TransformerConfig
from vlmpipe.models.pretrained.family import (
    Family,
    Names,
    Theirs,
    activation,
    expected_text,
    found_text,
    require,
    words,
)
from vlmpipe.models.pretrained.keys import KeyMap, Transpose, one, pair, repeat
from vlmpipe.models.text import TextConfig

ACTIVATION = {"gelu_tanh": "gelu_new"}


def read(theirs: Theirs, names: Names) -> TextConfig:
    require(
        theirs, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False
    )
    transformer = TransformerConfig(
        width=theirs["n_embd"],
        depth=theirs["n_layer"],
        heads=theirs["n_head"],
        hidden=theirs["n_inner"] or 4 * theirs["n_embd"],
        norm_eps=theirs["layer_norm_epsilon"],
        activation=activation(theirs["activation_function"]),
    )
    return TextConfig(transformer, vocab_size=theirs["vocab_size"], context=theirs["n_positions"])


def write(config: TextConfig) -> dict[str, Any]:
    transformer = config.transformer
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.context,
        "n_embd": transformer.width,
        "n_layer": transformer.depth,
        "n_head": transformer.heads,
        "n_inner": transformer.hidden or 4 * transformer.width,
        "layer_norm_epsilon": transformer.norm_eps,
        "activation_function": ACTIVATION.get(transformer.activation, transformer.activation),
    }


def keys(config: TextConfig) -> KeyMap:
    ours, theirs, turned = "transformer.blocks.{i}", "h.{i}", Transpose()
    layer = {
        **pair(f"{ours}.attention_norm", f"{theirs}.ln_1"),
        **pair(f"{ours}.attention.qkv", f"{theirs}.attn.c_attn", turned),
        **pair(f"{ours}.attention.out", f"{theirs}.attn.c_proj", turned),
        **pair(f"{ours}.feed_forward_norm", f"{theirs}.ln_2"),
        **pair(f"{ours}.feed_forward.up", f"{theirs}.mlp.c_fc", turned),
        **pair(f"{ours}.feed_forward.down", f"{theirs}.mlp.c_proj", turned),
    }
    return {
        "token_embedding.weight": one("wte.weight"),
        "position_embedding.weight": one("wpe.weight"),
        **repeat(layer, config.transformer.depth),
        **pair("norm", "ln_f"),
    }


GPT2 = Family(
    "GPT2Model", TextConfig, read, write, keys, words, found_text, expected_text,
    {"vocab_size": 31, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 19},
    # Old files hold constants of the causal mask.
    heads=(r"(.*\.)?h\.\d+\.attn\.masked_bias", r"lm_head\.weight", r"score\.weight", r"multiple_choice_head\..*"),
)
