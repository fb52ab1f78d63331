"""Hidden words and patches: what is hidden, and the losses against plain formulas."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.joined import batch, make
from vlmpipe.errors import UserError
from vlmpipe.models.heads import MaskedTextConfig
from vlmpipe.train.objectives.masked import (
    IGNORED,
    MaskedImage,
    MaskedMultimodal,
    MaskedText,
    hide_patches,
    hide_words,
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


CONFIG = MaskedTextConfig()


def long_rows():
    """400 rows of 50 words after a special token, the last ten padding."""
    tokens = torch.randint(5, 1000, (400, 50))
    tokens[:, 0], tokens[:, 40:] = 1, 0
    return {"tokens": tokens, "segments": (torch.arange(50) < 40).long().expand(400, -1)}


def given(processor, rows=4):
    """A batch with masks: row 0 hides one word, row 1 three."""
    found = batch(processor, rows, rows)
    found["masked_tokens"], found["masked_labels"] = found["tokens"].clone(), torch.full_like(found["tokens"], IGNORED)
    for row, places in enumerate(([1], [1, 2, 4], [2], [3])[:rows]):
        found["masked_tokens"][row, places] = CONFIG.mask_token
        found["masked_labels"][row, places] = found["tokens"][row, places]
    found["patch_mask"] = torch.zeros(rows, 16, dtype=torch.bool)
    found["patch_mask"][:, 3], found["patch_mask"][0, :2] = True, True
    return found


# --- what is hidden ----------------------------------------------------------------------------------------

def test_fifteen_in_a_hundred_words_are_asked_and_most_of_them_hidden():
    rows = long_rows()
    shown, labels = hide_words(rows, CONFIG, 1000, 0.15)
    asked = labels != IGNORED
    assert torch.equal(labels[asked], rows["tokens"][asked])
    assert not asked[:, 0].any() and not asked[:, 40:].any()
    assert torch.equal(shown[~asked], rows["tokens"][~asked])
    assert asked.sum().item() / (400 * 39) == pytest.approx(0.15, abs=0.01)
    masked = (shown == CONFIG.mask_token)[asked].float().mean().item()
    same = (shown == rows["tokens"])[asked].float().mean().item()
    assert masked == pytest.approx(0.8, abs=0.03) and same == pytest.approx(0.1, abs=0.02)
    assert (shown[asked] >= CONFIG.mask_token).all() and (shown < 1000).all()


def test_every_picture_hides_as_many_patches():
    hidden = hide_patches({"images": torch.zeros(50, 3, 4, 4)}, 16, 0.4)
    assert (hidden.sum(dim=1) == 6).all() and hidden.any(dim=0).all()


# --- losses ------------------------------------------------------------------------------------------------

def test_masked_text_is_the_mean_over_asked_words():
    model, processor = make("single_stream")
    rows = given(processor)
    loss, metrics = MaskedText()(model, rows)
    inputs = {name: rows[name] for name in ("images", "segments", "positions")}
    logits = model(tokens=rows["masked_tokens"], **inputs, heads=("masked_text",)).text_logits
    labels = rows["masked_labels"]
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED))
    right = (logits.argmax(-1) == labels)[labels != IGNORED].float().mean()
    torch.testing.assert_close(metrics["accuracy"], right)


def test_alone_sees_no_picture():
    model, processor = make("multimodal", masked_text={"tied": False, "alone": True})
    rows = given(processor)
    loss, _ = MaskedText(alone=True)(model, rows)
    del rows["images"]
    torch.testing.assert_close(MaskedText(alone=True)(model, rows)[0], loss)


def test_masked_image_in_pixels():
    model, processor = make("multimodal")
    rows = given(processor)
    loss, _ = MaskedImage()(model, rows)
    inputs = {name: rows[name] for name in ("images", "tokens", "segments", "positions")}
    values = model(**inputs, patch_mask=rows["patch_mask"], heads=("masked_image",)).patch_values
    pixels = (rows["images"].float() / 255 - model.vision.mean) / model.vision.std
    errors = []
    for picture, patch in rows["patch_mask"].nonzero().tolist():
        y, x = divmod(patch, 4)
        square = pixels[picture, :, y * 8 : y * 8 + 8, x * 8 : x * 8 + 8].permute(1, 2, 0).flatten()
        errors.append((values[picture, patch] - square).square().mean())
    torch.testing.assert_close(loss, torch.stack(errors).mean())


def test_masked_image_in_codes():
    model, processor = make("multimodal", masked_image={"predicts": "codes", "codes": 9, "codebook": {}})
    rows = given(processor)
    loss, _ = MaskedImage()(model, rows)
    inputs = {name: rows[name] for name in ("images", "tokens", "segments", "positions")}
    logits = model(**inputs, patch_mask=rows["patch_mask"], heads=("masked_image",)).patch_logits
    codes, hidden = model.masked_image.codebook(rows["images"]), rows["patch_mask"]
    torch.testing.assert_close(loss, F.cross_entropy(logits[hidden], codes[hidden]))
    # As shares of classes, all on one of them, the same codes give the same loss.
    shares = {**rows, "codes": F.one_hot(codes, 9).float()}
    torch.testing.assert_close(MaskedImage()(model, shares)[0], loss)


def test_regions_have_classes_and_features():
    """The divergence from a detector's distribution, which is zero where the model gives it exactly."""
    features = torch.randn(2, 5, 6)
    regions = {"regions": 6}
    model, processor = make("co_attention", vision=regions, masked_image={"predicts": "codes", "codes": 4})
    rows = {**batch(processor, 2, 2), "images": features, "patch_mask": torch.rand(2, 5) < 0.5}
    rows["patch_mask"][:, 0] = True
    inputs = {name: rows[name] for name in ("images", "tokens", "segments", "positions", "patch_mask")}
    logits = model(**inputs, heads=("masked_image",)).patch_logits
    said = logits.softmax(dim=-1).detach()
    assert MaskedImage()(model, {**rows, "codes": said})[0].item() == pytest.approx(0, abs=1e-6)
    wrong = said.roll(1, dims=-1)
    expected = (wrong * (wrong.log() - said.log())).sum(dim=-1)[rows["patch_mask"]].mean()
    torch.testing.assert_close(MaskedImage()(model, {**rows, "codes": wrong})[0], expected)
    model, _ = make("co_attention", vision=regions, masked_image={"predicts": "features"})
    values = model(**inputs, heads=("masked_image",)).patch_values
    expected = (values - features)[rows["patch_mask"]].square().mean()
    torch.testing.assert_close(MaskedImage()(model, rows)[0], expected)


def test_multimodal_is_the_sum_of_both():
    model, processor = make("single_stream")
    rows = given(processor)
    loss, metrics = MaskedMultimodal()(model, rows)
    torch.testing.assert_close(loss, metrics["text"] + metrics["image"])
    both_hidden = {**rows, "tokens": rows["masked_tokens"]}
    torch.testing.assert_close(metrics["image"], MaskedImage()(model, both_hidden)[0])


def test_what_is_missing_is_named():
    model, processor = make("single_stream")
    rows = given(processor)
    with pytest.raises(UserError, match="MaskedText: found no tokens in the batch"):
        MaskedText()(model, {name: value for name, value in rows.items() if name != "tokens"})
    codes, _ = make("single_stream", masked_image={"predicts": "codes", "codes": 9})
    with pytest.raises(UserError, match=r"found no `codes` in the batch and no heads\.masked_image.codebook"):
        MaskedImage()(codes, rows)
    bare, _ = make("single_stream", masked_text=None)
    with pytest.raises(UserError, match=r"found a model without heads\.masked_text"):
        MaskedText()(bare, rows)
