"""Small models, the same for every test here."""

import numpy as np
import torch
from PIL import Image

from vlmpipe.config import parse
from vlmpipe.models import VLMConfig, build

TEXTS = ["a red circle above a blue square", "what color is the circle? red", "how many shapes are there? two"]
TRANSFORMER = {"width": 32, "depth": 2, "heads": 4, "hidden": 48}
VISION = {"image_size": 32, "patch_size": 8, "stem": "conv", "stem_width": 8, "transformer": TRANSFORMER}
PRESETS = {
    "prefix": {
        "vision": VISION,
        "text": {"context": 48, "transformer": TRANSFORMER},
        "fusion": {"kind": "prefix", "merge": 2, "attention": "full"},
        "heads": {"language_model": {}},
    },
    "dual": {
        "vision": VISION,
        "text": {"context": 32, "causal": False, "pool": "mean", "transformer": TRANSFORMER},
        "fusion": {"kind": "none"},
        "heads": {"projection": {"width": 16}},
    },
}


def make(preset: str, seed: int = 0):
    """(model in eval mode, processor), with weights larger than at the start of training so that everything shows."""
    model, processor = build(parse(VLMConfig, PRESETS[preset], preset), TEXTS, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    processor.answers = ("red", "blue", "two") if preset == "dual" else ()
    return model.eval(), processor


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (40, 56, 3), np.uint8)) for _ in range(count)]
