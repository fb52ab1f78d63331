"""How pictures look, and who looks like whom: without comparing everything with everything.

Shape legend: N pictures, P pairs, S = 32 pixels, B = 64 bits, T = 192 bytes of an 8x8 RGB thumbnail.
A hash is one uint64; distances are Hamming, in bits of 64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vlmpipe.curate import hamming
from vlmpipe.errors import UserError
from vlmpipe.images import to_rgb

SIDE = 32  # a picture is looked at in SIDE x SIDE pixels
KEPT = 8  # frequencies 1..KEPT of each direction make the KEPT * KEPT = 64 bits
FLAT = 4.0  # largest coefficient, in grey levels times the transform's gain, of a picture without structure
THUMBNAIL = 8 * 8 * 3
NOISE = 1.0  # grey levels: below this a thumbnail's structure is taken for coding noise
NONE = np.iinfo(np.int64).max


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
    groups = hamming.Groups.of(looks.hashes)
    many = np.diff(groups.start)
    source, target = _with_themselves(*hamming.pairs_within(groups.hashes, near.radius), np.flatnonzero(many > 1))
    found = [np.zeros((0, 3), np.int64)]
    # Each row of one group stands against all of the other: a chunk holds whole rows.
    owner, left = groups.expand(source)
    for chunk in hamming.chunks(many[target[owner]]):
        row, right = groups.expand(target[owner[chunk]])
        one, two = left[chunk][row], right
        one, two = np.minimum(one, two), np.maximum(one, two)
        agree = _agree(looks.thumbnails, one, two, near) & (one != two)
        distance = np.bitwise_count(looks.hashes[one[agree]] ^ looks.hashes[two[agree]]).astype(np.int64)
        found.append(np.stack([one[agree], two[agree], distance], axis=1))
    pairs_P3 = np.unique(np.concatenate(found), axis=0)
    return pairs_P3[:, 0], pairs_P3[:, 1], pairs_P3[:, 2]


def nearest(queries: Looks, corpus: Looks, near: Near) -> tuple[np.ndarray, np.ndarray]:
    """For each query the nearest corpus row that is near, the first of equals: (row or -1, distance or -1)."""
    query, position = hamming.matches_within(queries.hashes, corpus.hashes, near.radius)
    agree = np.ones(len(query), bool)
    if near.match > -1:  # only pictures whose hash is near are looked at
        seen, place = np.unique(query, return_inverse=True)
        agree = _agree_across(queries.take(seen).thumbnails, corpus.thumbnails, place, position, near)
    query, position = query[agree], position[agree]
    distance = np.bitwise_count(queries.hashes[query] ^ corpus.hashes[position]).astype(np.int64)
    # One integer per query orders by distance, then by position, so a minimum is all that is needed.
    best = np.full(len(queries), NONE, np.int64)
    np.minimum.at(best, query, (distance << 40) | position)
    known = best != NONE
    return np.where(known, best & ((1 << 40) - 1), -1), np.where(known, best >> 40, -1)


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


def _with_themselves(left: np.ndarray, right: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of groups, and each of `groups` with itself."""
    return np.concatenate([left, groups]), np.concatenate([right, groups])


def _agree(thumbnails: np.ndarray, one: np.ndarray, two: np.ndarray, near: Near) -> np.ndarray:
    """Whether the colours of rows `one` and `two` [P] match."""
    return _agree_across(thumbnails, thumbnails, one, two, near)


def _agree_across(left: np.ndarray, right: np.ndarray, one: np.ndarray, two: np.ndarray, near: Near) -> np.ndarray:
    agree = np.ones(len(one), bool)
    for start in range(0, len(one) if near.match > -1 else 0, 1 << 16):
        part = slice(start, start + (1 << 16))
        agree[part] = colour_match(left[one[part]], right[two[part]]) >= near.match
    return agree


# --- the walk ----------------------------------------------------------------------------------------------

def greedy_twins(looks: Looks, priority: np.ndarray, near: Near) -> tuple[np.ndarray, np.ndarray]:
    """Walk the rows by ascending `priority` (all different) and drop each one near an already kept one.

    So no two kept rows are near, and every dropped row is near a kept one: chains of small steps are not
    collapsed into one row, as connected components would. Returns (keeper [N], distance [N]): the kept row of
    better priority that is nearest to each dropped one, or the row itself. Only rows whose hash is near another's
    have their thumbnail looked at, so `looks` may be any object with `hashes` and `take`.
    """
    keeper, distance = np.arange(len(looks)), np.zeros(len(looks), np.int64)
    groups = hamming.Groups.of(looks.hashes)
    left, right = hamming.pairs_within(groups.hashes, near.radius)
    touched = np.diff(groups.start) > 1
    touched[left] = touched[right] = True
    group, rows = groups.expand(np.flatnonzero(touched))
    order = np.lexsort((priority[rows], group))
    group, rows = group[order], rows[order]
    renumbered = np.cumsum(touched) - 1
    bits = np.bitwise_count(groups.hashes[left] ^ groups.hashes[right]).astype(np.int64)
    thumbnails = looks.take(rows).thumbnails if near.match > -1 else np.zeros((0, THUMBNAIL), np.uint8)
    walk = _Walk(group, priority[rows], (renumbered[left], renumbered[right], bits), thumbnails, near)
    best = walk.run()
    lost = np.flatnonzero(best != NONE)
    keeper[rows[lost]] = rows[walk.by_rank[best[lost] & ((1 << 40) - 1)]]
    distance[rows[lost]] = best[lost] >> 40
    return keeper, distance


class _Walk:
    """The sequential walk in rounds, over groups of equal hashes.

    Of each group the best undecided row stands for it. One that is better than all that stand for the groups near
    its own can no longer be dropped: it stays, and whoever is near it goes. `rank` orders M rows, which
    come sorted by (group, rank); `edges` are pairs of different groups and their distances.
    """

    def __init__(self, group: np.ndarray, rank: np.ndarray, edges: tuple, thumbnails: np.ndarray, near: Near):
        self.group, self.thumbnails, self.near = group, thumbnails, near
        self.by_rank = np.argsort(rank)
        self.rank = np.empty(len(rank), np.int64)
        self.rank[self.by_rank] = np.arange(len(rank))
        groups = int(group[-1]) + 1 if len(group) else 0
        self.start = np.searchsorted(group, np.arange(groups + 1))
        left, right, distance = edges
        own = np.arange(groups)
        self.source, self.target = np.concatenate([left, right, own]), np.concatenate([right, left, own])
        self.distance = np.concatenate([distance, distance, np.zeros(groups, np.int64)])
        order = np.argsort(self.source, kind="stable")
        self.source, self.target, self.distance = self.source[order], self.target[order], self.distance[order]
        self.first_edge = np.searchsorted(self.source, np.arange(groups + 1))
        self.best = np.full(len(group), NONE, np.int64)  # of each dropped row: distance << 40 | rank of its keeper
        self.kept = np.zeros(len(group), bool)

    def run(self) -> np.ndarray:
        undecided, source, target = np.arange(len(self.group)), self.source, self.target
        while len(undecided):
            standing = np.full(len(self.start), NONE, np.int64)
            heads = undecided[np.diff(self.group[undecided], prepend=-1) > 0]
            standing[self.group[heads]] = self.rank[heads]
            open_edges = (standing[source] != NONE) & (standing[target] != NONE)
            source, target = source[open_edges], target[open_edges]
            lowest = np.full(len(self.start), NONE, np.int64)
            np.minimum.at(lowest, source, standing[target])
            winners = heads[self.rank[heads] <= lowest[self.group[heads]]]
            self.kept[winners] = True
            self._drop_near(winners)
            undecided = undecided[~self.kept[undecided] & (self.best[undecided] == NONE)]
        return self.best

    def _drop_near(self, winners: np.ndarray) -> None:
        """Give every row near a winner, and behind it, the winner for its keeper if none is nearer."""
        first = self.first_edge[self.group[winners]]
        owner, edge = hamming.expand(first, self.first_edge[self.group[winners] + 1] - first)
        winner, start = winners[owner], self.start[self.target[edge]]
        count = self.start[self.target[edge] + 1] - start
        for chunk in hamming.chunks(count):
            which, row = hamming.expand(start[chunk], count[chunk])
            one, distance = winner[chunk][which], self.distance[edge[chunk]][which]
            behind = (self.rank[row] > self.rank[one]) & ~self.kept[row]
            one, row, distance = one[behind], row[behind], distance[behind]
            agree = _agree(self.thumbnails, one, row, self.near)
            np.minimum.at(self.best, row[agree], (distance[agree] << 40) | self.rank[one[agree]])
