"""OWL-ViT (arXiv 2205.06230): CLIP whose patches say where things are and which text names them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.heads import DetectionConfig
from vlmpipe.models.pretrained import clip
from vlmpipe.models.pretrained.family import Family, Inputs, Names, Theirs, pixels, words
from vlmpipe.models.pretrained.keys import KeyMap, one, pair, prefixed
from vlmpipe.models.vlm import VLMConfig


def read(theirs: Theirs, names: Names = frozenset()) -> VLMConfig:
    width, text_width = theirs["projection_dim"], theirs["text_config"]["hidden_size"]
    if width != text_width:
        raise UserError(
            f"projection_dim: found {width} with texts of width {text_width}; expected the same, for the class head "
            f"compares both"
        )
    base = clip.read_whole(theirs)
    return replace(base, heads=replace(base.heads, detection=DetectionConfig()))


def write(config: VLMConfig) -> dict[str, Any]:
    detection, width = config.heads.detection, config.text.transformer.width
    if detection is None or not detection.location_bias:
        raise UserError(f"heads.detection: found {detection}; expected one with location_bias, as OWL-ViT has")
    whole = clip.write_whole(config)
    if whole["projection_dim"] != width:
        raise UserError(
            f"heads.projection.width: found {whole['projection_dim']}; expected {width}, the text's, as OWL-ViT has it"
        )
    return whole


def keys(config: VLMConfig) -> KeyMap:
    towers = {**clip.whole_keys(config), **prefixed(pair("input_norm", "pre_layernorm"), "vision.", "vision_model.")}
    head = {
        **pair("norm", "layer_norm"),
        **pair("query", "class_head.dense0"),
        "shift.weight": one("class_head.logit_shift.weight"),
        "shift_bias": one("class_head.logit_shift.bias"),
        **pair("scale", "class_head.logit_scale"),
    }
    for ours, theirs in ((0, 0), (2, 1), (4, 2)):
        head |= pair(f"box.{ours}", f"box_head.dense{theirs}")
    return {**prefixed(towers, "", "owlvit."), **prefixed(head, "detection.")}


def inputs(theirs: Theirs, processor: Any) -> Inputs:
    """Three pictures of two queries each; the middle one's second is none, which theirs sees by a first token of 0."""
    text = theirs["text_config"]
    rows = words(text, processor, end=text["vocab_size"] - 1)
    doubled = {name: torch.cat([tensor, tensor.flip(0)]) for name, tensor in rows.items()}
    doubled["input_ids"][3, 0] = 0
    return {**pixels(theirs["vision_config"], processor), **doubled}


def found(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    """Of the real queries alone."""
    pictures, real_B = inputs["pixel_values"], real(inputs)
    count_n = real_B.unflatten(0, (len(pictures), -1)).sum(dim=1)
    tokens = inputs["input_ids"][real_B]
    outputs = model(
        images=pictures, tokens=tokens, segments=inputs["attention_mask"][real_B],
        positions=clip.torch_positions(tokens), image_rows=count_n.cumsum(0) - count_n,
    )
    logits = outputs.scale * outputs.text_embedding @ outputs.image_embedding.T
    return {
        "boxes": outputs.boxes, "classes": asked(outputs.classes), "logits": logits,
        "image_embedding": outputs.image_embedding, "text_embedding": outputs.text_embedding,
    }


def expected(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    real_B, outputs = real(inputs), model(**inputs)
    whole = clip.expected_whole(model.owlvit, inputs)
    return {
        "boxes": outputs.pred_boxes, "classes": asked(outputs.logits), "logits": whole["logits"][real_B],
        "image_embedding": whole["image_embedding"], "text_embedding": whole["text_embedding"][real_B],
    }


def real(inputs: Inputs) -> Tensor:
    """[B] which rows are queries, as theirs tells them."""
    return inputs["input_ids"][:, 0] > 0


def asked(classes: Tensor) -> Tensor:
    """Zero where a picture has fewer queries than others."""
    return classes.masked_fill(classes == torch.finfo(classes.dtype).min, 0)


WHOLE = Family(
    "OwlViTForObjectDetection", VLMConfig, read, write, keys,
    inputs, found, expected,
    {
        "projection_dim": 30, "vision_config": clip.TINY_VISION,
        "text_config": {**clip.TINY_TEXT, "max_position_embeddings": 16},
    },
    image_processor="OwlViTImageProcessorPil",
)
