"""Zero-shot classes of each kind of model: held to the metric, to single captions, and to how sure they claim to be."""

import pytest
import torch

from tests.models import joined, tiny
from vlmpipe.evaluate.metrics import calibration_error, zero_shot_accuracy
from vlmpipe.evaluate.tasks import EvaluateConfig, Sample, caption_loss
from vlmpipe.evaluate.tasks.base import TEMPLATES
from vlmpipe.evaluate.tasks.classes import classify, predict_classes, score_classes
from vlmpipe.models.generate import embed_texts

NAMES = ("blue square", "red circle", "two shapes")


def samples(count, labels=NAMES):
    return [
        Sample(str(number), number, -number, "what is it?", (labels[number % len(labels)],), choices=labels)
        for number in range(count)
    ]


def test_zero_shot_with_templates_is_the_metric():
    model, processor = tiny.make("dual")
    asked, seen = samples(12), tiny.pictures(12)
    rows = predict_classes(model, processor, asked, seen, seen[::-1], EvaluateConfig())
    found = score_classes(asked, rows)
    with torch.no_grad():
        images_NE = model.encode_image(processor.images(seen)).numpy()
    prompts = {
        name: embed_texts(model, processor, [text.format(name) for text in TEMPLATES]).numpy() for name in NAMES
    }
    images = {sample.id: image_E for sample, image_E in zip(asked, images_NE, strict=True)}
    expected = zero_shot_accuracy(images, {sample.id: sample.answers[0] for sample in asked}, prompts)
    assert found.metrics["accuracy"] == pytest.approx(expected.value)
    assert {key: row["score"] for key, row in found.rows.items()} == expected.per_sample


def test_a_dual_encoder_is_as_sure_as_its_scale_makes_it():
    model, processor = tiny.make("dual")
    said, sure = classify(model, processor, tiny.pictures(4), NAMES, ["{}"])
    names_AE = embed_texts(model, processor, NAMES)
    with torch.no_grad():
        cosines_BA = model.encode_image(processor.images(tiny.pictures(4))) @ names_AE.T
        shares_BA = (cosines_BA * model.projection.logit_scale.exp()).softmax(dim=1)
    assert sure == pytest.approx(shares_BA.max(dim=1).values.tolist(), rel=1e-4)
    assert said == [NAMES[place] for place in shares_BA.argmax(dim=1).tolist()]


def test_a_language_model_is_sure_by_the_likelihood_of_a_caption_for_each_name():
    model, processor = tiny.make("prefix")
    seen = tiny.pictures(2)
    said, sure = classify(model, processor, seen, NAMES, ["{}"])
    for image, name, share in zip(seen, said, sure, strict=True):
        losses = caption_loss(model, processor, [image] * 3, [f"a photo of a {one}" for one in NAMES])
        shares = torch.tensor([-nll for nll, _ in losses]).softmax(dim=0)
        assert name == NAMES[int(shares.argmax())] and share == pytest.approx(shares.max().item(), rel=1e-3)


def test_a_model_of_answers_is_sure_of_one_that_it_knows():
    model, processor = joined.make("single_stream")
    processor.answers = ("red", "blue")
    said, sure = classify(model, processor, tiny.pictures(3), NAMES, ["{}"])
    assert set(said) <= {"red", "blue"} and all(0.5 <= share <= 1 for share in sure)


def test_calibration_is_that_of_the_right_pictures_answers():
    asked = samples(4, ("a", "b"))
    rows = [
        {"right": "a", "sure": 0.9, "wrong": "b"}, {"right": "a", "sure": 0.6, "wrong": "a"},
        {"right": "a", "sure": 0.9, "wrong": "b"}, {"right": "b", "sure": 1.0, "wrong": "a"},
    ]
    found = score_classes(asked, rows)
    expected = calibration_error({0: 0.9, 1: 0.6, 2: 0.9, 3: 1.0}, {0: True, 1: False, 2: True, 3: True})
    assert found.metrics["calibration_error"] == pytest.approx(expected.value)
    assert found.details["calibration_error"]["bins"] == expected.details["bins"]
    assert found.counts["calibration_error"].value == pytest.approx(expected.value)
