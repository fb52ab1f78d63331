"""CLIPSeg at its published size."""

from pathlib import Path

import torch
import transformers
import yaml

from vlmpipe.config import parse
from vlmpipe.models import VisionLanguageModel, VLMConfig
from vlmpipe.models.heads import Mask, MaskConfig

CONFIGS = Path(__file__).parents[3] / "configs/model"


def config(name):
    return parse(VLMConfig, yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["architecture"], name)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_it_has_the_parameters_of_the_released_one():
    with torch.device("meta"):
        model = VisionLanguageModel(config("clipseg-rd64"))
        # The settings of CIDAS/clipseg-rd64-refined; all others are the class's defaults.
        theirs = transformers.CLIPSegForImageSegmentation(
            transformers.CLIPSegConfig(
                reduce_dim=64, extract_layers=[3, 6, 9], use_complex_transposed_convolution=True,
                vision_config={"patch_size": 16},
            )
        )
    assert count(model) == count(theirs)
    assert count(model.mask) == count(theirs.decoder) == 1_127_009


def test_the_simple_decoder_has_the_parameters_that_the_paper_counts():
    """Section 4: 1,122,305 trainable parameters for D = 64, which is with the patches of ViT-B/32."""
    vision = parse(VLMConfig, {
        "vision": {"patch_size": 32, "transformer": {"width": 768, "depth": 12, "heads": 12}},
        "text": {"transformer": {"width": 512, "depth": 12, "heads": 8}},
        "fusion": {"kind": "none"}, "heads": {"projection": {"width": 512}},
    }, "paper").vision
    with torch.device("meta"):
        assert count(Mask(MaskConfig(upsample="simple"), vision, 512)) == 1_122_305


def test_the_small_one_parses_and_gives_a_mask_of_every_pixel():
    small = config("clipseg").with_vocab(64)
    model = VisionLanguageModel(small).eval()
    assert 0.9e6 < count(model) < 2e6
    words = {"tokens": torch.ones(1, 3, dtype=torch.int64)}
    words |= {"segments": words["tokens"], "positions": torch.arange(3)[None]}
    with torch.no_grad():
        assert model(images=torch.zeros(1, 3, 64, 64), **words).masks.shape == (1, 64, 64)
