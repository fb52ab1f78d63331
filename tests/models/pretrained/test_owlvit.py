"""OWL-ViT beyond the table of families: other sizes, other numbers of queries, its feature map, what it refuses."""

import pytest
import torch

from vlmpipe.errors import UserError
from vlmpipe.models.heads import DetectionConfig
from vlmpipe.models.parity import random_module
from vlmpipe.models.pretrained import FAMILIES, convert, to_huggingface

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def both(**changes):
    config, theirs = random_module("owlvit", **changes)
    return convert(config.to_dict(), theirs.state_dict()), theirs, FAMILIES["owlvit"].inputs(config.to_dict(), None)


def ask(ours, inputs, pictures, rows):
    tokens = inputs["input_ids"]
    return ours(
        images=pictures, tokens=tokens, segments=inputs["attention_mask"],
        positions=torch.arange(tokens.shape[1]).expand_as(tokens), image_rows=torch.tensor(rows), heads=("detection",),
    )


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def test_three_queries_a_picture_and_larger_pictures():
    ours, theirs, inputs = both()
    inputs["input_ids"][3, 0] = 5  # all six are queries
    pictures = torch.randn(2, 3, 30, 30)
    found = ask(ours, inputs, pictures, [0, 3])
    expected = theirs(**{**inputs, "pixel_values": pictures}, interpolate_pos_encoding=True)
    assert found.classes.shape == (2, 36, 3)
    assert relative(found.classes, expected.logits) <= TOLERANCE
    assert relative(found.boxes, expected.pred_boxes) <= TOLERANCE


@torch.no_grad()
def test_what_boxes_are_read_from_equals_their_feature_map():
    ours, theirs, inputs = both()
    pixels = inputs["pixel_values"]
    tokens = ours.vision(pixels)
    found = ours.detection.norm(ours.vision.patches(tokens) * ours.vision.pool(tokens)[:, None])
    expected, _ = theirs.image_embedder(pixels)
    assert relative(found, expected.flatten(1, 2)) <= TOLERANCE


def test_what_it_cannot_be():
    with pytest.raises(UserError, match="projection_dim: found 18 with texts of width 30"):
        both(projection_dim=18)


def test_a_detector_without_location_bias_has_no_place_there(tmp_path):
    ours, _, _ = both()
    heads = ours.config.heads
    object.__setattr__(heads, "detection", DetectionConfig(location_bias=False))
    with pytest.raises(UserError, match="expected one with location_bias"):
        to_huggingface(ours, None, tmp_path, kind="owlvit")
