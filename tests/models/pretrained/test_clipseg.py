"""CLIPSeg beyond the table of families: its own forward, prompts of other kinds, other sizes, what it refuses."""

import pytest
import torch

from vlmpipe.errors import UserError
from vlmpipe.models.parity import compare, random_module
from vlmpipe.models.pretrained import FAMILIES, convert
from vlmpipe.models.pretrained.clip import TINY_VISION

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def both(**changes):
    config, theirs = random_module("clipseg", **changes)
    return convert(config.to_dict(), theirs.state_dict()), theirs, FAMILIES["clipseg"].inputs(config.to_dict(), None)


def words(inputs):
    tokens = inputs["input_ids"]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return {"tokens": tokens, "segments": inputs["attention_mask"], "positions": positions}


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("refined", [True, False])
@torch.no_grad()
def test_masks_of_texts_equal_their_forward(refined):
    ours, theirs, inputs = both(use_complex_transposed_convolution=refined)
    found = ours(images=inputs["pixel_values"], **words(inputs)).masks
    assert relative(found, theirs(**inputs).logits) <= TOLERANCE


@torch.no_grad()
def test_masks_of_embeddings_and_of_pictures_equal_theirs():
    ours, theirs, inputs = both()
    pixels, shown = inputs["pixel_values"], torch.randn(3, 3, 48, 48)
    embeddings = torch.randn(3, 18)
    expected = theirs(pixel_values=pixels, conditional_embeddings=embeddings).logits
    assert relative(ours(images=pixels, condition=embeddings).masks, expected) <= TOLERANCE
    expected = theirs(pixel_values=pixels, conditional_pixel_values=shown).logits
    assert relative(ours(images=pixels, condition=ours.embed_prompt(shown)).masks, expected) <= TOLERANCE


@torch.no_grad()
def test_several_phrases_of_one_picture_equal_the_picture_repeated():
    ours, theirs, inputs = both()
    picture = inputs["pixel_values"][:1]
    found = ours(images=picture, **words(inputs), image_rows=torch.tensor([0])).masks
    expected = theirs(**{**inputs, "pixel_values": picture.expand(3, -1, -1, -1)}).logits
    assert relative(found, expected) <= TOLERANCE


@torch.no_grad()
def test_larger_pictures_get_interpolated_positions():
    ours, theirs, inputs = both()
    pixels = torch.randn(3, 3, 80, 80)
    found = ours(images=pixels, **words(inputs)).masks
    assert found.shape == (3, 80, 80)
    assert relative(found, theirs(**{**inputs, "pixel_values": pixels}).logits) <= TOLERANCE


def test_gradients_of_the_decoder_equal_those_of_their_loss():
    """Theirs trains the decoder alone: the towers are frozen here as training rules freeze them."""
    ours, theirs, inputs = both()
    ours.requires_grad_(False)
    ours.mask.requires_grad_(True)
    masks = torch.randint(0, 2, (3, 48, 48)).float()
    theirs(**inputs, labels=masks).loss.backward()
    logits = ours(images=inputs["pixel_values"], **words(inputs)).masks
    torch.nn.functional.binary_cross_entropy_with_logits(logits, masks).backward()
    pairs = [("film.scale", "film_mul"), ("reduce.0", "reduces.0"), ("upsample.4", "transposed_convolution.4")]
    for mine, their in pairs:
        found, expected = ours.mask.get_submodule(mine).weight.grad, theirs.decoder.get_submodule(their).weight.grad
        assert relative(found, expected) <= TOLERANCE
    assert all(parameter.grad is None for parameter in ours.vision.parameters())


def test_with_the_phrase_at_the_first_block_they_are_the_same_but_for_rounding():
    """Random weights make this one so steep that float32 differs in the fifth digit; in float64 nothing is left."""
    config, theirs = random_module("clipseg", conditional_layer=0)
    torch.set_default_dtype(torch.float64)
    try:
        differences = compare(config, theirs.double())
    finally:
        torch.set_default_dtype(torch.float32)
    assert max(each.relative for each in differences) < 1e-11


def test_other_patches_with_the_refined_decoder_are_refused():
    with pytest.raises(UserError, match="found 5 with the refined decoder; expected 16"):
        both(vision_config={**TINY_VISION, "num_hidden_layers": 3})
