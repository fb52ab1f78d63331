"""BERT (arXiv 1810.04805), with its pooler where the checkpoint has one."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlmpipe.models.layers import TransformerConfig
from vlmpipe.models.pretrained import clip
from vlmpipe.models.pretrained.family import (
    Family,
    Inputs,
    Names,
    Theirs,
    qkv,
    real,
    require,
    run_text,
    words,
)
from vlmpipe.models.pretrained.keys import KeyMap, one, pair, repeat
from vlmpipe.models.text import TextConfig


def read(theirs: Theirs, names: Names) -> TextConfig:
    require(theirs, is_decoder=False, add_cross_attention=False)
    transformer = replace(clip.read_transformer(theirs), norm_place="post")
    return text_config(theirs, transformer, pooler="pooler.dense.weight" in names)


def text_config(theirs: Theirs, transformer: TransformerConfig, pooler: bool) -> TextConfig:
    """BERT's embeddings and pooling around `transformer`, as others have them too."""
    return TextConfig(
        transformer,
        vocab_size=theirs["vocab_size"],
        context=theirs["max_position_embeddings"],
        causal=False,
        embedding_norm=True,
        token_types=theirs["type_vocab_size"],
        pool="first",
        pooler=pooler,
    )


def write(config: TextConfig) -> dict[str, Any]:
    return {**clip.write_text(config), "type_vocab_size": config.token_types}


def layers(config: TransformerConfig, theirs: str = "encoder.layer.{i}") -> KeyMap:
    """Norms come after what they norm; others that are BERT inside keep these names."""
    ours, attention = "transformer.blocks.{i}", f"{theirs}.attention.self"
    keys = {
        **qkv(config, f"{ours}.attention.qkv", (f"{attention}.query", f"{attention}.key", f"{attention}.value")),
        **pair(f"{ours}.attention.out", f"{theirs}.attention.output.dense"),
        **pair(f"{ours}.attention_norm", f"{theirs}.attention.output.LayerNorm"),
        **pair(f"{ours}.feed_forward.up", f"{theirs}.intermediate.dense"),
        **pair(f"{ours}.feed_forward.down", f"{theirs}.output.dense"),
        **pair(f"{ours}.feed_forward_norm", f"{theirs}.output.LayerNorm"),
    }
    return repeat(keys, config.depth)


def keys(config: TextConfig) -> KeyMap:
    return {
        "token_embedding.weight": one("embeddings.word_embeddings.weight"),
        "position_embedding.weight": one("embeddings.position_embeddings.weight"),
        "type_embedding.weight": one("embeddings.token_type_embeddings.weight"),
        **pair("embedding_norm", "embeddings.LayerNorm"),
        **layers(config.transformer),
        **(pair("pooler", "pooler.dense") if config.pooler else {}),
    }


def inputs(theirs: Theirs, processor: Any) -> Inputs:
    """With the second half of each row as a second sentence."""
    found = words(theirs, processor)
    places = torch.arange(found["input_ids"].shape[1])
    types = (places >= len(places) // 2).long() * min(1, theirs["type_vocab_size"] - 1)
    return {**found, "token_type_ids": types.expand_as(found["input_ids"])}


def found(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    tokens = run_text(model, inputs)
    pooled = {"pooled": model.pool(tokens, inputs["attention_mask"])} if model.config.pooler else {}
    return {"tokens": real(tokens, inputs), **pooled}


def expected(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    outputs = model(**inputs)
    pooled = {} if model.pooler is None else {"pooled": outputs.pooler_output}
    return {"tokens": real(outputs.last_hidden_state, inputs), **pooled}


BERT = Family(
    "BertModel", TextConfig, read, write, keys, inputs, found, expected,
    {**clip.TOWER, "vocab_size": 31, "max_position_embeddings": 19},
    heads=(r"cls\..*", r"classifier\..*", r"qa_outputs\..*"),
    optional=("pooler",),
)
