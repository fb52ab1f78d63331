"""Pictures and texts in one space against hand-worked cases."""

import numpy as np
import pytest

from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import (
    class_embedding,
    clip_score,
    group_scores,
    retrieval_ranks,
    retrieval_recall,
    zero_shot_accuracy,
)


def test_retrieval_recall_by_hand():
    # Image 0 has captions 0 and 1, image 1 caption 2. Caption 1 is nearer to the wrong image.
    similarity = np.array([[0.9, 0.1, 0.2], [0.3, 0.8, 0.4]])
    result = retrieval_recall(similarity, [0, 0, 1], ks=(1, 2))
    assert result.details == pytest.approx(
        {"image_to_text@1": 0.5, "image_to_text@2": 1.0, "text_to_image@1": 2 / 3, "text_to_image@2": 1.0}
    )
    assert result.per_sample == {0: 1.0, 1: 0.0, 2: 1.0}
    assert result.value == pytest.approx((0.5 + 1 + 2 / 3 + 1) / 4)


def test_constant_similarity_earns_nothing():
    result = retrieval_recall(np.ones((4, 4)), range(4), ks=(1, 3))
    assert result.value == 0.0


@pytest.mark.parametrize(
    "similarity, images, message",
    [
        (np.zeros((0, 0)), [], "shape"),
        (np.ones((2, 3)), [0, 1], "2 captions"),
        (np.array([[np.nan, 1.0], [0.0, 1.0]]), [0, 1], "NaN"),
        (np.ones((2, 2)), [0, 0], "without its partner"),
    ],
)
def test_retrieval_recall_refuses(similarity, images, message):
    with pytest.raises(UserError, match=message):
        retrieval_recall(similarity, images)


def test_clip_score_is_cosine_times_two_and_a_half_and_never_negative():
    images = {"a": [3.0, 0.0], "b": [1.0, 0.0], "c": [0.0, 2.0]}
    texts = {"a": [0.6, 0.8], "b": [-5.0, 0.0], "c": [0.0, 0.1]}
    result = clip_score(images, texts)
    assert result.per_sample == pytest.approx({"a": 2.5 * 0.6, "b": 0.0, "c": 2.5})
    assert result.value == pytest.approx((1.5 + 2.5) / 3)
    assert result.details["cosines"] == pytest.approx({"a": 0.6, "b": -1.0, "c": 1.0})
    assert result.details["cosine"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    "images, texts, message",
    [
        ({}, {}, "no samples"),
        ({1: [1.0]}, {}, "no prediction for .*1"),
        ({1: [1.0, 0.0]}, {1: [1.0]}, "the same space"),
        ({1: [1.0, np.nan]}, {1: [1.0, 0.0]}, "nan"),
        ({1: [0.0, 0.0]}, {1: [1.0, 0.0]}, "not zero"),
    ],
)
def test_clip_score_refuses(images, texts, message):
    with pytest.raises(UserError, match=message):
        clip_score(images, texts)


def test_each_prompt_of_a_class_weighs_the_same():
    # The long prompt would win a plain mean.
    assert class_embedding([[100.0, 0.0], [0.0, 1.0]], "cat") == pytest.approx([0.5**0.5, 0.5**0.5])


def test_zero_shot_accuracy_with_prompt_ensembles():
    prompts = {"cat": [[100.0, 0.0], [0.0, 1.0]], "dog": [[1.0, -0.1]], "bird": [[-1.0, 0.0]]}
    images = {"a": [1.0, 1.0], "b": [1.0, 0.0], "c": [1.0, 0.0]}
    result = zero_shot_accuracy(images, {"a": "cat", "b": "dog", "c": "bird"}, prompts)
    assert result.per_sample == {"a": 1.0, "b": 1.0, "c": 0.0}
    assert result.value == result.details["top1"] == pytest.approx(2 / 3)
    assert "top5" not in result.details  # with three classes it would be 1 whatever the model does


def test_zero_shot_top_five():
    angles = np.linspace(0, np.pi / 2, 7)
    prompts = {i: [[np.cos(a), np.sin(a)]] for i, a in enumerate(angles)}
    result = zero_shot_accuracy({i: [1.0, 0.0] for i in range(7)}, {i: i for i in range(7)}, prompts)
    assert result.details == pytest.approx({"top1": 1 / 7, "top5": 5 / 7})


def test_classes_that_look_the_same_earn_nothing():
    result = zero_shot_accuracy({1: [1.0, 0.0]}, {1: "a"}, {"a": [[1.0, 0.0]], "b": [[1.0, 0.0]]})
    assert result.value == 0.0


@pytest.mark.parametrize(
    "images, labels, prompts, message",
    [
        ({}, {}, {"a": [[1.0]], "b": [[1.0]]}, "no samples"),
        ({1: [1.0]}, {1: "c"}, {"a": [[1.0]], "b": [[1.0]]}, "called .*'c'"),
        ({1: [1.0]}, {1: "a"}, {"a": [[1.0]]}, "1 classes"),
        ({1: [1.0]}, {1: "a"}, {"a": [[1.0]], "b": []}, "the class 'b'"),
        ({1: [1.0]}, {1: "a"}, {"a": [[1.0, 0.0]], "b": [[1.0, 0.0]]}, "the same space"),
        ({1: [np.nan]}, {1: "a"}, {"a": [[1.0]], "b": [[1.0]]}, "nan"),
    ],
)
def test_zero_shot_accuracy_refuses(images, labels, prompts, message):
    with pytest.raises(UserError, match=message):
        zero_shot_accuracy(images, labels, prompts)


def test_group_scores_by_hand():
    # Rows are captions, columns pictures.
    groups = {
        "both": [[0.9, 0.1], [0.2, 0.8]],
        "text": [[0.9, 0.1], [0.8, 0.3]],  # each picture finds its caption; caption 1 finds the wrong picture
        "image": [[0.9, 0.8], [0.1, 0.3]],  # each caption finds its picture; picture 1 finds the wrong caption
        "neither": [[0.1, 0.9], [0.8, 0.2]],
    }
    result = group_scores(groups)
    assert result.details == {"text": 0.5, "image": 0.5, "group": 0.25}
    assert result.value == 0.25 and result.per_sample["both"] == 1.0 and result.per_sample["text"] == 0.0


def test_equal_scores_win_no_group():
    assert group_scores({1: np.ones((2, 2))}).details == {"text": 0.0, "image": 0.0, "group": 0.0}


@pytest.mark.parametrize(
    "scores, message",
    [
        ({}, "no groups"),
        ({1: [[1.0, 2.0]]}, "shape"),
        ({1: [[1.0]]}, "shape"),
        ({1: [[1.0, np.nan], [0.0, 1.0]]}, "no number"),
    ],
)
def test_group_scores_refuse(scores, message):
    with pytest.raises(UserError, match=message):
        group_scores(scores)


def test_retrieval_ranks_count_what_comes_before():
    similarity = np.array([[0.9, 0.1, 0.2], [0.3, 0.8, 0.4]])
    rank_I, rank_C = retrieval_ranks(similarity, [0, 0, 1])
    assert rank_I.tolist() == [0, 1] and rank_C.tolist() == [0, 1, 0]
    # Without the pair of image 1 and caption 1 each has its own before all.
    similarity[1, 1] = -np.inf
    rank_I, rank_C = retrieval_ranks(similarity, [0, 0, 1])
    assert rank_I.tolist() == [0, 0] and rank_C.tolist() == [0, 0, 0]


@pytest.mark.parametrize("seed", range(4))
def test_retrieval_ranks_are_those_of_counting_pair_by_pair(seed):
    random = np.random.default_rng(seed)
    owners = np.concatenate([np.arange(6), random.integers(0, 6, 9)])
    similarity = random.integers(0, 5, (6, 15)).astype(np.float32)  # many ties
    rank_I, rank_C = retrieval_ranks(similarity, owners)
    for image in range(6):
        best = max(similarity[image, c] for c in range(15) if owners[c] == image)
        assert rank_I[image] == sum(similarity[image, c] >= best for c in range(15) if owners[c] != image)
    for c in range(15):
        own = similarity[owners[c], c]
        assert rank_C[c] == sum(similarity[image, c] >= own for image in range(6) if image != owners[c])
