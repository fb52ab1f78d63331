"""The families by their `model_type`, whole models and parts; where a model fits several, the first is taken."""

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
    "visual_bert": visual_bert.PRETRAINING,
    "flava": flava.WHOLE,
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
