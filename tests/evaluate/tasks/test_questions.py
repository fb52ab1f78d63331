"""Questions of CLEVR, TextVQA, VizWiz and clips: read from the official files, told apart by what each dataset says."""

import numpy as np
import pytest
import torch

from tests.models import joined, tiny
from vlmpipe.data.task import TaskConfig
from vlmpipe.data.task_world import TASKS as WORLD
from vlmpipe.data.task_world import read_task, write_tasks
from vlmpipe.evaluate.metrics import answerability
from vlmpipe.evaluate.tasks import EvaluateConfig, decode
from vlmpipe.evaluate.tasks.base import keys_of, task_pictures
from vlmpipe.evaluate.tasks.questions import predict_answers, read_questions, score_answers
from vlmpipe.models.generate import answer_logits, answer_probabilities, choice_scores, embed_texts
from vlmpipe.models.generate.rows import with_room

NAMES = ("clevr", "text_questions", "unanswerable", "clips")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("questions")
    write_tasks(root, 80, seed=4, size=48, tasks=NAMES)
    return root


def samples_of(world, name):
    return read_questions(world / name / "test", TaskConfig(WORLD[name].reader, images=WORLD[name].images))


def told(samples, **other):
    """Who says the commonest answer to all, and of whom else is said."""
    return [
        {"right": max(set(s.answers), key=s.answers.count), "wrong": "no"} | {k: f(s) for k, f in other.items()}
        for s in samples
    ]


def test_clevr_by_family_and_kind(world):
    samples = samples_of(world, "clevr")
    rows = told(samples)
    wrong = [sample.slices["family"] == "6" for sample in samples]
    rows = [row | {"right": "nothing"} if miss else row for row, miss in zip(rows, wrong, strict=True)]
    found = score_answers(samples, rows)
    families = {sample.slices["family"] for sample in samples}
    assert len(families) > 8 and "6" in families
    for family in families:
        assert found.metrics[f"accuracy.family.{family}"] == float(family != "6")
    # Family 6 counts: so the kind "count" is all wrong, and "exist" all right.
    assert found.metrics["accuracy.count"] == 0.0 and found.metrics["accuracy.exist"] == 1.0
    assert found.n["accuracy.family.6"] == sum(wrong) and set(found.counts) == set(found.metrics)


def test_text_questions_by_whether_the_answer_can_be_read(world):
    samples = samples_of(world, "text_questions")
    records, _ = read_task(world, "text_questions", "test")
    words = {record.id: {text.word for text in record.texts} for record in records}
    for sample in samples:
        assert (sample.slices["words"] == "read") == (sample.answers[0] in words[sample.id])
    rows = told(samples)
    rows = [row if s.slices["words"] == "read" else row | {"right": "x"} for s, row in zip(samples, rows, strict=True)]
    found = score_answers(samples, rows).metrics
    assert found["accuracy.words.read"] == 1.0 and found["accuracy.words.other"] == 0.0


def test_answerability_from_the_models_own_doubt(world):
    samples = samples_of(world, "unanswerable")
    truth = {sample.id: sample.slices["answerable"] == "yes" for sample in samples}
    assert 0.1 < np.mean(list(truth.values())) < 0.9
    doubt = dict(zip(truth, np.random.default_rng(0).random(len(truth)).round(1).tolist(), strict=True))
    rows = told(samples, unanswerable=lambda s: doubt[s.id], wrong_unanswerable=lambda s: 0.5)
    found = score_answers(samples, rows)
    expected = answerability({key: 1 - value for key, value in doubt.items()}, truth)
    assert found.metrics["answerability"] == pytest.approx(expected.value)
    assert found.metrics["answerability_f1"] == pytest.approx(expected.details["f1"])
    lacking = 1 - np.mean(list(truth.values()))
    assert found.metrics["answerability_wrong_image"] == pytest.approx(lacking)  # one doubt for all
    assert found.metrics["answerability_blind"] == pytest.approx(lacking)
    assert {"accuracy.answerable.yes", "accuracy.answerable.no"} <= set(found.metrics)


def test_doubt_is_asked_for_where_the_dataset_says_what_can_be_answered(world):
    model, processor = tiny.make("prefix")
    for name, asked in (("unanswerable", True), ("text_questions", False)):
        samples = samples_of(world, name)[:3]
        pictures = task_pictures(world / name / "test", keys_of(samples), TaskConfig(WORLD[name].reader))
        right, wrong = ([decode(pictures, getattr(s, key)) for s in samples] for key in ("image", "wrong_image"))
        rows = predict_answers(model, processor, samples, right, wrong, EvaluateConfig())
        assert all(("unanswerable" in row) == asked for row in rows)
        if asked:
            said = [sample.question for sample in samples]
            for key, seen in (("unanswerable", right), ("wrong_unanswerable", wrong)):
                expected = answer_probabilities(model, processor, seen, said, "unanswerable")
                assert [row[key] for row in rows] == pytest.approx(expected)


def test_the_probability_of_an_answer_of_each_kind_of_model():
    seen, asked = tiny.pictures(2), ["what color?", "how many shapes are there?"]
    model, processor = tiny.make("prefix")
    found = answer_probabilities(model, processor, seen, asked, "red")
    assert found == pytest.approx(choice_scores(model, processor, seen, asked, ["blue", "red"])[:, 1].exp().tolist())
    assert 0 < answer_probabilities(model, processor, seen[:1], ["how many " * 40], "unanswerable")[0] < 1
    model, processor = joined.make("single_stream")
    processor.answers = ("blue", "red", "two")
    shares_BA = answer_logits(model, processor, seen, asked).softmax(dim=1)
    assert answer_probabilities(model, processor, seen, asked, "red") == pytest.approx(shares_BA[:, 1].tolist())
    assert answer_probabilities(model, processor, seen, asked, "unanswerable") == [0.0, 0.0]
    model, processor = tiny.make("dual")
    with torch.no_grad():
        images_BE = model.encode_image(processor.images(seen))
    texts_BAE = torch.stack([embed_texts(model, processor, [f"{q} {a}" for a in processor.answers]) for q in asked])
    scores_BA = model.projection.logit_scale.exp() * torch.einsum("bae,be->ba", texts_BAE, images_BE)
    place = processor.answers.index("red")
    expected = scores_BA.softmax(dim=1)[:, place].tolist()
    assert answer_probabilities(model, processor, seen, asked, "red") == pytest.approx(expected, rel=1e-4)


def test_clips_are_their_frames_in_order_by_kind_of_question(world):
    samples, (records, _) = samples_of(world, "clips"), read_task(world, "clips", "test")
    assert [sample.image for sample in samples] == [record.images for record in records]
    for sample in samples:
        assert len(sample.image) == 4 == len(sample.wrong_image) and list(sample.image) == sorted(sample.image)
        clips = [{name.rpartition("/")[0] for name in shown} for shown in (sample.image, sample.wrong_image)]
        assert len(clips[0]) == 1 == len(clips[1]) and clips[0] != clips[1]
    kinds = {sample.slices["question_type"] for sample in samples}
    assert kinds == {"which", "what", "how"}
    found = score_answers(samples, told(samples)).metrics
    assert all(found[f"accuracy.{kind}"] == 1.0 for kind in kinds)


def test_a_models_answer_about_a_clip_depends_on_the_order_of_its_frames(world):
    """The frames reach the model one after another: backwards they are another clip."""
    model, processor = tiny.make("prefix")
    samples = samples_of(world, "clips")[:1]
    pictures = task_pictures(world / "clips" / "test", keys_of(samples), TaskConfig("video_qa"))
    frames = tuple(decode(pictures, key) for key in samples[0].image)
    roomy = with_room(model, processor, len(frames))
    forward, back = (
        choice_scores(model, roomy, [seen], ["way?"], ["up", "to"])
        for seen in (frames, frames[::-1])
    )
    assert not torch.allclose(forward, back, atol=1e-4)
    rows = predict_answers(model, processor, samples, [frames], [frames[::-1]], EvaluateConfig(answer_tokens=2))
    assert set(rows[0]) == {"right", "wrong"}
