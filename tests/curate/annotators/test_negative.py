"""negCLIPLoss against the formula written out, and its batches."""

import numpy as np
import pytest
from scipy.special import logsumexp

from vlmpipe.curate.annotators import negative
from vlmpipe.curate.annotators.negative import NegClipLossConfig, arrays, averaged, batch_losses, dealt
from vlmpipe.errors import UserError


def unit(rows: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(rows, 8)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_the_formula(monkeypatch):
    image, text, temperature = unit(50, 0), unit(50, 1), 0.01
    monkeypatch.setattr(negative, "BLOCK", 16)  # several blocks, the last one short
    similar = image.astype(np.float64) @ text.T.astype(np.float64)
    expected = (np.diag(similar) - temperature / 2 * logsumexp(similar / temperature, axis=1)
                - temperature / 2 * logsumexp(similar / temperature, axis=0))
    assert batch_losses(image, text, temperature) == pytest.approx(expected, abs=1e-6)


def test_a_pair_alone_scores_nothing_and_a_common_caption_pays():
    image = unit(1, 0)
    assert batch_losses(image, unit(1, 1), 0.01) == pytest.approx([0], abs=1e-6)
    images, captions = np.eye(4, 8, dtype=np.float32), np.eye(4, 8, dtype=np.float32)
    captions[1] = images[:4].sum(axis=0) / 2  # half right for every picture
    losses = batch_losses(images, captions, 0.01)
    assert losses.argmin() == 1 and losses[0] > -0.01


def test_rows_are_dealt_once_each_into_equal_batches():
    batches = list(dealt(10, 4, np.random.default_rng(0)))
    assert sorted(map(len, batches)) == [3, 3, 4]
    assert sorted(np.concatenate(batches)) == list(range(10))


def test_the_seed_names_the_batches():
    image, text = unit(40, 0).astype(np.float16), unit(40, 1).astype(np.float16)
    first = averaged(image, text, NegClipLossConfig(batch=8, repeats=2))
    assert np.array_equal(first, averaged(image, text, NegClipLossConfig(batch=8, repeats=2)))
    assert not np.array_equal(first, averaged(image, text, NegClipLossConfig(batch=8, repeats=2, seed=1)))
    whole = averaged(image, text, NegClipLossConfig(batch=40, repeats=2))
    expected = batch_losses(image.astype(np.float32), text.astype(np.float32), 0.01)
    assert whole == pytest.approx(expected, abs=1e-6)


def test_rows_without_embeddings_say_so():
    losses, reasons = arrays(np.array([0.5, np.nan], np.float32))
    assert losses.to_pylist() == [0.5, None] and reasons.to_pylist() == [None, "no image_embedding"]


def test_config_refuses_nonsense():
    with pytest.raises(UserError, match="temperature 0"):
        NegClipLossConfig(temperature=0)
