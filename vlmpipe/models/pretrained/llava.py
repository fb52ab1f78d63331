"""LLaVA (arXiv 2304.08485, 2310.03744): a CLIP or SigLIP tower, two layers, and Llama or what is like it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.fusion import FusionConfig
from vlmpipe.models.heads import HeadsConfig, LanguageModelConfig
from vlmpipe.models.pretrained import clip, llama, siglip
from vlmpipe.models.pretrained.family import Family, Inputs, Names, Theirs, pixels, require
from vlmpipe.models.pretrained.keys import KeyMap, one, pair, prefixed
from vlmpipe.models.text import TextConfig
from vlmpipe.models.vision import VisionConfig
from vlmpipe.models.vlm import VLMConfig

TOWERS = {"clip_vision_model": clip.VISION, "siglip_vision_model": siglip.VISION}
LANGUAGES = {"llama": llama.LLAMA, "qwen2": llama.QWEN2, "qwen3": llama.QWEN3}


def member(table: dict[str, Family], kind: str, name: str) -> Family:
    if kind not in table:
        raise UserError(f"{name}.model_type: found {kind!r}; expected one of {', '.join(table)}")
    return table[kind]


def tower_of(config: VisionConfig) -> str:
    return "clip_vision_model" if config.class_token else "siglip_vision_model"


def language_of(config: TextConfig) -> str:
    if config.positions != "rotary" or config.rotary_sections:
        raise UserError("text: found other positions than plain rotary ones; expected a model like Llama")
    if config.transformer.head_norm:
        return "qwen3"
    return "qwen2" if config.transformer.qkv_bias and not config.transformer.bias else "llama"


def read_tower(theirs: Theirs) -> VisionConfig:
    """The tower, whose tokens are the output of the block that `vision_feature_layer` counts to."""
    kind = theirs["vision_config"]["model_type"]
    config = member(TOWERS, kind, "vision_config").read(theirs["vision_config"], frozenset())
    layer = theirs["vision_feature_layer"]
    if not isinstance(layer, int):
        raise UserError(f"vision_feature_layer: found {layer}; expected one layer")
    layer = layer if layer < 0 else layer - config.transformer.depth - 1
    if layer == -1:
        raise UserError("vision_feature_layer: found the last one; expected an earlier one, such as -2")
    require(theirs, vision_feature_select_strategy="default" if config.class_token else "full")
    return replace(config, layer=layer)


def read(theirs: Theirs, names: Names = frozenset()) -> VLMConfig:
    require(theirs, projector_hidden_act="gelu", multimodal_projector_bias=True)
    text = theirs["text_config"]
    return VLMConfig(
        vision=read_tower(theirs),
        text=member(LANGUAGES, text["model_type"], "text_config").read(text, frozenset()),
        fusion=FusionConfig("prefix", projector="mlp"),
        heads=HeadsConfig(language_model=LanguageModelConfig(tied=theirs["tie_word_embeddings"])),
    )


def write(config: VLMConfig) -> dict[str, Any]:
    if config.fusion.kind != "prefix" or config.vision.transformer is None or config.heads.language_model is None:
        raise UserError("model: found no vision transformer before a language model; expected fusion 'prefix'")
    tower, language = tower_of(config.vision), language_of(config.text)
    return {
        "vision_config": {"model_type": tower, **TOWERS[tower].write(config.vision)},
        "text_config": {"model_type": language, **LANGUAGES[language].write(config.text)},
        "vision_feature_layer": config.vision.layer,
        "vision_feature_select_strategy": "default" if config.vision.class_token else "full",
        "image_seq_length": config.vision.side**2,
        "tie_word_embeddings": config.heads.language_model.tied,
    }


def keys(config: VLMConfig) -> KeyMap:
    tower, language = TOWERS[tower_of(config.vision)], LANGUAGES[language_of(config.text)]
    found = {
        **prefixed(tower.keys(config.vision), "vision.", "model.vision_tower."),
        **prefixed(language.keys(config.text), "text.", "model.language_model."),
        **pair("fusion.projector.0", "model.multi_modal_projector.linear_1"),
        **pair("fusion.projector.2", "model.multi_modal_projector.linear_2"),
    }
    if not config.heads.language_model.tied:
        found["language_model.output.weight"] = one("lm_head.weight")
    return found


# --- parity ----------------------------------------------------------------------------------------------


def inputs(theirs: Theirs, processor: Any) -> Inputs:
    """Rows with a picture, with none and with two, padded on the right."""
    given = pixels(theirs["vision_config"], processor)
    vision = theirs["vision_config"]
    count = (vision["image_size"] // vision["patch_size"]) ** 2
    mark, vocabulary = theirs["image_token_index"], theirs["text_config"]["vocab_size"]

    def said(length: int) -> Tensor:
        tokens = torch.randint(3, vocabulary - 2, (length,))
        return torch.where(tokens == mark, 3, tokens)

    picture = torch.full((count,), mark)
    rows = [
        torch.cat([said(2), picture, said(4)]), said(5), torch.cat([said(1), picture, said(1), picture, said(3)]),
    ]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    real = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return {**given, "input_ids": tokens, "attention_mask": real.long()}


def found(model: Any, given: Inputs) -> dict[str, Tensor]:
    tokens, real = given["input_ids"], given["attention_mask"]
    places = tokens == model.huggingface["image_token_index"]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    outputs = model(given["pixel_values"], tokens, real, positions, image_places=places)
    return {"logits": outputs.logits[real.bool()]}


def expected(model: Any, given: Inputs) -> dict[str, Tensor]:
    return {"logits": model(**given).logits[given["attention_mask"].bool()]}


TINY = {
    "image_token_index": 5,
    "vision_config": {"model_type": "clip_vision_model", **clip.TINY_VISION, "num_hidden_layers": 3},
    "text_config": {"model_type": "llama", **llama.TINY, "max_position_embeddings": 64},
}

LLAVA = Family(
    "LlavaForConditionalGeneration", VLMConfig, read, write, keys, inputs, found, expected, TINY,
    ignored=(r"lm_head\.weight",), image_processor="CLIPImageProcessorPil",
)
