"""Learning to write pictures."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.fusion.small import images, make_small
from tests.models.tiny import TEXTS
from vlmpipe.models.processor import stack
from vlmpipe.train.objectives import ImageTokens


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make_batch(processor, count=3):
    return {"images": images(count), **stack([[processor.encode(text)] for text in (TEXTS * count)[:count]])}


def test_the_loss_is_the_cross_entropy_of_every_code():
    model, processor = make_small("text-to-image")
    batch = make_batch(processor)
    loss, metrics = ImageTokens()(model, batch)
    codes = model.codes.encode(batch["images"])
    words = {name: batch[name] for name in ("tokens", "segments", "positions")}
    logits = torch.stack([
        model(**words, codes=model.codes.opening(codes)[:, : place + 1]).image_logits[:, -1] for place in range(4)
    ], dim=1)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), codes.flatten()))
    torch.testing.assert_close(metrics["accuracy"], (logits.argmax(-1) == codes).float().mean())


def test_in_training_some_captions_are_only_their_first_token():
    model, processor = make_small("text-to-image")
    batch = make_batch(processor)
    with_caption = ImageTokens(drop=0)(model.train(), batch)[0]
    without = ImageTokens(drop=1)(model, batch)[0]
    bare = {**batch, "segments": batch["segments"] * (torch.arange(batch["segments"].shape[1]) == 0)}
    torch.testing.assert_close(without, ImageTokens(drop=0)(model, bare)[0])
    assert not torch.allclose(with_caption, without)
    torch.testing.assert_close(ImageTokens(drop=1)(model.eval(), batch)[0], with_caption)


def test_every_parameter_learns():
    model, processor = make_small("text-to-image")
    ImageTokens()(model, make_batch(processor))[0].backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_it_learns_which_picture_belongs_to_which_words():
    model, processor = make_small("text-to-image")
    batch = make_batch(processor, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss, metrics = ImageTokens(drop=0)(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metrics["accuracy"] == 1 and loss < 0.2
