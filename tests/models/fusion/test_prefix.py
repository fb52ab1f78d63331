"""The prefix's projectors against those of transformers."""

import pytest
import torch
import transformers
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from tests.models.tiny import PRESETS
from vlmpipe.config import parse
from vlmpipe.models import VLMConfig
from vlmpipe.models.fusion import Prefix


@pytest.mark.parametrize("merge", [2, 4])
def test_merged_tokens_are_smolvlms_pixel_shuffle(merge):
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 4, "transformer": {"width": 6, "depth": 1, "heads": 1}}
    fusion = {"kind": "prefix", "projector": "linear", "merge": merge}
    ours = Prefix(parse(VLMConfig, {**PRESETS["prefix"], "vision": vision, "fusion": fusion}, "model"))
    theirs = Idefics3Connector(
        transformers.Idefics3Config(
            vision_config={"hidden_size": 6}, text_config={"hidden_size": 32, "vocab_size": 9, "pad_token_id": 0},
            scale_factor=merge,
        )
    )
    with torch.no_grad():
        ours.projector.bias.zero_()
        ours.projector.weight.copy_(theirs.modality_projection.proj.weight)
    tokens = torch.randn(2, 64, 6)
    torch.testing.assert_close(ours.project(tokens), theirs(tokens), rtol=1e-5, atol=1e-6)
