"""An encoder over both encoders. That it equals FLAVA: tests/models/pretrained."""

import torch

from tests.models.joined import batch, make


def test_padding_changes_nothing():
    model, processor = make("multimodal")
    inputs = batch(processor)
    together = model(**inputs, heads=("matching", "masked_image"))
    length = int((inputs["segments"][2] != 0).sum())
    alone = {name: value[[2]] if name == "images" else value[[2], :length] for name, value in inputs.items()}
    found = model(**alone, heads=("matching", "masked_image"))
    torch.testing.assert_close(found.matching, together.matching[[2]])
    torch.testing.assert_close(found.patch_values, together.patch_values[[2]])


def test_embeddings_come_from_the_encoders_alone():
    model, processor = make("multimodal")
    inputs = batch(processor)
    found = model(**inputs, heads=("projection",))
    torch.testing.assert_close(found.image_embedding, model.encode_image(inputs["images"]))
    words = [inputs[name] for name in ("tokens", "segments", "positions")]
    torch.testing.assert_close(found.text_embedding, model.encode_text(*words))
    assert found.matching is None


def test_a_text_or_a_picture_alone_has_heads_of_its_own():
    model, processor = make(
        "multimodal", masked_text={"tied": False, "alone": True}, masked_image={"alone": True}
    )
    inputs = batch(processor)
    images = inputs.pop("images")
    heads = ("masked_text", "masked_image", "matching")
    text, image = model(**inputs, heads=heads), model(images=images, heads=heads)
    both = model(images, **inputs, heads=heads)
    assert text.matching is None and image.matching is None and both.matching is not None
    assert text.patch_values is None and image.text_logits is None
    words = model.text(model.text.token_embedding(inputs["tokens"]), inputs["segments"], inputs["positions"])
    torch.testing.assert_close(text.text_logits, model.masked_text.alone(words, None))
    patches = model.vision.patches(model.vision(images))
    torch.testing.assert_close(image.patch_values, model.masked_image.alone(patches))
    assert text.text_logits.shape == both.text_logits.shape
    assert (text.text_logits - both.text_logits).abs().max() > 1e-3


def test_hidden_patches_are_not_seen():
    model, processor = make("multimodal")
    inputs = batch(processor)
    hidden = torch.zeros(4, 16, dtype=torch.bool)
    hidden[:, 5] = True
    changed = inputs["images"].clone()
    changed[:, :, 8:16, 8:16] = 0  # patch 5 of 4 x 4
    heads = ("masked_image", "matching")
    for found, expected in (
        (model(**{**inputs, "images": changed}, patch_mask=hidden, heads=heads),
         model(**inputs, patch_mask=hidden, heads=heads)),
    ):
        assert torch.equal(found.patch_values, expected.patch_values)
    seen = model(**{**inputs, "images": changed}, heads=heads).matching - model(**inputs, heads=heads).matching
    assert seen.abs().max() > 1e-4
