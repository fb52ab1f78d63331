"""How pictures look, and who looks like whom: without comparing everything with everything.

Shape legend: N pictures, P pairs, S = 32 pixels, B = 64 bits, T = 192 bytes of an 8x8 RGB thumbnail.
A hash is one uint64; distances are Hamming, in bits of 64.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import comb, log2

import numpy as np
from PIL import Image

from vlmpipe.errors import UserError
from vlmpipe.images import to_rgb

SIDE = 32  # a picture is looked at in SIDE x SIDE pixels
KEPT = 8  # frequencies 1..KEPT of each direction make the KEPT * KEPT = 64 bits
FLAT = 4.0  # largest coefficient, in grey levels times the transform's gain, of a picture without structure
THUMBNAIL = 8 * 8 * 3
NOISE = 1.0  # grey levels: below this a thumbnail's structure is taken for coding noise
CANDIDATES = 1 << 21  # pairs looked at together: bounds memory, not the result


@dataclass(frozen=True)
class Near:
    """When two pictures count as one: few hash bits apart *and* colours that agree.

    The hash sees grey structure only: two charts, or a red and a blue disc, can share it. `match` is the
    correlation of the 8x8 colour thumbnails (1 = equal up to brightness and contrast); -1 asks for the hash alone.
    """

    radius: int = 8
    match: float = 0.9

    def __post_init__(self):
        if not 0 <= self.radius <= 20:
            raise UserError(f"found radius {self.radius}; expected 0 to 20 of 64 bits (8 is a re-encoded picture)")
        if not -1 <= self.match <= 1:
            raise UserError(f"found match {self.match}; expected a correlation from -1 to 1")


@dataclass(frozen=True)
class Looks:
    """Of each picture its hash, uint64 [N], and its thumbnail, uint8 [N, T]."""

    hashes: np.ndarray
    thumbnails: np.ndarray

    def __len__(self) -> int:
        return len(self.hashes)

    def take(self, index: np.ndarray) -> "Looks":
        return Looks(self.hashes[index], self.thumbnails[index])


# --- a picture ---------------------------------------------------------------------------------------------

def look(images: Sequence[Image.Image]) -> Looks:
    """Hash and thumbnail of N pictures, from one downscale of each.

    The hash: two-dimensional DCT-II of the grey 32x32 picture, the 8x8 lowest frequencies without the constant
    row and column, one bit each: above the median or not (C. Zauner, "Implementation and Benchmarking of
    Perceptual Image Hash Functions", 2010, section 3.1; its 7x7 mean filter is the antialiased downscale
    here). Leaving out the constant terms makes it blind to brightness. A picture without structure hashes to
    0, where the rule as published would hash its noise.
    """
    small_NSS3 = np.stack([_downscale(image) for image in images]) if images else np.zeros((0, SIDE, SIDE, 3))
    thumbnails = small_NSS3.reshape(-1, 8, SIDE // 8, 8, SIDE // 8, 3).mean(axis=(2, 4)).round()
    return Looks(_hash(small_NSS3), thumbnails.astype(np.uint8).reshape(-1, THUMBNAIL))


def _downscale(image: Image.Image) -> np.ndarray:
    small = to_rgb(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.asarray(small, np.float32)


def _hash(small_NSS3: np.ndarray) -> np.ndarray:
    grey_NSS = small_NSS3 @ np.array([0.299, 0.587, 0.114], np.float32)
    basis_KS = _cosines()
    coefficients_NB = (basis_KS @ grey_NSS @ basis_KS.T).reshape(-1, KEPT * KEPT)
    bits_NB = coefficients_NB > np.median(coefficients_NB, axis=1, keepdims=True)
    bits_NB[np.abs(coefficients_NB).max(axis=1) < FLAT] = False
    return np.packbits(bits_NB, axis=1).view(">u8").astype(np.uint64).reshape(-1)


def _cosines() -> np.ndarray:
    """Rows 1..8 of the orthonormal DCT-II of length 32: float32 [8, 32]."""
    frequency, position = np.arange(1, KEPT + 1)[:, None], np.arange(SIDE)[None, :]
    return (np.sqrt(2 / SIDE) * np.cos(np.pi * frequency * (2 * position + 1) / (2 * SIDE))).astype(np.float32)


def colour_match(left_PT: np.ndarray, right_PT: np.ndarray) -> np.ndarray:
    """Correlation of thumbnails over pixels and channels: 1 when equal up to brightness and contrast. float32 [P].

    Structure of NOISE grey levels is added to both, so that two blank pictures match and a blank one matches
    nothing else.
    """
    left, right = (side.astype(np.float32) - side.mean(axis=1, keepdims=True) for side in (left_PT, right_PT))
    noise = NOISE**2 * THUMBNAIL
    product = (left * right).sum(axis=1) + noise
    return product / np.sqrt(((left**2).sum(axis=1) + noise) * ((right**2).sum(axis=1) + noise))


# --- pairs, twins, clusters --------------------------------------------------------------------------------

def near_pairs(looks: Looks, near: Near) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every pair i < j of rows that are near: (i [P], j [P], distance in bits [P]), sorted, each once."""
    found = [np.zeros((0, 3), np.int64)]
    for left, right, distance in _within(looks, None, near):
        found.append(np.stack([left, right, distance], axis=1))
    pairs_P3 = np.unique(np.concatenate(found), axis=0)
    return pairs_P3[:, 0], pairs_P3[:, 1], pairs_P3[:, 2]


def nearest(queries: Looks, corpus: Looks, near: Near) -> tuple[np.ndarray, np.ndarray]:
    """For each query the nearest corpus row that is near, the first of equals: (row or -1, distance or -1)."""
    # One integer per query orders by distance, then by position, so a minimum is all that is needed.
    none = np.iinfo(np.int64).max
    best = np.full(len(queries), none, np.int64)
    for query, position, distance in _within(queries, corpus, near):
        np.minimum.at(best, query, (distance << 40) | position)
    found = best != none
    return np.where(found, best & ((1 << 40) - 1), -1), np.where(found, best >> 40, -1)


def greedy_twins(looks: Looks, priority: np.ndarray, near: Near) -> tuple[np.ndarray, np.ndarray]:
    """Walk the rows by ascending `priority` (all different) and drop each one near an already kept one.

    So no two kept rows are near, and every dropped row is near a kept one: chains of small steps are not
    collapsed into one row, as connected components would. Returns (keeper [N], distance [N]): the kept row
    nearest to each dropped one, or the row itself.
    """
    order = np.argsort(priority)
    first, inverse = _distinct(looks.take(order))
    keeper_U, distance_U = _first_independent_set(looks.take(order[first]), first, near)
    # Rows that look exactly alike share their fate, at distance 0 of the best of them or of its keeper's.
    keeper, distance = np.empty(len(looks), np.int64), np.empty(len(looks), np.int64)
    keeper[order] = order[first[keeper_U[inverse]]]
    distance[order] = distance_U[inverse]
    return keeper, distance


def clusters(looks: Looks, near: Near) -> np.ndarray:
    """Connected components of "is near": one label per row, int [N]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first, inverse = _distinct(looks)
    left, right, _ = near_pairs(looks.take(first), near)
    graph = coo_array((np.ones(len(left), bool), (left, right)), shape=(len(first), len(first)))
    _, labels = connected_components(graph, directed=False)
    return labels[inverse]


def _distinct(looks: Looks) -> tuple[np.ndarray, np.ndarray]:
    """First row of each distinct (hash, thumbnail), and each row's place among those."""
    rows = np.ascontiguousarray(looks.thumbnails).view(f"V{THUMBNAIL}").reshape(-1)
    _, thumbnail = np.unique(rows, return_inverse=True) if len(rows) else (None, np.zeros(0, np.int64))
    _, hashes = np.unique(looks.hashes, return_inverse=True)
    _, first, inverse = np.unique(hashes * (len(rows) + 1) + thumbnail, return_index=True, return_inverse=True)
    return first, inverse


def _first_independent_set(looks: Looks, rank: np.ndarray, near: Near) -> tuple[np.ndarray, np.ndarray]:
    """The greedy choice in rounds: whoever has no undecided better neighbour stays, its neighbours go."""
    left, right, distance = near_pairs(looks, near)
    better = np.where(rank[left] < rank[right], left, right)
    worse = left + right - better
    dropped = np.zeros(len(looks), bool)
    open_better, open_worse = better, worse
    while len(open_worse):
        stays = ~dropped
        stays[open_worse] = False
        dropped[open_worse[stays[open_better]]] = True
        undecided = ~dropped[open_better] & ~dropped[open_worse]
        open_better, open_worse = open_better[undecided], open_worse[undecided]

    keeper, gap = np.arange(len(looks)), np.zeros(len(looks), np.int64)
    choice = np.flatnonzero(~dropped[better] & dropped[worse])
    choice = choice[np.lexsort((rank[better[choice]], distance[choice], worse[choice]))]
    _, nearest_first = np.unique(worse[choice], return_index=True)
    choice = choice[nearest_first]
    keeper[worse[choice]], gap[worse[choice]] = better[choice], distance[choice]
    return keeper, gap


# --- the index ---------------------------------------------------------------------------------------------

def _within(queries: Looks, corpus: Looks | None, near: Near) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield chunks of (query, corpus row, distance) that are near; one pair may come more than once.

    Without a corpus the queries are searched among themselves, and a pair comes as (smaller, larger) only.

    Blocks of bits, as in Manku et al., "Detecting near-duplicates for web crawling", 2007: cut the 64 bits into
    radius + k blocks; two hashes within the radius differ in at most `radius` blocks, so they are equal in
    some k. For each choice of k blocks only hashes that are equal there are compared.
    """
    once, corpus = corpus is None, queries if corpus is None else corpus
    for mask in _masks(near.radius, len(corpus)):
        order = np.argsort(corpus.hashes & mask, kind="stable")
        keys = (corpus.hashes & mask)[order]
        start = np.searchsorted(keys, queries.hashes & mask, side="left")
        count = np.searchsorted(keys, queries.hashes & mask, side="right") - start
        for chunk in _chunks(count):
            query = np.repeat(np.arange(chunk.start, chunk.stop), count[chunk])
            step = np.arange(len(query)) - np.repeat(np.cumsum(count[chunk]) - count[chunk], count[chunk])
            row = order[start[query] + step]
            if once:
                query, row = query[query < row], row[query < row]
            yield _confirmed(queries, corpus, query, row, near)


def _confirmed(queries: Looks, corpus: Looks, query: np.ndarray, row: np.ndarray, near: Near) -> tuple:
    distance = np.bitwise_count(queries.hashes[query] ^ corpus.hashes[row]).astype(np.int64)
    close = distance <= near.radius
    query, row, distance = query[close], row[close], distance[close]
    agree = np.ones(len(query), bool)
    for start in range(0, len(query) if near.match > -1 else 0, 1 << 16):
        part = slice(start, start + (1 << 16))
        agree[part] = colour_match(queries.thumbnails[query[part]], corpus.thumbnails[row[part]]) >= near.match
    return query[agree], row[agree], distance[agree]


def _masks(radius: int, rows: int) -> list[np.uint64]:
    """The bit masks of one search, with the k that costs least for this many rows."""

    def cost(k: int) -> float:
        bits = 64 * k / (radius + k)
        return comb(radius + k, k) * (log2(rows + 2) + rows / 2**bits)

    k = min(range(1, 5), key=cost)
    edges = np.linspace(0, 64, radius + k + 1).round().astype(int)
    blocks = [((1 << int(b - a)) - 1) << int(a) for a, b in itertools.pairwise(edges)]
    return [np.uint64(sum(choice)) for choice in itertools.combinations(blocks, k)]


def _chunks(count: np.ndarray) -> Iterator[slice]:
    """Slices of queries with about CANDIDATES candidates each."""
    total = np.cumsum(count)
    if not len(total):
        return
    start = 0
    for stop in np.searchsorted(total, np.arange(CANDIDATES, total[-1] + CANDIDATES, CANDIDATES), side="left") + 1:
        stop = min(int(stop), len(count))
        if stop > start:
            yield slice(start, stop)
            start = stop
