"""Hashes that are few bits apart, found without comparing everything with everything.

Two steps of the pigeonhole principle. Cut the 64 bits into parts p with radii r_p, so that the sum of r_p + 1 is
radius + 1: in some part two near hashes differ in at most r_p bits (Norouzi et al., "Fast search in Hamming space with
multi-index hashing", 2012). Cut that part into r_p + k blocks: they agree in some k of them (Manku et al., "Detecting
near-duplicates for web crawling", 2007). For each choice of blocks only hashes that agree there are compared.

Legend: a hash is one uint64; n hashes, P pairs; a block is (first bit, width).
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import comb

import numpy as np

Block = tuple[int, int]
CANDIDATES = 1 << 21  # pairs looked at together: bounds memory, not the result
FEW = 1000  # a corpus up to this size is compared as a whole
TABLE_BITS = 22  # of a key that addresses a table directly
RADIX_BITS = 16  # keys of up to so many bits are sorted by radix
SLICE = 1 << 16  # sorted hashes that are compared while they are in the cache


@dataclass(frozen=True)
class Part:
    """`width` bits from `first` on, in which two hashes may differ in `radius` bits, `agree` blocks being equal."""

    first: int
    width: int
    radius: int
    agree: int

    @cached_property
    def blocks(self) -> list[Block]:
        edges = np.linspace(self.first, self.first + self.width, self.radius + self.agree + 1).round().astype(int)
        return [(a, b - a) for a, b in itertools.pairwise(edges.tolist())]

    @cached_property
    def mask(self) -> np.uint64:
        return _mask((self.first, self.width))

    @property
    def choices(self) -> Iterator[tuple[int, ...]]:
        return itertools.combinations(range(len(self.blocks)), self.agree)


def pairs_within(hashes: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Every pair i < j of *distinct* hashes [n] at most `radius` bits apart: (i [P], j [P]), each once, sorted.

    Threads share the choices of blocks; numpy's loops run side by side.
    """
    if len(hashes) < 2:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    parts = _plan(radius, len(hashes), _sorting_cost)
    choices = [(number, choice) for number, part in enumerate(parts) for choice in part.choices]
    with ThreadPoolExecutor(_threads()) as pool:
        found = list(pool.map(lambda one: _agreeing(hashes, parts, *one, radius), choices))
    both = np.sort(np.concatenate(found))
    return (both >> np.uint64(32)).astype(np.int64), (both & np.uint64(0xFFFFFFFF)).astype(np.int64)


def matches_within(queries: np.ndarray, corpus: np.ndarray, radius: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield chunks of (query, corpus position) at most `radius` bits apart; one pair may come more than once."""
    if not len(queries) or not len(corpus):
        return
    if len(corpus) <= FEW:
        yield from _compared_with_all(queries, corpus, radius)
        return
    for part in _plan(radius, len(corpus), _lookup_cost):
        for choice in part.choices:
            yield from _looked_up(queries, corpus, [part.blocks[b] for b in choice], radius)


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


# --- the plan ----------------------------------------------------------------------------------------------

def _plan(radius: int, rows: int, cost: Callable[[float, int], float]) -> list[Part]:
    """The parts, and how many blocks of each must agree, which cost least for this many rows."""
    plans = []
    for count in range(1, min(radius + 1, 4) + 1):
        edges = np.linspace(0, 64, count + 1).round().astype(int).tolist()
        each, more = divmod(radius + 1 - count, count)
        parts = [
            _cheapest(first, stop - first, each + (number < more), rows, cost)
            for number, (first, stop) in enumerate(itertools.pairwise(edges))
        ]
        plans.append((sum(price for price, _ in parts), [part for _, part in parts]))
    return min(plans, key=lambda plan: plan[0])[1]


def _cheapest(first: int, width: int, radius: int, rows: int, cost: Callable) -> tuple[float, Part]:
    most = min(width - radius, 12) if radius else 1
    prices = {k: comb(radius + k, k) * cost(width * k / (radius + k), rows) for k in range(1, most + 1)}
    agree = min(prices, key=prices.get)
    return prices[agree], Part(first, width, radius, agree)


def _sorting_cost(bits: float, rows: int) -> float:
    """Nanoseconds a row, about: build, sort and gather the keys, then compare with a bucket."""
    return (40 if bits <= RADIX_BITS else 90) + 0.8 * rows / 2**bits


def _lookup_cost(bits: float, rows: int) -> float:
    return 30 + 20 * rows / 2 ** min(bits, TABLE_BITS)


def _mask(block: Block) -> np.uint64:
    return np.uint64(((1 << block[1]) - 1) << block[0])


def _key(hashes: np.ndarray, blocks: Sequence[Block]) -> np.ndarray:
    """The bits of the chosen blocks, side by side."""
    key = np.zeros(len(hashes), np.uint64)
    for first, width in blocks:
        key <<= np.uint64(width)
        key |= (hashes >> np.uint64(first)) & np.uint64((1 << width) - 1)
    return key


# --- among themselves --------------------------------------------------------------------------------------

def _agreeing(
    hashes: np.ndarray, parts: Sequence[Part], number: int, choice: Sequence[int], radius: int
) -> np.ndarray:
    """Pairs whose first near part and its first agreeing blocks are these, as i << 32 | j: so each pair comes once."""
    keys, row = _sorted_by_key(hashes, [parts[number].blocks[b] for b in choice])
    ordered = hashes[row]
    found = [np.zeros(0, np.uint64)]
    for start in range(0, len(keys), SLICE):
        for left, right in _in_buckets(keys, ordered, start, radius):
            first = _comes_first(ordered[left] ^ ordered[right], parts, number, choice)
            one, two = row[left[first]].astype(np.uint64), row[right[first]].astype(np.uint64)
            found.append(np.minimum(one, two) << np.uint64(32) | np.maximum(one, two))
    return np.concatenate(found)


def _sorted_by_key(hashes: np.ndarray, blocks: Sequence[Block]) -> tuple[np.ndarray, np.ndarray]:
    """Keys in order and the row of each."""
    key, bits = _key(hashes, blocks), sum(width for _, width in blocks)
    if bits <= RADIX_BITS:
        key = key.astype(np.uint16)
        buckets = np.bincount(key, minlength=1 << bits)  # the keys in order without gathering them
        return np.repeat(np.arange(1 << bits).astype(np.uint16), buckets), np.argsort(key, kind="stable")
    # Key and row sorted as one number: faster than an argsort. Of a long key the highest bits may fall out: a
    # coarser bucket misses nothing.
    row_bits = np.uint64((len(hashes) - 1).bit_length())
    key <<= row_bits
    key |= np.arange(len(hashes), dtype=np.uint64)
    key.sort()
    row = (key & ((np.uint64(1) << row_bits) - np.uint64(1))).astype(np.int64)
    key >>= row_bits
    return key, row


def _in_buckets(
    keys: np.ndarray, ordered: np.ndarray, start: int, radius: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions (left, right) within the radius, left in this slice, right `gap` further in the same bucket."""
    stop, gap = min(start + SLICE, len(keys)), 1
    while True:
        # Contiguous reads are so cheap that comparing with the next bucket too is faster than picking, at first.
        here, there = slice(start, min(stop, len(keys) - gap)), slice(start + gap, stop + gap)
        distance = np.bitwise_count(ordered[here] ^ ordered[there])
        if distance.size and distance.min() <= radius:
            left = start + np.flatnonzero(distance <= radius)
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


def _comes_first(difference: np.ndarray, parts: Sequence[Part], number: int, choice: Sequence[int]) -> np.ndarray:
    """Whether the pairs are near in this part and in none before it, agree in the chosen blocks, and in no other one
    before the last of these."""
    found = np.bitwise_count(difference & parts[number].mask) <= parts[number].radius
    for part in parts[:number]:
        found &= np.bitwise_count(difference & part.mask) > part.radius
    for block, place in enumerate(parts[number].blocks[: choice[-1] + 1]):
        agrees = difference & _mask(place) == 0
        found &= agrees if block in choice else ~agrees
    return found


# --- against a corpus --------------------------------------------------------------------------------------

def _compared_with_all(
    queries: np.ndarray, corpus: np.ndarray, radius: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(queries), SLICE):
        part = queries[start : start + SLICE]
        for position, one in enumerate(corpus):
            distance = np.bitwise_count(part ^ one)
            if distance.min() <= radius:
                hit = np.flatnonzero(distance <= radius)
                yield start + hit, np.full(len(hit), position)


def _looked_up(
    queries: np.ndarray, corpus: np.ndarray, blocks: Sequence[Block], radius: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    bits = min(sum(width for _, width in blocks), TABLE_BITS)
    mask = np.uint64((1 << bits) - 1)
    keys = _key(corpus, blocks) & mask
    row = np.argsort(keys, kind="stable")
    table = np.searchsorted(keys[row], np.arange((1 << bits) + 1, dtype=np.uint64))
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
