"""A model that writes pictures is asked how well it expects a picture after its caption."""

import pytest
import torch

from tests.models.fusion.small import make_small
from tests.models.tiny import pictures
from vlmpipe.evaluate.tasks import EvaluateConfig, Sample, predict_captions, score_captions
from vlmpipe.models.draw import picture_loss


def test_the_gain_is_that_of_the_right_picture_over_another_after_the_same_caption():
    torch.set_num_threads(1)
    model, processor = make_small("text-to-image")
    captions, right, wrong = ["a red circle", "two shapes", "red"], pictures(3), pictures(3, seed=7)
    samples = [Sample(str(at), at, at, "", (text,)) for at, text in enumerate(captions)]
    rows = predict_captions(model, processor, samples, right, wrong, EvaluateConfig())
    found = score_captions(samples, rows)
    mean = [picture_loss(model, processor, processor.images(seen), captions).mean() / 4 for seen in (right, wrong)]
    assert found.metrics["perplexity"] == pytest.approx(mean[0].exp().item(), rel=1e-5)
    assert found.metrics["image_gain"] == pytest.approx((mean[1] - mean[0]).exp().item(), rel=1e-5)
    assert found.n["image_gain"] == 3 and found.rows["0"]["prediction"] is None
