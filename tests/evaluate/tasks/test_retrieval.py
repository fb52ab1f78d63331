"""Retrieval and matching over pictures with several captions, against brute force and oracles."""

import numpy as np
import pytest

from tests.models import joined, tiny
from vlmpipe.data.task import TaskConfig
from vlmpipe.data.task_world import write_tasks
from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import retrieval_recall
from vlmpipe.evaluate.tasks import EvaluateConfig, Sample, decode
from vlmpipe.evaluate.tasks.base import keys_of, task_pictures
from vlmpipe.evaluate.tasks.matching import predict_matches, read_matches, score_matches
from vlmpipe.evaluate.tasks.pairs import pair_scores
from vlmpipe.evaluate.tasks.retrieval import CANDIDATES, predict_retrieval, read_retrieval, score_retrieval

FILES = TaskConfig("coco_captions")


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    root = tmp_path_factory.mktemp("captions")
    write_tasks(root, 60, seed=2, size=48, tasks=["captions"])
    return root / "captions" / "test"


def sample(number, captions, rivals=()):
    return Sample(str(number), number, (), "", captions, truth=rivals)


def embedded(samples, width=6, seed=0):
    random, of_text = np.random.default_rng(seed), {}
    rows = []
    for one in samples:
        for text in one.answers:
            of_text.setdefault(text, random.normal(size=width))
        rows.append({"image": random.normal(size=width), "texts": np.stack([of_text[text] for text in one.answers])})
    return rows


def test_every_picture_has_its_captions_and_other_pictures_as_rivals(split):
    samples = read_retrieval(split, FILES)
    assert len(samples) == 12 and all(len(one.answers) == 5 for one in samples)
    assert all(len(set(one.wrong_image) - {one.image}) == CANDIDATES - 1 == len(one.truth) for one in samples)
    captions = {one.image: one.answers for one in samples}
    assert all(one.truth == tuple(captions[rival] for rival in one.wrong_image) for one in samples)
    assert samples == read_retrieval(split, FILES)
    # Each one's first rival comes next.
    assert [one.wrong_image[0] for one in samples] == [one.image for one in samples[1:] + samples[:1]]


def test_a_dual_encoders_recall_is_that_of_the_whole_matrix():
    samples = [sample(number, tuple(f"{number} {place}" for place in range(1 + number % 3))) for number in range(20)]
    rows = embedded(samples)
    found = score_retrieval(samples, rows)
    similarity = np.stack([row["image"] for row in rows]) @ np.concatenate([row["texts"] for row in rows]).T
    owners = [number for number, one in enumerate(samples) for _ in one.answers]
    expected = retrieval_recall(similarity, owners, (1, 5, 10)).details
    assert {name: found.metrics[name] for name in expected} == pytest.approx(expected)
    ranks = [int((column >= column[owner]).sum()) for column, owner in zip(similarity.T, owners, strict=True)]
    assert found.metrics["text_to_image_median_rank"] == np.median(ranks)
    assert found.n["recall@1"] == 20 and found.details["recall@1"] == {"pictures": 20, "captions": len(owners)}
    for name, counts in found.counts.items():
        assert counts.value == found.metrics[name]


def test_recall_at_one_weighs_every_picture_alike_in_both_ways():
    # Picture 0 finds a caption, and one of its two finds it; picture 1 loses to caption "c", and "b" finds it.
    samples = [sample(0, ("a", "c")), sample(1, ("b",))]
    rows = [
        {"image": np.array([1.0, 0.0]), "texts": np.array([[1.0, 0.0], [0.4, 0.9]])},
        {"image": np.array([0.0, 1.0]), "texts": np.array([[0.1, 0.8]])},
    ]
    metrics = score_retrieval(samples, rows).metrics
    assert metrics["image_to_text@1"] == 0.5 and metrics["text_to_image@1"] == pytest.approx(2 / 3)
    assert metrics["recall@1"] == pytest.approx(((1 + 0.5) / 2 + (0 + 1) / 2) / 2)
    assert metrics["recall@1_blind"] == pytest.approx(((2 / 3 + 1 / 2) / 2 + (1 / 3 + 1 / 2) / 2) / 2)
    assert metrics["image_to_text_median_rank"] == 1.5 and metrics["text_to_image_median_rank"] == 1.0


def test_a_caption_of_two_pictures_is_wrong_for_neither():
    samples = [sample(0, ("same", "a")), sample(1, ("same", "b"))]
    same, one, other = np.array([1.0, 1.0]), np.array([0.5, 0.0]), np.array([0.0, 0.5])
    rows = [{"image": np.array([1.0, 0.0]), "texts": np.stack([same, one])},
            {"image": np.array([0.0, 1.0]), "texts": np.stack([same, other])}]
    assert score_retrieval(samples, rows).metrics["recall@1"] == 1.0


def test_scores_that_are_all_the_same_earn_nothing():
    samples = [sample(number, (str(number),)) for number in range(4)]
    rows = [{"image": np.ones(2), "texts": np.ones((1, 2))}] * 4
    metrics = score_retrieval(samples, rows).metrics
    assert metrics["recall@1"] == 0 and metrics["image_to_text_median_rank"] == 4


@pytest.mark.parametrize("kind", ["language", "matching"])
def test_a_race_ranks_the_samples_own_among_its_rivals(split, kind):
    """Against the scores of all pairs of the race, and whatever the batches are."""
    model, processor = tiny.make("prefix") if kind == "language" else joined.make("single_stream")
    samples = read_retrieval(split, FILES)[:2]
    pictures = task_pictures(split, keys_of(samples), FILES)
    right = [decode(pictures, one.image) for one in samples]
    wrong = [tuple(decode(pictures, key) for key in one.wrong_image) for one in samples]
    rows = predict_retrieval(model, processor, samples, right, wrong, EvaluateConfig(batch_size=5))
    for one, row, image, others in zip(samples, rows, right, wrong, strict=True):
        texts = [*one.answers, *(text for own in one.truth for text in own)]
        every = np.array(pair_scores(model, processor, [image, *others], [texts] * (1 + len(others))))
        false = [place for place, text in enumerate(texts[5:], 5) if text not in one.answers]
        assert row["image_to_text"] == [int((every[0, false] >= every[0, :5].max()).sum())]
        rivals = [[k for k, own in enumerate(one.truth, 1) if text not in own] for text in one.answers]
        assert row["text_to_image"] == [int((every[k, c] >= every[0, c]).sum()) for c, k in enumerate(rivals)]
    metrics = score_retrieval(samples, rows).metrics
    assert {"recall@1", "image_to_text@5", "text_to_image_median_rank"} <= set(metrics) and "recall@10" not in metrics


# --- matching ----------------------------------------------------------------------------------------------

def test_swapped_captions_are_another_pictures_and_none_of_its_own(split):
    samples = read_matches(split, FILES)
    assert len(samples) == 60 == len({one.id for one in samples})
    captions = {}
    for one in samples:
        captions.setdefault(one.image, set()).add(one.truth)
    for one in samples:
        assert one.wrong_truth in captions[one.wrong_image] and one.wrong_truth not in captions[one.image]
    # All five of the other's are used.
    assert len({one.wrong_truth for one in samples[:5]}) == 5


def test_matching_asks_the_head_for_both_captions_with_both_pictures(split):
    model, processor = joined.make("single_stream")
    samples = read_matches(split, FILES)[:3]
    pictures = task_pictures(split, keys_of(samples), FILES)
    right, wrong = ([decode(pictures, getattr(one, name)) for one in samples] for name in ("image", "wrong_image"))
    rows = predict_matches(model, processor, samples, right, wrong, EvaluateConfig(batch_size=2))
    for one, row, images in zip(samples, rows, zip(right, wrong, strict=True), strict=True):
        for odds, image in zip((row["right"], row["wrong"]), images, strict=True):
            expected = pair_scores(model, processor, [image], [[one.truth, one.wrong_truth]])[0]
            assert odds == pytest.approx(expected, abs=1e-5)


def test_a_model_that_sees_which_is_which_is_right_and_with_the_wrong_picture_wrong():
    samples = [Sample(str(number), number, 1 - number, "", ("a",)) for number in range(2)]
    rows = [{"right": [2.0, -1.0], "wrong": [-1.0, 3.0]}, {"right": [1.0, 0.5], "wrong": [2.0, 0.0]}]
    found = score_matches(samples, rows)
    assert found.metrics["accuracy"] == 0.75 and found.metrics["accuracy_wrong_image"] == 0.5
    assert found.metrics["auc"] == 1.0 and found.metrics["auc_wrong_image"] == 1 / 4
    assert found.metrics["pair_accuracy"] == 0.5 and found.metrics["said_yes"] == 0.75
    assert found.rows["1"]["prediction"] == "yes yes" and found.rows["1"]["score"] == 0.5
    assert set(found.n) == set(found.metrics)


def test_a_model_without_the_head_is_refused():
    model, processor = tiny.make("dual")
    with pytest.raises(UserError, match=r"heads\.matching"):
        predict_matches(model, processor, [], [], [], EvaluateConfig())
