"""Hashes that are few bits apart, found without comparing everything with everything.

Two steps of the pigeonhole principle. Cut the 64 bits into parts p with radii r_p, so that the sum of r_p + 1 is
radius + 1: in some part two near hashes differ in at most r_p bits (Norouzi et al., "Fast search in Hamming space with
multi-index hashing", 2012). Cut that part into r_p + k blocks: they agree in some k of them (Manku et al., "Detecting
near-duplicates for web crawling", 2007). For each choice of blocks only hashes that agree there are compared.

Legend: a hash is one uint64; n hashes, P pairs; a block is (first bit, width).
"""

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import comb

import numpy as np

Block = tuple[int, int]
CANDIDATES = 1 << 21  # elements looked at together: bounds memory, not the result
FIELDS = 4  # of a key, at most: as many for all, so that the loop over them is unrolled
BUCKET = 8  # hashes in a bucket, on average, at least: more buckets cost more than they save


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

    @property
    def choices(self) -> Iterator[tuple[int, ...]]:
        return itertools.combinations(range(len(self.blocks)), self.agree)


def pairs_within(hashes: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Every pair i < j of *ascending* distinct hashes [n] at most `radius` bits apart: (i [P], j [P]), sorted."""
    found_P2 = _join(hashes, hashes, radius)
    found_P2.sort(axis=1)
    return _in_order(np.searchsorted(hashes, found_P2[:, 0]), np.searchsorted(hashes, found_P2[:, 1]))


def matches_within(queries: np.ndarray, corpus: np.ndarray, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Every query [n] and corpus position [m] at most `radius` bits apart: (query [P], position [P]), sorted."""
    asked, known = Groups.of(queries), Groups.of(corpus)
    found_P2 = _join(asked.hashes, known.hashes, radius)
    pair, query = asked.expand(np.searchsorted(asked.hashes, found_P2[:, 0]))
    which, position = known.expand(np.searchsorted(known.hashes, found_P2[pair, 1]))
    return _in_order(query[which], position)


def _in_order(one: np.ndarray, two: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    both = np.sort(one.astype(np.uint64) << np.uint64(32) | two.astype(np.uint64))
    return (both >> np.uint64(32)).astype(np.int64), (both & np.uint64(0xFFFFFFFF)).astype(np.int64)


@dataclass(frozen=True)
class Groups:
    """Rows with the same hash: `hashes` [G] ascending; `members` [n], their rows one group after the other; `start`."""

    hashes: np.ndarray
    members: np.ndarray
    start: np.ndarray

    @classmethod
    def of(cls, hashes: np.ndarray) -> "Groups":
        members = np.argsort(hashes)
        distinct, count = np.unique(hashes[members], return_counts=True)
        return cls(distinct, members, np.concatenate([[0], np.cumsum(count)]))

    def expand(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of some groups one after the other: (which of `groups` [r], row [r])."""
        which, place = expand(self.start[groups], self.start[groups + 1] - self.start[groups])
        return which, self.members[place]


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


# --- the plan ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Cost:
    """What a choice costs, in nanoseconds, about, where `left` hashes are compared with `right` ones."""

    left: int
    right: int
    same: bool

    def of(self, bits: float) -> float:
        """With a key of so many bits: put in buckets, then compared with a bucket."""
        moved = self.left if self.same else self.left + self.right
        pairs = self.left * (self.right / 2 if self.same else self.right) / 2 ** min(bits, self.most_bits)
        return 7 * moved + 5 * self.left + 0.11 * pairs

    @property
    def most_bits(self) -> int:
        """Of a key that are used: a coarser bucket misses nothing."""
        return max((max(self.left, self.right) // BUCKET).bit_length() - 1, 0)


def _plan(radius: int, cost: Cost) -> list[Part]:
    """The parts, and how many blocks of each must agree, which cost least."""
    plans = []
    for count in range(1, min(radius + 1, 4) + 1):
        edges = np.linspace(0, 64, count + 1).round().astype(int).tolist()
        each, more = divmod(radius + 1 - count, count)
        parts = [
            _cheapest(first, stop - first, each + (number < more), cost)
            for number, (first, stop) in enumerate(itertools.pairwise(edges))
        ]
        plans.append((sum(price for price, _ in parts), [part for _, part in parts]))
    return min(plans, key=lambda plan: plan[0])[1]


def _cheapest(first: int, width: int, radius: int, cost: Cost) -> tuple[float, Part]:
    """With no block that must agree everything is compared with everything."""
    most = min(width - radius, 12) if radius else 1
    prices = {k: comb(radius + k, k) * cost.of(width * k / max(radius + k, 1)) for k in range(most + 1)}
    agree = min(prices, key=prices.get)
    return prices[agree], Part(first, width, radius, agree)


# --- the search --------------------------------------------------------------------------------------------

def _join(left: np.ndarray, right: np.ndarray, radius: int) -> np.ndarray:
    """Pairs of hashes of two lists, distinct in each, at most `radius` bits apart: uint64 [P, 2], each once.

    Of a list with itself a pair stands for both of its orders, and no hash is paired with itself. Threads share the
    choices of blocks.
    """
    cost = Cost(len(left), len(right), left is right)
    if not cost.left or not cost.right:
        return np.zeros((0, 2), np.uint64)
    parts = _plan(radius, cost)
    choices = [(number, choice) for number, part in enumerate(parts) for choice in part.choices]
    with ThreadPoolExecutor(_threads()) as pool:
        return np.concatenate(list(pool.map(lambda one: _agreeing(left, right, parts, *one, radius, cost), choices)))


def _threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS") or min(os.cpu_count() or 1, 8))


def _agreeing(
    left: np.ndarray, right: np.ndarray, parts: Sequence[Part], number: int, choice: Sequence[int], radius: int,
    cost: Cost,
) -> np.ndarray:
    """Pairs whose first near part and its first agreeing blocks are these: so each pair comes once."""
    from vlmpipe.curate import kernels  # compiled: only who searches waits for it

    blocks = [parts[number].blocks[block] for block in choice]
    bits = min(sum(width for _, width in blocks), cost.most_bits)
    fine = bits // 2
    keys = _fields(blocks, fine, bits), _fields(blocks, 0, fine), np.array([bits - fine, fine])
    return kernels.join(left, right, cost.same, *keys, _tests(parts, number, choice, radius))


def _fields(blocks: Sequence[Block], start: int, stop: int) -> tuple[tuple[np.uint64, np.uint64], ...]:
    """Bits `start` to `stop` of the blocks side by side, as `kernels` reads them; where these are too many, fewer."""
    masks, offset = Counter(), 0  # by shift: blocks that follow each other have the same
    for first, width in blocks:
        low, high = max(offset, start), min(offset + width, stop)
        if low < high:
            masks[first - offset + start] += _mask((low - start, high - low))
        offset += width
    fields = [*masks.items(), *[(0, 0)] * FIELDS][:FIELDS]
    return tuple((np.uint64(shift), np.uint64(mask)) for shift, mask in fields)


def _tests(parts: Sequence[Part], number: int, choice: Sequence[int], radius: int) -> np.ndarray:
    """Near, near in this part and in none before it, equal in the chosen blocks and in no other one before the last of
    these; as `kernels` reads it: uint64 [T, 3]."""
    part = parts[number]
    before = [(_mask((other.first, other.width)), other.radius, 0) for other in parts[:number]]
    blocks = part.blocks[: choice[-1] + 1] if choice else []
    equal = [(_mask(block), 0, place in choice) for place, block in enumerate(blocks)]
    here = (_mask((part.first, part.width)), part.radius, 1)
    return np.array([((1 << 64) - 1, radius, 1), here, *before, *equal], np.uint64)


def _mask(block: Block) -> int:
    return ((1 << block[1]) - 1) << block[0]
