"""Scores of texts by pictures: one way for each kind of model, each held to the pairs one by one."""

import pytest
import torch

from tests.models import joined, tiny
from tests.models.fusion.small import make_small
from vlmpipe.evaluate.tasks import caption_loss
from vlmpipe.evaluate.tasks.captions import match
from vlmpipe.evaluate.tasks.pairs import caption_ids, pair_scores
from vlmpipe.models.draw import picture_loss
from vlmpipe.models.generate import embed_texts

TEXTS = [["a red circle", "two shapes"], ["a blue square above a red circle"], ["red", "two", "a red circle"]]


def one_by_one(model, processor, score):
    return [[score(image, text) for text in own] for image, own in zip(tiny.pictures(3), TEXTS, strict=True)]


def check(model, processor, score):
    expected = one_by_one(model, processor, score)
    for size in (2, 64):
        found = pair_scores(model, processor, tiny.pictures(3), TEXTS, size)
        assert [len(row) for row in found] == [len(row) for row in TEXTS]
        for row, other in zip(found, expected, strict=True):
            assert row == pytest.approx(other, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", ["prefix", "flamingo"])
def test_a_language_model_scores_by_the_mean_log_likelihood_of_its_tokens(name):
    model, processor = tiny.make("prefix") if name == "prefix" else make_small(name)

    def score(image, text):
        (nll, tokens), = caption_loss(model, processor, [image], [text])
        assert tokens == len(caption_ids(processor, text))
        return -nll / tokens

    check(model, processor, score)


def test_a_dual_encoder_scores_by_the_cosine():
    model, processor = tiny.make("dual")

    def score(image, text):
        with torch.no_grad():
            image_E = model.encode_image(processor.images([image]))[0]
        return float(image_E @ embed_texts(model, processor, [text])[0])

    check(model, processor, score)


def test_a_matching_head_scores_by_its_log_odds():
    model, processor = joined.make("single_stream", answers=None, statement=None)
    check(model, processor, lambda image, text: match(model, processor, [image], [text])[0])


def test_a_model_that_draws_scores_by_the_picture_after_the_text():
    model, processor = make_small("text-to-image")

    def score(image, text):
        return -picture_loss(model, processor, processor.images([image]), [text]).item()

    check(model, processor, score)
