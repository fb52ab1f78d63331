"""The loss of masks against the plain formula, and over processes."""

import pytest
import torch
import torch.nn.functional as F

from tests.train.objectives.pointing import as_processes, gradients, make, make_batch
from vlmpipe.errors import UserError
from vlmpipe.train.objectives import OBJECTIVES, masks
from vlmpipe.train.objectives.masks import UNSCORED, Masks


@pytest.fixture(autouse=True)
def seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def with_masks(batch):
    return {**batch, "masks": torch.randint(0, 2, (len(batch["tokens"]), 32, 32), dtype=torch.uint8)}


def test_it_is_the_mean_over_scored_pixels():
    model, processor = make(detection=None)
    batch = with_masks(make_batch(processor))
    batch["masks"][0, :10] = UNSCORED
    loss, metrics = Masks()(model, batch)
    logits = model(**{name: batch[name] for name in batch if name != "masks"}).masks
    scored = batch["masks"] != UNSCORED
    torch.testing.assert_close(
        loss, F.binary_cross_entropy_with_logits(logits[scored], batch["masks"][scored].float())
    )
    found, there = logits[scored] > 0, batch["masks"][scored] == 1
    torch.testing.assert_close(metrics["iou"], (found & there).sum() / (found | there).sum())


def test_a_mask_of_nothing_and_no_scored_pixel():
    model, processor = make(detection=None)
    batch = with_masks(make_batch(processor))
    batch["masks"][:] = UNSCORED
    loss, metrics = Masks()(model, batch)
    assert loss == 0 and metrics["iou"] == 0


def test_it_learns_to_mark_one_phrase_and_not_the_other():
    decoder = {"taps": [0, 1], "width": 16, "heads": 2, "hidden": 32, "upsample": "simple"}
    model, processor = make(detection=None, mask=decoder)
    batch = with_masks(make_batch(processor, rows=(0, 1), first=(0,), images=1))
    batch["masks"][:] = 0
    batch["masks"][0, :, :16] = 1
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    for _ in range(40):
        optimizer.zero_grad()
        loss, metrics = OBJECTIVES["masks"]()(model, batch)
        loss.backward()
        optimizer.step()
    assert metrics["iou"] > 0.9


def test_masks_of_another_size_are_refused():
    model, processor = make(detection=None)
    batch = with_masks(make_batch(processor))
    with pytest.raises(UserError, match=r"found \[4, 32, 31\]; expected \[4, 32, 32\]"):
        Masks()(model, {**batch, "masks": batch["masks"][:, :, 1:]})


def test_the_mean_over_processes_is_the_loss_of_the_whole_batch(monkeypatch):
    model, processor = make(detection=None)
    whole = with_masks(make_batch(processor))
    whole["masks"][0, :20] = UNSCORED
    Masks()(model, whole)[0].backward()
    expected = gradients(model)
    model.zero_grad()
    text = ("tokens", "segments", "positions", "masks")
    first, zero = {name: whole[name][:1] for name in text}, torch.tensor([0])
    second = {name: whole[name][1:] for name in text}
    parts = [
        {**first, "images": whole["images"][:1], "image_rows": zero},
        {**second, "images": whole["images"][1:], "image_rows": zero},
    ]
    loss, metrics = Masks()(model, whole)
    found = as_processes(Masks(), masks, model, parts, monkeypatch)
    torch.testing.assert_close(found["loss"], loss.detach())
    torch.testing.assert_close(found["iou"], metrics["iou"])
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7, msg=name)
