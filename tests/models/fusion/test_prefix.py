"""The prefix's projectors against those of transformers."""

import pytest
import torch
import transformers
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from tests.models.tiny import PRESETS
from vlmpipe.config import parse
from vlmpipe.models import VLMConfig
from vlmpipe.models.fusion import Prefix
from vlmpipe.models.fusion.prefix import put


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


def row(device="cpu"):
    places = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1]], device=device).bool()
    return torch.randn(2, 4, 3, device=device, requires_grad=True), places


def test_image_tokens_stand_in_their_places():
    torch.manual_seed(0)
    x, places = row()
    seen = torch.randn(1, 5, 3, requires_grad=True)
    found, expected = put(x, places, seen), x.masked_scatter(places[..., None], seen)
    assert torch.equal(found, expected)
    weight = torch.randn(found.shape)
    gradients = (torch.autograd.grad(rows, (x, seen), weight) for rows in (found, expected))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_placing_image_tokens_looks_at_no_number():
    """A GPU would be waited for; a tensor of the meta device has none to look at."""
    x, places = row("meta")
    seen = torch.randn(5, 3, device="meta", requires_grad=True)
    put(x, places, seen).sum().backward()
    assert seen.grad.shape == (5, 3) and x.grad.shape == x.shape
