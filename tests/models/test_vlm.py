"""The composed model: who sees whom, what packing changes (nothing), what configs refuse."""

import dataclasses
import math

import pytest
import torch

from tests.models.tiny import PRESETS, make, pictures
from vlmpipe.config import parse
from vlmpipe.errors import UserError
from vlmpipe.models import VisionLanguageModel, VLMConfig
from vlmpipe.models.fusion import Prefix
from vlmpipe.models.processor import stack
from vlmpipe.models.text import SHARED, visible
from vlmpipe.models.vision import sine_cosine_2d

INPUTS = ("tokens", "segments", "positions")


def inputs(rows):
    batch = stack(rows)
    return {name: batch[name] for name in INPUTS}


def test_visible_spelled_out():
    segments = torch.tensor([[SHARED, SHARED, 1, 1, 2, 0]])
    found = visible(segments, segments, causal=True)[0, 0].int().tolist()
    assert found == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert visible(segments, segments, causal=True, full_prefix=True)[0, 0, 0, :3].tolist() == [True, True, False]
    assert visible(segments, segments, causal=False)[0, 0, 2].tolist() == [True, True, True, True, False, False]
    assert visible(segments[:, 4:5], segments[:, :5], causal=True)[0, 0].int().tolist() == [[1, 1, 0, 0, 1]]


def test_several_texts_in_a_row_give_each_the_logits_it_has_alone(prefix):
    model, processor = prefix
    images = processor.images(pictures(1))
    texts = [processor.encode_answer("what color is the circle?", "red"), processor.encode_answer("", "a red circle")]
    together = model(images=images, **inputs([texts])).logits[0]
    alone = torch.cat([model(images=images, **inputs([[text]])).logits[0] for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing(prefix, dual):
    for model, processor in (prefix, dual):
        images = processor.images(pictures(2))
        short, long = processor.encode("red"), processor.encode("a red circle above a blue square")
        both = model(images=images, **inputs([[short], [long]]))
        alone = model(images=images[:1], **inputs([[short]]))
        if model.language_model is None:
            torch.testing.assert_close(both.text_embedding[:1], alone.text_embedding)
        else:
            torch.testing.assert_close(both.logits[0, : len(short.ids)], alone.logits[0], rtol=1e-4, atol=1e-4)


def test_answers_depend_on_the_picture_and_never_on_later_words(prefix):
    model, processor = prefix
    images = processor.images(pictures(2))
    first, second = processor.encode("a red circle"), processor.encode("a red square")
    same_words = model(images=images, **inputs([[first], [first]])).logits
    assert not torch.allclose(same_words[0], same_words[1], atol=1e-3)
    images = images[:1].expand(2, -1, -1, -1)
    other_words = model(images=images, **inputs([[first], [second]])).logits
    common = next(at for at, (a, b) in enumerate(zip(first.ids, second.ids)) if a != b)
    torch.testing.assert_close(other_words[0, :common], other_words[1, :common])


def test_select_gives_the_chosen_rows_of_the_logits(prefix):
    model, processor = prefix
    images, text = processor.images(pictures(2)), processor.encode("a red circle")
    batch = inputs([[text], [text]])
    select = torch.rand(batch["tokens"].shape) > 0.5
    everywhere = model(images=images, **batch).logits
    torch.testing.assert_close(model(images=images, **batch, select=select).logits, everywhere[select])


def test_uint8_is_normalised_inside(dual):
    model, processor = dual
    images = processor.images(pictures(2))
    mean = torch.tensor(model.config.vision.mean).view(1, 3, 1, 1)
    std = torch.tensor(model.config.vision.std).view(1, 3, 1, 1)
    torch.testing.assert_close(model.encode_image(images), model.encode_image((images.float() / 255 - mean) / std))


def test_positions_start_with_x_in_one_half_and_y_in_the_other():
    places = sine_cosine_2d(4, 8).view(4, 4, 8)  # [y, x, width]
    assert torch.equal(places[0, :, :4], places[3, :, :4]) and torch.equal(places[:, 0, 4:], places[:, 3, 4:])
    assert torch.allclose(places[0, 3, :4], torch.tensor([math.sin(3), math.sin(0.03), math.cos(3), math.cos(0.03)]))
    assert len(places.reshape(16, 8).unique(dim=0)) == 16
    assert sine_cosine_2d(2, 7).shape == (4, 7)


def test_merge_folds_neighbours_of_both_directions():
    changes = {"fusion": {"kind": "prefix", "projector": "linear", "merge": 2}}
    transformer = {"width": 1, "depth": 1, "heads": 1}
    vision = {"image_size": 32, "patch_size": 8, "transformer": transformer}
    text = {**PRESETS["prefix"]["text"], "transformer": {**transformer, "width": 4}}
    fusion = Prefix(parse(VLMConfig, {**PRESETS["prefix"], **changes, "vision": vision, "text": text}, "model"))
    with torch.no_grad():
        fusion.projector.weight.copy_(torch.eye(4))
        fusion.projector.bias.zero_()
    tokens = torch.arange(16.0).view(1, 16, 1)
    assert fusion.project(tokens)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_pictures_in_the_row_are_pictures_before_it(prefix):
    """Where a picture stands is data: the default is only a way to write it."""
    model, processor = prefix
    images, text = processor.images(pictures(1)), inputs([[processor.encode("a red circle")]])
    before = torch.ones(1, model.fusion.length, dtype=torch.int64)
    steps = torch.arange(model.fusion.length)[None]
    row = {
        "tokens": torch.cat([0 * before, text["tokens"]], dim=1),
        "segments": torch.cat([SHARED * before, text["segments"]], dim=1),
        "positions": torch.cat([steps, text["positions"] + model.fusion.length], dim=1),
        "image_places": torch.cat([before, 0 * text["tokens"]], dim=1).bool(),
    }
    found = model(images=images, **row).logits[:, model.fusion.length :]
    assert torch.equal(found, model(images=images, **text).logits)
    row["image_places"] = row["image_places"].roll(1, dims=1) & row["image_places"]
    with pytest.raises(UserError, match="found 3 places for 4 image tokens"):
        model(images=images, **row)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_learns(preset):
    """A parameter without gradient is dead weight and hangs distributed training."""
    model, processor = make(preset)
    outputs = model(images=processor.images(pictures(2)), **inputs([[processor.encode("a red circle")]] * 2))
    values = [outputs.image_embedding, outputs.text_embedding, outputs.scale, outputs.logits]
    sum((value * torch.randn_like(value)).sum() for value in values if value is not None).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": {}}, "expected heads.language_model"),
        ({"text": {**PRESETS["prefix"]["text"], "causal": False}}, "text.causal: found false"),
        ({"fusion": {"kind": "prefixx"}}, "did you mean 'prefix'"),
        ({"vision": {**PRESETS["prefix"]["vision"], "patch_size": 7}}, "expected a divisor"),
        ({"vision": {**PRESETS["prefix"]["vision"], "image_size": 48, "patch_size": 24}}, "power of two"),
        ({"vision": {**PRESETS["prefix"]["vision"], "pool": "class"}}, "without a class token"),
    ],
)
def test_configs_that_make_no_sense_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        parse(VLMConfig, {**PRESETS["prefix"], **change}, "model")


def test_a_model_needs_its_vocabulary_and_a_merge_that_fits():
    config = parse(VLMConfig, PRESETS["prefix"], "model")
    with pytest.raises(UserError, match="vocab_size: found 0"):
        VisionLanguageModel(config)
    fusion = dataclasses.replace(config.fusion, merge=3)
    with pytest.raises(UserError, match="merge: found 3"):
        VisionLanguageModel(dataclasses.replace(config, fusion=fusion).with_vocab(10))
