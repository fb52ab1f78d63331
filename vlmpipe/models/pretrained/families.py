"""The families by their `model_type`, whole models and parts; where a model fits several, the first is taken.

Where several classes of theirs share a `model_type`, the names of all but the first go on after a dot.
"""

from collections.abc import Mapping
from typing import Any

from vlmpipe.errors import UserError
from vlmpipe.models.pretrained import (
    bert,
    clip,
    clipseg,
    flava,
    gpt2,
    llama,
    llava,
    owlvit,
    qwen25_vl,
    resnet,
    siglip,
    vilt,
    visual_bert,
    vit,
)
from vlmpipe.models.pretrained.family import Family

FAMILIES: dict[str, Family] = {
    # whole models
    "clipseg": clipseg.WHOLE,
    "owlvit": owlvit.WHOLE,
    "clip": clip.WHOLE,
    "siglip": siglip.WHOLE,
    "llava": llava.LLAVA,
    "qwen2_5_vl": qwen25_vl.QWEN25_VL,
    "vilt": vilt.MASKED_TEXT,
    "vilt.answers": vilt.ANSWERS,
    "vilt.statement": vilt.STATEMENT,
    "visual_bert": visual_bert.PRETRAINING,
    "visual_bert.answers": visual_bert.ANSWERS,
    "flava": flava.WHOLE,
    "flava.body": flava.BODY,
    # vision
    "clip_vision_model": clip.VISION,
    "siglip_vision_model": siglip.VISION,
    "vit": vit.VIT,
    "resnet": resnet.RESNET,
    # text
    "bert": bert.BERT,
    "gpt2": gpt2.GPT2,
    "clip_text_model": clip.TEXT,
    "llama": llama.LLAMA,  # SmolLM and SmolLM2 too
    "qwen2": llama.QWEN2,
    "qwen3": llama.QWEN3,
    "smollm3": llama.SMOLLM3,
}


def model_type(kind: str) -> str:
    """Theirs, of a name in FAMILIES."""
    return kind.partition(".")[0]


def kind_of(theirs: Mapping[str, Any]) -> str:
    """The name in FAMILIES of their config: of the class that it was saved from, else the first of its type.

    Raises:
        UserError: there is none.
    """
    for kind, family in FAMILIES.items():
        if model_type(kind) == theirs["model_type"] and family.architecture in (theirs.get("architectures") or ()):
            return kind
    if theirs["model_type"] not in FAMILIES:
        known = dict.fromkeys(map(model_type, FAMILIES))
        raise UserError(f"model_type: found {theirs['model_type']!r}; expected one of {', '.join(known)}")
    return theirs["model_type"]
