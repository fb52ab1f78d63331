"""The rules on embeddings: clusters near a reference set, SemDeDup, and evaluation pictures found by their embedding.

Only these read embeddings, of the rows that are still alive, and hold them as float16.
Legend: A rows still alive, R reference vectors, K centroids, E width. All vectors are of unit length.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlmpipe import shards
from vlmpipe.curate.columns import Rows
from vlmpipe.curate.rules import Drops
from vlmpipe.errors import UserError

CHUNK = 1 << 22  # similarities computed at once


@dataclass(frozen=True)
class ImageClusters:
    """Keeps rows whose nearest centroid is the nearest one of some reference vector: DataComp's image-based filter.

    `reference` and `centroids` are files of vectors (see `read_vectors`); without `centroids` they are found by
    k-means on the rows that reach the rule, `clusters` of them. Nearest is by inner product. Value: that product.
    Source: mlfoundations/datacomp, baselines/apply_filter.py, image_filter_helper (100,000 centroids, ImageNet-1k).
    """

    reference: Path
    centroids: Path | None = None
    clusters: int = 1000
    iterations: int = 20
    seed: int = 0
    column: str = "image_embedding"
    alone: ClassVar = False

    def __post_init__(self):
        _at_least_one(clusters=self.clusters, iterations=self.iterations)

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        _, reference_RE = read_vectors(self.reference)
        vectors_AE, known = _unit(rows.vectors(self.column, alive))
        if self.centroids is not None:
            _, centroids_KE = read_vectors(self.centroids)
        else:
            centroids_KE = kmeans(vectors_AE[known], self.clusters, self.iterations, self.seed)
        _same_width(self.reference, reference_RE, vectors_AE)
        _same_width(self.centroids or self.reference, centroids_KE, vectors_AE)
        wanted = np.unique(nearest_rows(_unit(reference_RE)[0], centroids_KE)[0])
        which, product = nearest_rows(vectors_AE, centroids_KE)
        bad = ~(known & np.isin(which, wanted))
        return Drops(alive[bad], np.where(known, product, np.nan)[bad], missing=~known[bad])


@dataclass(frozen=True)
class SemanticDuplicate:
    """SemDeDup: within k-means clusters, farthest from the centroid first, drops a row whose greatest similarity to an
    earlier one exceeds 1 - `eps`.

    Source: Abbas et al., arXiv 2303.09540, and facebookresearch/SemDeDup: "earlier" counts rows that were dropped
    themselves; the row that is named is the one that stayed at the end of that chain. Value: the similarity.
    """

    eps: float = 0.05
    clusters: int = 100
    iterations: int = 20
    seed: int = 0
    column: str = "image_embedding"
    alone: ClassVar = False

    def __post_init__(self):
        _at_least_one(clusters=self.clusters, iterations=self.iterations)
        if not 0 <= self.eps <= 2:
            raise UserError(f"found eps {self.eps}; expected a cosine distance from 0 to 2 (0.05 is near-identical)")

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        vectors_AE, known = _unit(rows.vectors(self.column, alive))
        places = np.flatnonzero(known)
        centroids_KE = kmeans(vectors_AE[places], self.clusters, self.iterations, self.seed)
        cluster, product = nearest_rows(vectors_AE[places], centroids_KE)
        similarity, earlier = np.full(len(alive), -np.inf), np.full(len(alive), -1)
        order = np.lexsort((product, cluster))  # the smallest product is the farthest
        edges = np.searchsorted(cluster[order], np.arange(len(centroids_KE) + 1))
        for start, stop in itertools.pairwise(edges):
            members = places[order[start:stop]]
            best, who = greatest_before(vectors_AE[members])
            similarity[members], earlier[members] = best, members[who]
        bad = (similarity > 1 - self.eps) | ~known
        keeper = _end_of_chain(np.where(similarity > 1 - self.eps, earlier, np.arange(len(alive))))
        missing = ~known[bad]
        value = np.where(missing, np.nan, similarity[bad])
        return Drops(alive[bad], value, 1 - self.eps, np.where(missing, -1, alive[keeper[bad]]), missing=missing)


@dataclass(frozen=True)
class EvaluationEmbedding:
    """Drops rows whose embedding has a cosine of at least `min_cosine` with one of an evaluation set. Value: that.

    `references` are files of vectors of evaluation pictures (see `read_vectors`), by the scorer that embedded the pool.
    .604169 is the limit of LAION's and DataComp's decontamination, on features trained for copy detection (SSCD);
    other embeddings need one of their own.
    """

    references: tuple[Path, ...]
    min_cosine: float = 0.604169
    column: str = "image_embedding"
    alone: ClassVar = False

    def __post_init__(self):
        if not self.references:
            raise UserError("found no references; expected at least one file of embeddings")

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        vectors_AE, known = _unit(rows.vectors(self.column, alive))
        names, parts = [], []
        for path in self.references:
            found, reference_RE = read_vectors(path)
            _same_width(path, reference_RE, vectors_AE)
            names += found
            parts.append(_unit(reference_RE)[0])
        which, cosine = nearest_rows(vectors_AE, np.concatenate(parts))
        bad = (known & (cosine >= self.min_cosine)) | ~known
        missing = ~known[bad]
        others = pa.array(names, pa.string()).take(pa.array(which[bad], mask=missing))
        value = np.where(missing, np.nan, cosine[bad])
        return Drops(alive[bad], value, self.min_cosine, names=others, missing=missing)


def _at_least_one(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise UserError(f"found {name} {value}; expected at least 1")


def _end_of_chain(earlier: np.ndarray) -> np.ndarray:
    """Follow `earlier` until it stands still."""
    while (further := earlier[earlier]).tolist() != earlier.tolist():
        earlier = further
    return earlier


# --- vectors -----------------------------------------------------------------------------------------------

def read_vectors(path: Path) -> tuple[list[str], np.ndarray]:
    """Names and vectors [R, E] of a .npy file, a parquet file or a directory of annotations (`image_embedding`).

    Raises:
        UserError: there is nothing of the kind.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            vectors = np.load(path)
            names = [f"{path.stem}[{row}]" for row in range(len(vectors))]
        else:
            columns = ["uid", "image_embedding"]
            table = shards.read_rows(path, columns) if path.is_dir() else pq.read_table(path, columns=columns)
            table = table.filter(table["image_embedding"].is_valid())
            names = table["uid"].to_pylist()
            column = table["image_embedding"].combine_chunks()
            vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1) if len(table) else None
    except (OSError, ValueError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"can't read vectors from {path} ({str(error).splitlines()[0]}); expected a .npy file [R, E] "
                        f"or parquet with uid and image_embedding; `python -m vlmpipe embed` writes one") from None
    if vectors is None or vectors.ndim != 2 or not len(vectors):
        raise UserError(f"{path}: found no vectors; expected an array [R, E] with at least one row")
    return names, vectors


def _same_width(path: Path, vectors: np.ndarray, rows_AE: np.ndarray) -> None:
    if len(rows_AE) and vectors.shape[1] != rows_AE.shape[1]:
        raise UserError(f"{path}: found vectors of width {vectors.shape[1]}; expected {rows_AE.shape[1]}, as the "
                        f"pool's embeddings; embed both with one scorer")


def _unit(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of unit length (zeros where there is none), and whether there is one. float16 stays float16."""
    known = np.zeros(len(vectors), bool)
    unit = np.zeros_like(vectors)
    for part in _parts(len(vectors), vectors.shape[1]):
        values = vectors[part].astype(np.float32)
        norm = np.linalg.norm(values, axis=1)
        known[part] = np.isfinite(norm) & (norm > 0)
        unit[part][known[part]] = values[known[part]] / norm[known[part], None]
    return unit, known


def _parts(rows: int, width: int) -> Iterator[slice]:
    step = max(CHUNK // max(width, 1), 1)
    return (slice(start, start + step) for start in range(0, rows, step))


def nearest_rows(vectors_AE: np.ndarray, others_KE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each vector the other with the greatest inner product (its position; the first of equals), and the product."""
    which, product = np.zeros(len(vectors_AE), np.int64), np.zeros(len(vectors_AE), np.float32)
    others_EK = others_KE.astype(np.float32).T
    for part in _parts(len(vectors_AE), len(others_KE)):
        products_PK = vectors_AE[part].astype(np.float32) @ others_EK
        which[part] = products_PK.argmax(axis=1)
        product[part] = np.take_along_axis(products_PK, which[part][:, None], axis=1)[:, 0]
    return which, product


def greatest_before(vectors_NE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row the greatest inner product with a row before it, and which; -inf and itself for the first."""
    count = len(vectors_NE)
    best, who = np.full(count, -np.inf, np.float32), np.arange(count)
    vectors_NE = vectors_NE.astype(np.float32)
    for part in _parts(count, count):
        products_PN = vectors_NE[part] @ vectors_NE[: part.stop].T
        rows = np.arange(part.start, min(part.stop, count))
        products_PN[np.arange(products_PN.shape[1])[None, :] >= rows[:, None]] = -np.inf
        found = products_PN.argmax(axis=1)
        top = np.take_along_axis(products_PN, found[:, None], axis=1)[:, 0]
        best[part], who[part] = top, np.where(np.isfinite(top), found, rows)
    return best, who


def kmeans(vectors_NE: np.ndarray, clusters: int, iterations: int, seed: int) -> np.ndarray:
    """Spherical k-means (Lloyd, centroids of unit length): float32 [K, E], K at most the number of vectors.

    Starts from `clusters` different rows; an empty cluster takes the vector that fits its own centroid worst.
    """
    rng = np.random.default_rng(seed)
    if not len(vectors_NE):
        return np.zeros((0, vectors_NE.shape[1]), np.float32)
    start = np.sort(rng.choice(len(vectors_NE), min(clusters, len(vectors_NE)), replace=False))
    centroids_KE, before = vectors_NE[start].astype(np.float32), None
    for _ in range(iterations):
        which, product = nearest_rows(vectors_NE, centroids_KE)
        if before is not None and np.array_equal(which, before):
            break
        before = which
        centroids_KE = _means(vectors_NE, which, product, len(centroids_KE))
    return centroids_KE


def _means(vectors_NE: np.ndarray, which: np.ndarray, product: np.ndarray, clusters: int) -> np.ndarray:
    sums_KE = np.zeros((clusters, vectors_NE.shape[1]), np.float32)
    for part in _parts(len(vectors_NE), vectors_NE.shape[1]):
        np.add.at(sums_KE, which[part], vectors_NE[part].astype(np.float32))
    norm_K = np.linalg.norm(sums_KE, axis=1, keepdims=True)
    empty = np.flatnonzero(norm_K[:, 0] == 0)
    sums_KE[empty] = vectors_NE[np.argsort(product, kind="stable")[: len(empty)]]
    norm_K[empty] = 1
    return sums_KE / norm_K
