"""Matching: which rows are negatives, and the losses against plain formulas."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.joined import batch, make
from vlmpipe.train.objectives.matching import HardMatching, Matching, draw, others


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def twins(processor):
    """Rows 0 and 2 with the same text."""
    rows = batch(processor)
    for name in ("tokens", "segments", "positions"):
        rows[name][2] = rows[name][0]
    return rows


def test_half_of_the_texts_get_a_picture_of_another_text():
    _, processor = make("single_stream")
    rows, own = twins(processor), torch.arange(4)
    drawn = torch.stack([Matching().choose(rows, own) for _ in range(600)])
    assert (drawn == own).float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert set(drawn[:, 0].tolist()) == {0, 1, 3} and set(drawn[:, 1].tolist()) == {0, 1, 2, 3}


def test_where_all_texts_are_one_all_pairs_match():
    weights, own = torch.zeros(3, 3), torch.arange(3)
    assert torch.equal(draw(weights, own), own)


def test_matching_is_the_cross_entropy_of_pairs():
    model, processor = make("single_stream")
    rows = batch(processor)
    shown = torch.tensor([0, 3, 2, 1])
    loss, metrics = Matching()(model, {**rows, "negatives": shown})
    logits = model(**{**rows, "images": rows["images"][shown]}, heads=("matching",)).matching
    labels = torch.tensor([1, 0, 1, 0])
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    torch.testing.assert_close(metrics["accuracy"], (logits.argmax(1) == labels).float().mean())


def test_hard_matching_is_over_every_pair_and_two_negatives():
    model, processor = make("multimodal")
    rows = batch(processor)
    images, texts = torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 0, 1])
    loss, _ = HardMatching()(model, {**rows, "negative_images": images, "negative_texts": texts})
    words = {name: rows[name] for name in ("tokens", "segments", "positions")}
    pictures = rows["images"]
    parts = [
        (pictures, words, 1),
        (pictures[images], words, 0),
        (pictures, {name: value[texts] for name, value in words.items()}, 0),
    ]
    losses = [
        F.cross_entropy(model(image, **text, heads=("matching",)).matching, torch.full((4,), label))
        for image, text, label in parts
    ]
    torch.testing.assert_close(loss, torch.stack(losses).mean())


def test_hard_negatives_are_drawn_by_similarity_and_never_of_the_same_text():
    model, processor = make("multimodal")
    rows = twins(processor)
    with torch.no_grad():
        model.projection.logit_scale.fill_(1.0)
    drawn = [torch.stack(each) for each in zip(*(HardMatching().choose(model, rows) for _ in range(500)), strict=True)]
    image = model.encode_image(rows["images"])
    text = model.encode_text(rows["tokens"], rows["segments"], rows["positions"])
    allowed = others(rows).float()
    assert allowed.tolist() == [[0, 1, 0, 1], [1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 0]]
    for found, similar in zip(drawn, (text @ image.T, image @ text.T), strict=True):
        weights = (torch.e * similar).softmax(dim=1) * allowed
        shares = F.one_hot(found, 4).float().mean(dim=0)
        torch.testing.assert_close(shares, weights / weights.sum(dim=1, keepdim=True), rtol=0, atol=0.08)
