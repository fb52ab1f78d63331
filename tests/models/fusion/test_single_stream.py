"""Words and image tokens in one stack. That it equals ViLT and VisualBERT: tests/models/pretrained."""

import pytest
import torch

from tests.models.joined import batch, make
from vlmpipe.config import parse
from vlmpipe.errors import UserError
from vlmpipe.models import VLMConfig
from vlmpipe.models.processor import stack


def cut(values, rows):
    return {name: value[rows] for name, value in values.items()}


def test_padding_and_the_other_rows_change_nothing():
    model, processor = make("single_stream")
    inputs = batch(processor)
    together = model(**inputs, heads=("masked_text", "matching"))
    for row in range(4):
        alone = cut(inputs, [row])
        length = int((alone["segments"] != 0).sum())
        alone = {name: value[:, :length] if name != "images" else value for name, value in alone.items()}
        found = model(**alone, heads=("masked_text", "matching"))
        torch.testing.assert_close(found.matching, together.matching[[row]])
        torch.testing.assert_close(found.text_logits[0], together.text_logits[row, :length])


def test_a_smaller_picture_is_the_same_alone_and_filled_up():
    model, processor = make("single_stream")
    inputs = cut(batch(processor), [0, 1])
    filled = torch.randn(2, 3, 32, 40)
    filled[1, :, 24:], filled[1, :, :, 16:] = 7.0, 7.0
    grids = torch.tensor([[1, 4, 5], [1, 3, 2]])
    together = model(**{**inputs, "images": filled}, grids=grids, heads=("answers", "masked_image"))
    alone = model(
        **{**cut(inputs, [1]), "images": filled[[1], :, :24, :16]}, heads=("answers", "masked_image")
    )
    torch.testing.assert_close(together.answers[[1]], alone.answers)
    patches = together.patch_values[1].unflatten(0, (4, 5))[:3, :2].flatten(0, 1)
    torch.testing.assert_close(patches, alone.patch_values[0])


def test_several_pictures_of_a_row_are_told_apart():
    model, processor = make("single_stream")
    inputs = cut(batch(processor), [0, 1])
    inputs["images"] = batch(processor)["images"][:3]
    found = model(**inputs, image_rows=torch.tensor([0, 1, 1]), heads=("matching", "masked_image"))
    swapped = model(
        **{**inputs, "images": inputs["images"][[0, 2, 1]]}, image_rows=torch.tensor([0, 1, 1]), heads=("matching",)
    )
    torch.testing.assert_close(found.matching[0], swapped.matching[0])
    assert (found.matching[1] - swapped.matching[1]).abs().max() > 1e-4
    one = model(**cut(inputs, [0]), heads=("matching", "masked_image"))
    torch.testing.assert_close(found.matching[[0]], one.matching)
    torch.testing.assert_close(found.patch_values[[0]], one.patch_values)


def test_words_and_patches_see_each_other():
    model, processor = make("single_stream")
    inputs = batch(processor)
    images = torch.randn(4, 3, 32, 32, requires_grad=True)
    outputs = model(**{**inputs, "images": images}, heads=("masked_text", "masked_image"))
    outputs.text_logits[0, 0].sum().backward(retain_graph=True)
    assert (images.grad[0] != 0).all() and (images.grad[1:] == 0).all()
    table = model.text.token_embedding.weight
    table.grad = None
    outputs.patch_values[0, 3].sum().backward()
    seen = inputs["tokens"][0][inputs["segments"][0] != 0]
    assert (table.grad[seen].abs().sum(dim=1) > 0).all()


def test_what_does_not_fit_is_refused():
    model, processor = make("single_stream")
    inputs = {name: value[:1] for name, value in batch(processor).items()}
    row = stack([[processor.encode("a red circle"), processor.encode("two shapes")]])
    with pytest.raises(UserError, match="several texts in a row"):
        model(inputs["images"], row["tokens"], row["segments"], row["positions"])
    with pytest.raises(UserError, match="picture without a text"):
        model(inputs["images"])
    with pytest.raises(UserError, match="found 1 passes for the head 'statement'; expected 2"):
        model(**inputs)
    config = {
        "vision": {"transformer": {"width": 8, "depth": 1, "heads": 1}, "mask_token": False},
        "text": {"transformer": {"width": 8, "depth": 1, "heads": 1}, "causal": False},
        "fusion": {"kind": "none"}, "heads": {"projection": {}, "matching": {}},
    }
    with pytest.raises(UserError, match=r"found matching with fusion 'none'; expected .*single_stream"):
        parse(VLMConfig, config, "test")
    with pytest.raises(UserError, match="kind: found 'single_stream' and single_stream None"):
        parse(VLMConfig, {**config, "fusion": {"kind": "single_stream"}}, "test")
