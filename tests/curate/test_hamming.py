"""Pairs of near hashes against brute force, for every cut that a number of rows can choose."""

import numpy as np
import pytest

from vlmpipe.curate import hamming, kernels
from vlmpipe.curate.hamming import Cost, Part


def crowded(rng: np.random.Generator, rows: int, flips: int) -> np.ndarray:
    """Distinct hashes around a few centres."""
    centres = rng.integers(0, 2**64, max(rows // 10, 1), dtype=np.uint64)
    hashes = rng.choice(centres, rows)
    for _ in range(flips):
        bit = np.uint64(1) << rng.integers(0, 64, rows, np.uint64)
        hashes = np.where(rng.random(rows) < 0.6, hashes ^ bit, hashes)
    return np.unique(hashes)


def brute(left: np.ndarray, right: np.ndarray, radius: int) -> list[tuple[int, int]]:
    return list(map(tuple, np.argwhere(np.bitwise_count(left[:, None] ^ right[None, :]) <= radius).tolist()))


def brute_pairs(hashes: np.ndarray, radius: int) -> list[tuple[int, int]]:
    return [(i, j) for i, j in brute(hashes, hashes, radius) if i < j]


def pairs(found: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, int]]:
    return list(zip(*(side.tolist() for side in found)))


PLANS = [
    (0, [Part(0, 64, 0, 1)]), (1, [Part(0, 64, 1, 2)]), (1, [Part(0, 32, 0, 1), Part(32, 32, 0, 1)]),
    (4, [Part(0, 64, 4, 1)]), (4, [Part(0, 20, 1, 3), Part(20, 22, 1, 1), Part(42, 22, 0, 1)]),
    (8, [Part(0, 64, 8, 0)]), (8, [Part(0, 64, 8, 2)]),
    (8, [Part(0, 21, 2, 2), Part(21, 22, 2, 3), Part(43, 21, 2, 4)]), (12, [Part(0, 32, 6, 1), Part(32, 32, 5, 2)]),
    (20, [Part(0, 64, 20, 1)]),
]


@pytest.mark.parametrize("bucket", [1, 8, 1000])
@pytest.mark.parametrize("radius,plan", PLANS)
def test_pairs_equal_brute_force_whatever_the_plan(radius, plan, bucket, monkeypatch):
    monkeypatch.setattr(hamming, "BUCKET", bucket)  # 1000: one bucket, several stretches long
    monkeypatch.setattr(hamming, "_plan", lambda *_: plan)
    hashes = crowded(np.random.default_rng(radius), 700, 9)
    expected = brute_pairs(hashes, radius)
    assert pairs(hamming.pairs_within(hashes, radius)) == expected
    assert radius < 4 or expected


@pytest.mark.parametrize("bucket", [1, 1000])
@pytest.mark.parametrize("radius,plan", PLANS)
def test_matches_equal_brute_force_whatever_the_plan(radius, plan, bucket, monkeypatch):
    """Hashes that come more than once, on either side, are matches as often."""
    monkeypatch.setattr(hamming, "BUCKET", bucket)
    monkeypatch.setattr(hamming, "_plan", lambda *_: plan)
    rng = np.random.default_rng(radius)
    hashes = rng.permutation(crowded(rng, 600, 8))
    queries, corpus = np.concatenate([hashes[:400], hashes[:9]]), np.concatenate([hashes[200:], hashes[:3], hashes[:3]])
    assert pairs(hamming.matches_within(queries, corpus, radius)) == brute(queries, corpus, radius)


@pytest.mark.parametrize("radius", [0, 1, 3, 8, 20])
def test_the_chosen_plan_finds_what_brute_force_does(radius):
    rng = np.random.default_rng(radius)
    hashes = crowded(rng, 1500, 12)
    assert pairs(hamming.pairs_within(hashes, radius)) == brute_pairs(hashes, radius)
    queries, corpus = rng.choice(hashes, 900), rng.choice(hashes, 40)
    assert pairs(hamming.matches_within(queries, corpus, radius)) == brute(queries, corpus, radius)


@pytest.mark.parametrize("first", [0, 26, 53])
def test_hashes_that_differ_in_few_bits_only_share_nearly_every_bucket(first):
    """All 2,048 of 11 bits: each has 11 neighbours at one bit and 55 at two; most choices of blocks see one bucket."""
    hashes = np.arange(2048, dtype=np.uint64) << np.uint64(first) | np.uint64(1 << 40 if first != 26 else 1)
    left, right = hamming.pairs_within(hashes, 2)
    assert len(left) == 2048 * (11 + 55) // 2 and (left < right).all()
    assert (np.bitwise_count(hashes[left] ^ hashes[right]) <= 2).all()
    assert len(set(zip(left.tolist(), right.tolist()))) == len(left)


def test_nothing_has_no_pairs():
    none, one = np.zeros(0, np.uint64), np.array([7], np.uint64)
    assert pairs(hamming.pairs_within(none, 3)) == [] == pairs(hamming.matches_within(none, none, 3))
    assert pairs(hamming.pairs_within(one, 3)) == [] == pairs(hamming.matches_within(one, none, 3))
    assert pairs(hamming.matches_within(none, one, 3)) == [] and pairs(hamming.matches_within(one, one, 0)) == [(0, 0)]


@pytest.mark.parametrize("rows", [10, 10**4, 10**6, 10**8])
@pytest.mark.parametrize("corpus", [None, 100, 10**6])
def test_any_pair_within_the_radius_agrees_in_some_choice(rows, corpus):
    rng = np.random.default_rng(rows)
    cost = Cost(rows, rows, True) if corpus is None else Cost(rows, corpus, False)
    for radius in (0, 1, 4, 8, 10, 20):
        parts = hamming._plan(radius, cost)
        assert sum(part.width for part in parts) == 64
        assert sum(len(list(part.choices)) for part in parts) < 5000
        for _ in range(50):
            flipped = sum(1 << int(b) for b in rng.choice(64, radius, replace=False))
            found = [
                (flipped >> part.first & ((1 << part.width) - 1)).bit_count() <= part.radius
                and sum(not flipped & hamming._mask(block) for block in part.blocks) >= part.agree
                for part in parts
            ]
            assert any(found)


def test_a_key_is_the_bits_of_its_blocks_side_by_side():
    blocks, number = [(3, 5), (20, 4), (50, 14)], 0b10_1101_0011_0101 << 50 | 0b1001 << 20 | 0b10110 << 3 | 0b101
    key = 0b10_1101_0011_0101 << 9 | 0b1001 << 5 | 0b10110
    for start, stop in ((0, 23), (0, 7), (7, 23), (4, 10), (23, 23)):
        found = 0
        for shift, mask in hamming._fields(blocks, start, stop):
            found |= number >> int(shift) & int(mask)
        assert found == key >> start & ((1 << stop - start) - 1)
    assert hamming._fields([(3, 2), (5, 4), (9, 1)], 0, 7)[:2] == ((3, 127), (0, 0))  # neighbours are one
    assert len(hamming._fields([(first, 1) for first in range(0, 20, 2)], 0, 10)) == hamming.FIELDS


def test_without_a_place_for_the_compiled_code_it_is_compiled_each_time(monkeypatch):
    def njit(nogil, cache=False):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: (function, nogil)

    monkeypatch.setattr(kernels, "njit", njit)
    assert kernels._compiled(len) == (len, True)
