"""Small models in which words and pictures meet, the same for every test of them."""

import torch

from tests.models.tiny import TEXTS, TRANSFORMER, VISION, pictures
from vlmpipe.config import parse
from vlmpipe.models import VLMConfig, build
from vlmpipe.models.processor import stack

POST = {**TRANSFORMER, "norm_place": "post"}
TEXT = {"context": 32, "causal": False, "pool": "first", "pooler": True, "embedding_norm": True, "token_types": 2}
PLAIN = {**VISION, "stem": "patch", "class_token": True, "pool": "class", "mask_token": True}
STEM = {**PLAIN, "transformer": {**TRANSFORMER, "depth": 0}, "final_norm": False, "interpolation": "bilinear"}
FUSIONS = {
    "single_stream": {"vision": STEM, "text": {**TEXT, "transformer": TRANSFORMER}, "fusion": {"types": 3}},
    "co_attention": {
        "vision": PLAIN, "text": {**TEXT, "transformer": POST},
        "fusion": {"image": {**POST, "width": 24}, "depth": 1, "heads": 2, "width": 16},
    },
    "multimodal": {
        "vision": PLAIN, "text": {**TEXT, "pooler": False, "transformer": TRANSFORMER},
        "fusion": {"transformer": {**TRANSFORMER, "width": 40}},
    },
}
HEADS = {
    "masked_text": {"tied": False},
    "matching": {},
    "masked_image": {},
    "answers": {"classes": 7, "hidden": 20},
    "statement": {"pictures": 2, "hidden": 24},
}


def make(kind: str, seed: int = 0, vision: dict | None = None, **heads):
    """(model in eval mode, processor), with weights larger than at the start of training so that everything shows."""
    shape = {**FUSIONS[kind], **({"vision": vision} if vision else {})}
    heads = {**HEADS, **({"projection": {"width": 16}} if kind == "multimodal" else {}), **heads}
    config = {**shape, "fusion": {"kind": kind, kind: shape["fusion"]}, "heads": heads}
    model, processor = build(parse(VLMConfig, config, kind), TEXTS, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval(), processor


WORDS = ["a red circle", "a blue square above a red circle", "two shapes", "how many shapes are there? two"]


def batch(processor, rows: int = 4, images: int = 4):
    """Texts of several lengths, a picture each."""
    found = {"images": processor.images(pictures(images)), **stack([[processor.encode(text)] for text in WORDS[:rows]])}
    return {name: found[name] for name in ("images", "tokens", "segments", "positions")}
