"""Hashes that are few bits apart, found without comparing everything with everything.

Blocks of bits, as in Manku et al., "Detecting near-duplicates for web crawling", 2007: cut the 64 bits into
radius + k blocks. Two hashes within the radius differ in at most `radius` blocks, so they agree in some k. For each
choice of k blocks only hashes that agree there are compared.

Legend: a hash is one uint64; n hashes, P pairs; a block is (first bit, width).
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import comb, log2

import numpy as np

Block = tuple[int, int]
CANDIDATES = 1 << 21  # pairs looked at together: bounds memory, not the result
FEW = 1000  # a corpus up to this size is compared as a whole
TABLE_BITS = 22  # of a key that addresses a table directly
SLICE = 1 << 16  # sorted hashes that are compared while they are in the cache


def pairs_within(hashes: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Every pair i < j of *distinct* hashes [n] at most `radius` bits apart: (i [P], j [P]), each once, sorted.

    Threads share the choices of blocks; numpy's loops run side by side.
    """
    if len(hashes) < 2:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    blocks, k = _cut(radius, len(hashes), _sorting_cost)
    with ThreadPoolExecutor(_threads()) as pool:
        choices = itertools.combinations(range(len(blocks)), k)
        found = list(pool.map(lambda choice: _agreeing(hashes, blocks, choice, radius), choices))
    both = np.sort(np.concatenate(found))
    return (both >> np.uint64(32)).astype(np.int64), (both & np.uint64(0xFFFFFFFF)).astype(np.int64)


def matches_within(queries: np.ndarray, corpus: np.ndarray, radius: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield chunks of (query, corpus position) at most `radius` bits apart; one pair may come more than once."""
    if not len(queries) or not len(corpus):
        return
    if len(corpus) <= FEW:
        yield from _compared_with_all(queries, corpus, radius)
        return
    blocks, k = _cut(radius, len(corpus), _lookup_cost)
    for choice in itertools.combinations(range(len(blocks)), k):
        yield from _looked_up(queries, corpus, [blocks[b] for b in choice], radius)


def expand(start: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranges `start[i] .. start[i] + count[i]` one after the other: (i of each element, the element)."""
    owner = np.repeat(np.arange(len(count)), count)
    step = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count)
    return owner, start[owner] + step


def chunks(count: np.ndarray) -> Iterator[slice]:
    """Slices of ranges with about CANDIDATES elements each; one range is never cut."""
    total = np.cumsum(count)
    if not len(total):
        return
    start = 0
    for stop in np.searchsorted(total, np.arange(CANDIDATES, total[-1] + CANDIDATES, CANDIDATES), side="left") + 1:
        stop = min(int(stop), len(count))
        if stop > start:
            yield slice(start, stop)
            start = stop


def _threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or min(os.cpu_count() or 1, 8))


# --- the cut -----------------------------------------------------------------------------------------------

def _cut(radius: int, rows: int, cost) -> tuple[list[Block], int]:
    """The blocks, and the k of them that must agree, which cost least for this many rows."""
    k = min(range(1, 6), key=lambda k: comb(radius + k, k) * cost(64 * k / (radius + k), rows))
    edges = np.linspace(0, 64, radius + k + 1).round().astype(int).tolist()
    return [(a, b - a) for a, b in itertools.pairwise(edges)], k


def _sorting_cost(bits: float, rows: int) -> float:
    """Nanoseconds a row as measured: build, sort and gather the keys, then compare half a bucket."""
    return 40 + 2 * log2(rows) + 2 * rows / 2**bits


def _lookup_cost(bits: float, rows: int) -> float:
    return (30 if bits <= TABLE_BITS else 300) + 20 * rows / 2 ** min(bits, TABLE_BITS)


def _key(hashes: np.ndarray, blocks: Sequence[Block]) -> np.ndarray:
    """The bits of the chosen blocks, side by side."""
    key = np.zeros(len(hashes), np.uint64)
    for first, width in blocks:
        key <<= np.uint64(width)
        key |= (hashes >> np.uint64(first)) & np.uint64((1 << width) - 1)
    return key


# --- among themselves --------------------------------------------------------------------------------------

def _agreeing(hashes: np.ndarray, blocks: Sequence[Block], choice: Sequence[int], radius: int) -> np.ndarray:
    """Pairs whose first agreeing blocks are the chosen ones, as i << 32 | j: so each pair comes from one choice."""
    keys, row = _sorted_by_key(hashes, [blocks[b] for b in choice])
    ordered = hashes[row]
    found = [np.zeros(0, np.uint64)]
    for start in range(0, len(keys), SLICE):
        for left, right in _in_buckets(keys, ordered, start, radius):
            if not len(left):
                continue
            first = _comes_first(ordered[left] ^ ordered[right], blocks, choice)
            one, two = row[left[first]].astype(np.uint64), row[right[first]].astype(np.uint64)
            found.append(np.minimum(one, two) << np.uint64(32) | np.maximum(one, two))
    return np.concatenate(found)


def _sorted_by_key(hashes: np.ndarray, blocks: Sequence[Block]) -> tuple[np.ndarray, np.ndarray]:
    """Keys in order and the row of each. Key and row are sorted as one number: much faster than an argsort."""
    row_bits = (len(hashes) - 1).bit_length()
    key = _key(hashes, blocks)
    key <<= np.uint64(row_bits)  # of a long key the highest bits may fall out: a coarser bucket misses nothing
    key |= np.arange(len(hashes), dtype=np.uint64)
    key.sort()
    row = (key & np.uint64((1 << row_bits) - 1)).astype(np.int64)
    key >>= np.uint64(row_bits)
    return key, row


def _in_buckets(
    keys: np.ndarray, ordered: np.ndarray, start: int, radius: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions (left, right) within the radius, left in this slice, right `gap` further in the same bucket."""
    stop, gap = min(start + SLICE, len(keys)), 1
    while True:
        # Contiguous reads are so cheap that comparing with the next bucket too is faster than picking, at first.
        here, there = slice(start, min(stop, len(keys) - gap)), slice(start + gap, stop + gap)
        left = start + np.flatnonzero(np.bitwise_count(ordered[here] ^ ordered[there]) <= radius)
        left = left[keys[left] == keys[left + gap]]
        yield left, left + gap
        same = keys[here] == keys[there]
        if 8 * np.count_nonzero(same) <= SLICE:
            break
        gap += 1
    active = start + np.flatnonzero(same)
    while len(active := active[active + gap + 1 < len(keys)]):
        gap += 1
        active = active[keys[active] == keys[active + gap]]
        left = active[np.bitwise_count(ordered[active] ^ ordered[active + gap]) <= radius]
        yield left, left + gap


def _comes_first(difference: np.ndarray, blocks: Sequence[Block], choice: Sequence[int]) -> np.ndarray:
    """Whether the pairs agree in the chosen blocks, and in no other one before the last of these."""
    found = np.ones(len(difference), bool)
    for number, (first, width) in enumerate(blocks[: choice[-1] + 1]):
        agrees = difference & np.uint64(((1 << width) - 1) << first) == 0
        found &= agrees if number in choice else ~agrees
    return found


# --- against a corpus --------------------------------------------------------------------------------------

def _compared_with_all(
    queries: np.ndarray, corpus: np.ndarray, radius: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(queries), SLICE):
        part = queries[start : start + SLICE]
        for position, one in enumerate(corpus):
            hit = np.flatnonzero(np.bitwise_count(part ^ one) <= radius)
            if len(hit):
                yield start + hit, np.full(len(hit), position)


def _looked_up(
    queries: np.ndarray, corpus: np.ndarray, blocks: Sequence[Block], radius: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    bits = min(sum(width for _, width in blocks), TABLE_BITS)
    mask = np.uint64((1 << bits) - 1)
    keys, row = _sorted_by_key(corpus, blocks)
    if bits < sum(width for _, width in blocks):
        order = np.argsort(keys & mask, kind="stable")
        keys, row = (keys & mask)[order], row[order]
    table = np.searchsorted(keys, np.arange((1 << bits) + 1, dtype=np.uint64))
    for first in range(0, len(queries), CANDIDATES):
        part = queries[first : first + CANDIDATES]
        key = (_key(part, blocks) & mask).astype(np.int64)
        start, count = table[key], table[key + 1] - table[key]
        for chunk in chunks(count):
            query, position = expand(start[chunk], count[chunk])
            query += chunk.start
            position = row[position]
            close = np.bitwise_count(part[query] ^ corpus[position]) <= radius
            yield first + query[close], position[close]
