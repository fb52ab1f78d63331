"""Masks and boxes inside the whole model: shapes, sharing of pictures, configs that are refused."""

import pytest
import torch

from tests.models.tiny import PRESETS, TEXTS, pictures
from vlmpipe.config import parse
from vlmpipe.errors import UserError
from vlmpipe.models import VLMConfig, build
from vlmpipe.models.heads import MaskConfig
from vlmpipe.models.heads.detection import PRIOR, location_bias
from vlmpipe.models.processor import stack

HEADS = {
    "projection": {"width": 16},
    "mask": {"taps": [0, 1], "width": 8, "heads": 2, "hidden": 12},
    "detection": {},
}


def make(**heads):
    config = {**PRESETS["dual"], "heads": {**HEADS, **heads}}
    model, processor = build(parse(VLMConfig, config, "test"), TEXTS)
    return model.eval(), processor


def ask(model, processor, images, phrases, **more):
    batch = stack([[processor.encode(phrase)] for phrase in phrases])
    return model(
        images=processor.images(images), **{k: batch[k] for k in ("tokens", "segments", "positions")}, **more
    )


@torch.no_grad()
def test_several_phrases_a_picture_get_what_each_gets_alone():
    model, processor = make()
    images = pictures(2)
    phrases = ["red", "a red circle above a blue square", "two"]
    together = ask(model, processor, images, phrases, image_rows=torch.tensor([0, 2]))
    assert together.masks.shape == (3, 32, 32)
    assert together.boxes.shape == (2, 16, 4)
    assert together.classes.shape == (2, 16, 2)
    for row, picture in enumerate((0, 0, 1)):
        alone = ask(model, processor, [images[picture]], [phrases[row]])
        torch.testing.assert_close(together.masks[row], alone.masks[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.classes[picture, :, row % 2], alone.classes[0, :, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.boxes[picture], alone.boxes[0], rtol=1e-4, atol=1e-5)
    assert together.classes[1, :, 1].max() == torch.finfo(torch.float32).min  # the second has one phrase only


@torch.no_grad()
def test_masks_depend_on_the_phrase():
    model, processor = make()
    outputs = ask(model, processor, pictures(1), ["red", "blue"], image_rows=torch.tensor([0]))
    assert not torch.allclose(outputs.masks[0], outputs.masks[1], atol=1e-3)


@torch.no_grad()
def test_a_picture_can_stand_for_the_phrase():
    model, processor = make()
    image, prompt = (processor.images(pictures(1, seed)) for seed in (0, 1))
    shown = model(images=image, condition=model.embed_prompt(prompt))
    assert shown.masks.shape == (1, 32, 32) and shown.text_embedding is None


@torch.no_grad()
def test_what_is_looked_for_in_half_precision():
    model, processor = make()
    images, phrases, first = pictures(2), ["red", "two", "blue"], torch.tensor([0, 1])
    full = ask(model, processor, images, phrases, image_rows=first)
    with torch.autocast("cpu", torch.bfloat16):
        half = ask(model, processor, images, phrases, image_rows=first)
    asked = full.classes > torch.finfo(full.classes.dtype).min
    assert torch.equal(half.classes > torch.finfo(half.classes.dtype).min, asked)
    for name, where in (("masks", ...), ("boxes", ...), ("classes", asked)):
        torch.testing.assert_close(getattr(half, name).float()[where], getattr(full, name)[where], rtol=0.1, atol=0.1)


@torch.no_grad()
def test_only_wanted_heads_run():
    model, processor = make()
    outputs = ask(model, processor, pictures(1), ["red"], heads=("mask",))
    assert outputs.masks is not None and outputs.boxes is None
    outputs = ask(model, processor, pictures(1), ["red", "blue"], heads=("projection",))
    assert outputs.masks is None and len(outputs.text_embedding) == 2


@torch.no_grad()
def test_a_fresh_detector_hardly_believes_and_its_boxes_stand_at_their_patches():
    model, processor = make()
    outputs = ask(model, processor, pictures(1), ["red"])
    assert outputs.classes.sigmoid().mean() < 5 * PRIOR
    model.detection.box[-1].weight.zero_()
    boxes = ask(model, processor, pictures(1), ["red"]).boxes[0].unflatten(0, (4, 4))
    torch.testing.assert_close(boxes[0, 1], torch.tensor([0.5, 0.25, 0.25, 0.25]), atol=1e-3, rtol=0)
    torch.testing.assert_close(boxes[2, 3], torch.tensor([1.0, 0.75, 0.25, 0.25]), atol=1e-3, rtol=0)


def test_location_bias_of_a_picture_that_is_wider_than_high():
    shares = location_bias((2, 4), torch.zeros(())).sigmoid()
    torch.testing.assert_close(shares[0], torch.tensor([0.25, 0.5, 0.25, 0.5]), atol=1e-3, rtol=0)


def test_masks_of_other_sizes_than_trained():
    model, processor = make(detection=None)
    batch = stack([[processor.encode("red")]])
    wide = torch.zeros(1, 3, 24, 48, dtype=torch.uint8)
    with torch.no_grad():
        outputs = model(images=wide, **{k: batch[k] for k in ("tokens", "segments", "positions")})
    assert outputs.masks.shape == (1, 24, 48)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"taps": ()}, "taps: found"),
        ({"taps": (3, 1)}, "ascending"),
        ({"film": 3}, "film: found 3; expected 0 to 2"),
        ({"width": 7}, "even width"),
    ],
)
def test_mask_configs_that_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        MaskConfig(**values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": {"patch_dropout": 0.5}}, "neither native nor patch_dropout"),
        ({"processor": {"image_size": 60}}, "image_size: found 60 with fusion 'none'"),
        ({"heads": {"projection": None}}, "expected heads.projection"),
    ],
)
def test_towers_and_sizes_that_are_refused(changes, message):
    config = {**PRESETS["dual"], "heads": HEADS, "processor": {}}
    config |= {part: {**config[part], **values} for part, values in changes.items()}
    with pytest.raises(UserError, match=message):
        parse(VLMConfig, config, "test")


def test_pictures_may_be_larger_than_those_that_the_tower_was_made_for():
    config = {**PRESETS["dual"], "heads": {**HEADS, "detection": None}, "processor": {"image_size": 48}}
    model, processor = build(parse(VLMConfig, config, "test"), TEXTS)
    assert processor.images(pictures(1)).shape[-2:] == (48, 48)
    with torch.no_grad():
        assert ask(model.eval(), processor, pictures(1), ["red"]).masks.shape == (1, 48, 48)


def test_taps_beyond_the_tower_and_heads_without_a_projection_are_refused():
    with pytest.raises(UserError, match="with 2 blocks in the picture tower"):
        make(mask={"taps": [0, 2], "width": 8, "heads": 2})
    with pytest.raises(UserError, match="fusion 'prefix'"):
        config = {**PRESETS["prefix"], "heads": {"language_model": {}, "detection": {}}}
        parse(VLMConfig, config, "test")
