"""Drawn pictures: what is scored is what is drawn, and no batch changes it."""

import numpy as np
import pytest

from tests.models import tiny
from tests.models.fusion.small import make_small
from vlmpipe.data.task import TaskConfig
from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import clip_score, fid
from vlmpipe.evaluate.tasks import EvaluateConfig, Sample
from vlmpipe.evaluate.tasks.options import DrawingConfig
from vlmpipe.evaluate.tasks.run import protocol_sha256
from vlmpipe.evaluate.tasks.text_to_image import paint, predict_drawings, score_drawings, scorer_of
from vlmpipe.models import save
from vlmpipe.models.draw import picture_loss

CAPTIONS = ("a red circle above a blue square", "two shapes", "red", "a blue square")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("scorer")
    save(*tiny.make("dual"), directory)
    return EvaluateConfig(drawing=DrawingConfig(str(directory), temperature=2.0))


def samples():
    return [
        Sample(f"s{at}", at, -at, "", (text,), wrong_truth=CAPTIONS[at - 1]) for at, text in enumerate(CAPTIONS)
    ]


def test_the_rows_are_of_what_is_drawn_whatever_the_batch(config):
    model, processor = make_small("text-to-image")
    asked, seen, scorer = samples(), tiny.pictures(4), scorer_of(config.drawing.scorer)
    rows = predict_drawings(model, processor, asked, seen, seen[::-1], config)
    parts = [predict_drawings(model, processor, [one], [image], [image], config)[0] for one, image in zip(asked, seen)]
    assert all(row[name] == pytest.approx(part[name], abs=1e-5) for row, part in zip(rows, parts) for name in row)
    drawn = paint(model, processor, asked[1:2], [CAPTIONS[1]], config)
    assert rows[1]["made"] == pytest.approx(scorer.encode_images(drawn)[0].numpy(), abs=1e-5)
    other = paint(model, processor, asked[1:2], [CAPTIONS[0]], config)
    assert rows[1]["wrong_made"] == pytest.approx(scorer.encode_images(other)[0].numpy(), abs=1e-5)
    assert rows[1]["text"] == pytest.approx(scorer.encode_texts([CAPTIONS[1]])[0].numpy(), abs=1e-5)
    pixels = processor.images(seen[1:2])
    losses = [picture_loss(model, processor, pixels, [text]).item() for text in (CAPTIONS[1], CAPTIONS[0])]
    assert (rows[1]["nll"], rows[1]["wrong_nll"]) == pytest.approx(losses, rel=1e-5)


def test_the_scores_are_the_metrics_of_the_rows():
    random = np.random.default_rng(0)
    asked = samples()
    rows = [
        {name: random.normal(size=3) for name in ("real", "made", "wrong_made", "text")}
        | {"nll": 4.0 + at, "wrong_nll": 8.0 + at, "tokens": 4} for at in range(4)
    ]
    found = score_drawings(asked, rows)
    made, text, real = ({one.id: row[name] for one, row in zip(asked, rows)} for name in ("made", "text", "real"))
    expected = clip_score(made, text)
    assert found.metrics["clip_score"] == pytest.approx(expected.value)
    assert {key: row["score"] for key, row in found.rows.items()} == expected.per_sample
    assert found.metrics["fid"] == fid(made, real).value and found.n["fid"] == 4
    assert found.metrics["perplexity"] == pytest.approx(np.exp((4 + 5 + 6 + 7) / 16))
    assert found.metrics["caption_gain"] == pytest.approx(np.exp(1.0))
    assert found.details["fid"]["full_rank"]
    assert "fid" not in found.counts and found.counts["clip_score_gain"].value == pytest.approx(
        found.metrics["clip_score"] - found.metrics["clip_score_wrong_caption"]
    )


def test_pictures_drawn_as_they_really_are_have_no_distance_and_the_real_ones_score():
    random = np.random.default_rng(1)
    rows = []
    for _ in range(4):
        real = random.normal(size=2)
        rows.append({"real": real, "made": real, "wrong_made": -real, "text": real, "nll": 1.0, "wrong_nll": 1.0,
                     "tokens": 1})
    metrics = score_drawings(samples(), rows).metrics
    assert metrics["fid"] == pytest.approx(0, abs=1e-9) and metrics["caption_gain"] == 1.0
    assert metrics["clip_score"] == metrics["clip_score_real"] == pytest.approx(2.5)
    assert metrics["clip_score_wrong_caption"] == 0


def test_a_scorer_that_changes_under_its_name_changes_the_protocol(tmp_path):
    """And with it the names of rows that an ended evaluation left."""
    drawn, other = (
        EvaluateConfig(tasks=(task,), drawing=DrawingConfig(str(tmp_path))) for task in ("text_to_image", "captioning")
    )
    before = [protocol_sha256(config, TaskConfig()) for config in (drawn, other)]
    (tmp_path / "config.json").write_text("{}")
    after = [protocol_sha256(config, TaskConfig()) for config in (drawn, other)]
    assert before[0] != after[0] and before[1] == after[1]
    assert protocol_sha256(drawn, TaskConfig()) == after[0]


def test_what_is_missing_is_named():
    model, processor = tiny.make("dual")
    with pytest.raises(UserError, match=r"heads\.image_tokens"):
        predict_drawings(model, processor, samples(), [], [], EvaluateConfig())
    model, processor = make_small("text-to-image")
    with pytest.raises(UserError, match=r"evaluate\.drawing\.scorer"):
        predict_drawings(model, processor, samples(), [], [], EvaluateConfig())
