"""Pairs of near hashes against brute force, for every cut that a number of rows can choose."""

import itertools
import math

import numpy as np
import pytest

from vlmpipe.curate import hamming


def crowded(rng: np.random.Generator, rows: int, flips: int) -> np.ndarray:
    """Distinct hashes around a few centres."""
    centres = rng.integers(0, 2**64, max(rows // 10, 1), dtype=np.uint64)
    hashes = rng.choice(centres, rows)
    for _ in range(flips):
        bit = np.uint64(1) << rng.integers(0, 64, rows, np.uint64)
        hashes = np.where(rng.random(rows) < 0.6, hashes ^ bit, hashes)
    return np.unique(hashes)


def brute(left: np.ndarray, right: np.ndarray, radius: int) -> set[tuple[int, int]]:
    return set(map(tuple, np.argwhere(np.bitwise_count(left[:, None] ^ right[None, :]) <= radius).tolist()))


@pytest.mark.parametrize("radius", [0, 1, 4, 8, 12])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_pairs_equal_brute_force_whatever_the_cut(radius, k, monkeypatch):
    monkeypatch.setattr(hamming, "SLICE", 64)
    edges = np.linspace(0, 64, radius + k + 1).round().astype(int).tolist()
    monkeypatch.setattr(hamming, "_cut", lambda *_: ([(a, b - a) for a, b in itertools.pairwise(edges)], k))
    hashes = crowded(np.random.default_rng(radius), 250, 9)
    left, right = hamming.pairs_within(hashes, radius)
    expected = {(i, j) for i, j in brute(hashes, hashes, radius) if i < j}
    assert len(left) == len(expected) and set(zip(left.tolist(), right.tolist())) == expected
    assert radius < 4 or expected


@pytest.mark.parametrize("few", [0, 1000])
@pytest.mark.parametrize("radius", [0, 3, 10])
def test_matches_equal_brute_force_by_table_and_as_a_whole(few, radius, monkeypatch):
    monkeypatch.setattr(hamming, "FEW", few)
    monkeypatch.setattr(hamming, "CANDIDATES", 70)
    rng = np.random.default_rng(radius)
    hashes = crowded(rng, 300, 8)
    queries, corpus = rng.permutation(hashes)[:120], np.concatenate([rng.permutation(hashes)[:90], hashes[:2]])
    found = {pair for q, c in hamming.matches_within(queries, corpus, radius) for pair in zip(q.tolist(), c.tolist())}
    assert found == brute(queries, corpus, radius)


def test_nothing_has_no_pairs():
    none = np.zeros(0, np.uint64)
    assert len(hamming.pairs_within(none, 3)[0]) == 0 == len(list(hamming.matches_within(none, none, 3)))
    assert len(hamming.pairs_within(np.array([7], np.uint64), 3)[0]) == 0


@pytest.mark.parametrize("rows", [10, 10**4, 10**6, 10**8])
@pytest.mark.parametrize("cost", ["_sorting_cost", "_lookup_cost"])
def test_any_pair_within_the_radius_agrees_in_some_choice(rows, cost):
    rng = np.random.default_rng(rows)
    for radius in (1, 4, 6, 10):
        blocks, k = hamming._cut(radius, rows, getattr(hamming, cost))
        assert sum(width for _, width in blocks) == 64 and math.comb(len(blocks), k) < 5000
        for _ in range(100):
            flipped = sum(1 << int(b) for b in rng.choice(64, radius, replace=False))
            untouched = [not flipped & (((1 << width) - 1) << first) for first, width in blocks]
            assert sum(untouched) >= k
