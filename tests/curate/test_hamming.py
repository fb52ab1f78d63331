"""Pairs of near hashes against brute force, for every cut that a number of rows can choose."""

import numpy as np
import pytest

from vlmpipe.curate import hamming
from vlmpipe.curate.hamming import Part


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


PLANS = [
    (0, [Part(0, 64, 0, 1)]), (1, [Part(0, 64, 1, 2)]), (1, [Part(0, 32, 0, 1), Part(32, 32, 0, 1)]),
    (4, [Part(0, 64, 4, 1)]), (4, [Part(0, 20, 1, 3), Part(20, 22, 1, 1), Part(42, 22, 0, 1)]),
    (8, [Part(0, 64, 8, 2)]), (8, [Part(0, 21, 2, 2), Part(21, 22, 2, 3), Part(43, 21, 2, 4)]),
    (12, [Part(0, 32, 6, 1), Part(32, 32, 5, 2)]),
]


@pytest.mark.parametrize("radix", [0, 16])
@pytest.mark.parametrize("radius,plan", PLANS)
def test_pairs_equal_brute_force_whatever_the_plan(radius, plan, radix, monkeypatch):
    monkeypatch.setattr(hamming, "SLICE", 64)
    monkeypatch.setattr(hamming, "RADIX_BITS", radix)
    monkeypatch.setattr(hamming, "_plan", lambda *_: plan)
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
    for radius in (0, 1, 4, 8, 10, 20):
        parts = hamming._plan(radius, rows, getattr(hamming, cost))
        assert sum(width for part in parts for _, width in part.blocks) == 64
        assert sum(len(list(part.choices)) for part in parts) < 5000
        for _ in range(50):
            flipped = sum(1 << int(b) for b in rng.choice(64, radius, replace=False))
            found = [
                (flipped & int(part.mask)).bit_count() <= part.radius
                and sum(not flipped & int(hamming._mask(block)) for block in part.blocks) >= part.agree
                for part in parts
            ]
            assert any(found)
