"""The arithmetic of benchmarks/curation.py on numbers whose answer is known."""

import math

import numpy as np
import pytest

from benchmarks import curation


def test_perplexity_per_word_and_paired_interval():
    """Ten words a caption; the raw model loses ln 2 more on each word, and answers half of what the other does."""
    curated_nats = np.linspace(5, 15, 100)
    raw = curation.Arm("raw", 200, curated_nats + 10 * math.log(2), np.tile([0.0, 1.0], 50))
    curated = curation.Arm("curated", 100, curated_nats, np.ones(100))
    found = curation.compare(raw, curated, words=1000)
    surprise = found["caption_perplexity_per_word"]
    assert surprise["curated"] == pytest.approx(math.e)
    assert surprise["ratio"] == pytest.approx(2)
    # Paired: the losses vary much between captions, their difference not at all.
    assert surprise["interval"] == pytest.approx([2, 2])
    assert found["vqa_accuracy"]["difference"] == 0.5
    low, high = found["vqa_accuracy"]["interval"]
    assert 0.38 < low < 0.5 < high < 0.62
    assert found["train_rows"] == {"raw": 200, "curated": 100}


def test_fresh_scenes_are_the_same_every_time(tmp_path, monkeypatch):
    monkeypatch.setattr(curation, "FRESH_SCENES", 3)
    first = curation.draw_fresh(tmp_path / "a.parquet")
    assert first == curation.draw_fresh(tmp_path / "b.parquet")
    assert len({data for data, _ in first}) == 3
