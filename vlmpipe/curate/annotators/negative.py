"""negCLIPLoss: how much better a pair fits than the pair's picture and caption fit others. Over a whole pool.

Legend: R rows of the pool that have embeddings, B rows of a random batch, E width of the embeddings.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlmpipe.curate.annotators.base import embedding_rows, floats
from vlmpipe.curate.annotators.loop import error_field
from vlmpipe.errors import UserError

NAME = "neg_clip_loss"
FIELDS = (floats(NAME), error_field(NAME))
BLOCK = 512  # rows of a similarity matrix in memory


@dataclass(frozen=True)
class NegClipLossConfig:
    """Wang et al., "CLIPLoss and norm-based data selection", arXiv 2405.19547.

    A pair's cosine less half of its two normalisers, cos - (t/2) ln sum_j exp(s_ij/t) - (t/2) ln sum_i exp(s_ij/t), in
    a random batch of `batch` rows of the pool at `temperature` t, averaged over `repeats` ways to deal the pool into
    batches, which `seed` names. The rows of a pool are dealt as evenly as can be.
    """

    batch: int = 32_768
    temperature: float = 0.01
    repeats: int = 3
    seed: int = 0

    def __post_init__(self):
        if min(self.batch, self.repeats) < 1 or not self.temperature > 0:
            raise UserError(f"found batch {self.batch}, repeats {self.repeats}, temperature {self.temperature}; "
                            f"expected at least 1, 1 and more than 0")


def pool_losses(tables: Sequence[Path], config: NegClipLossConfig) -> np.ndarray:
    """float32 [rows of all tables]: each row's value, NaN without embeddings.

    The embeddings wait in a temporary file, so memory holds two batches and a few numbers a row.
    """
    here = [pq.read_table(path, columns=["image_embedding"]).column(0).is_valid().to_numpy() for path in tables]
    scored = np.flatnonzero(np.concatenate([np.zeros(0, bool), *here]))
    losses = np.full(sum(map(len, here)), np.nan, np.float32)
    if len(scored):
        with tempfile.TemporaryDirectory(prefix="vlmpipe-", dir=tables[0].parent) as folder:
            image_RE, text_RE = (_spooled(Path(folder) / name, tables, name, len(scored))
                                 for name in ("image_embedding", "text_embedding"))
            losses[scored] = averaged(image_RE, text_RE, config)
    return losses


def _spooled(file: Path, tables: Sequence[Path], column: str, rows: int) -> np.ndarray:
    """All rows' embeddings as a float16 [R, E] array in a file."""
    array, at = None, 0
    for path in tables:
        found = pq.read_table(path, columns=[column]).column(0).combine_chunks().drop_null()
        if len(found):
            part = embedding_rows(found)
            if array is None:
                array = np.memmap(file, np.float16, "w+", shape=(rows, part.shape[1]))
            array[at : at + len(part)] = part
            at += len(part)
    return array


def averaged(image_RE: np.ndarray, text_RE: np.ndarray, config: NegClipLossConfig) -> np.ndarray:
    """float32 [R]: the mean over the repeats."""
    total = np.zeros(len(image_RE), np.float64)
    rng = np.random.default_rng(config.seed)
    for _ in range(config.repeats):
        for chosen in dealt(len(image_RE), config.batch, rng):
            image_BE, text_BE = (rows[chosen].astype(np.float32) for rows in (image_RE, text_RE))
            total[chosen] += batch_losses(image_BE, text_BE, config.temperature)
    return (total / config.repeats).astype(np.float32)


def dealt(rows: int, batch: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """All rows in random batches of nearly equal size, at most `batch`."""
    for chosen in np.array_split(rng.permutation(rows), -(-rows // batch)):
        yield np.sort(chosen)  # read in the order of the file


def batch_losses(image_BE: np.ndarray, text_BE: np.ndarray, temperature: float) -> np.ndarray:
    """float64 [B] of unit embeddings: the formula of `NegClipLossConfig` in one batch."""
    count = len(image_BE)
    by_image, peak, total = np.empty(count), np.full(count, -np.inf), np.zeros(count)
    for start in range(0, count, BLOCK):
        logits = image_BE[start : start + BLOCK] @ text_BE.T
        logits /= np.float32(temperature)
        by_image[start : start + BLOCK] = _logsumexp(logits)
        # The columns' sums grow block by block, each relative to its highest logit so far.
        higher = np.maximum(peak, logits.max(axis=0))
        total = total * np.exp(peak - higher) + np.exp(logits - higher.astype(np.float32)).sum(axis=0, dtype=np.float64)
        peak = higher
    cosine = (image_BE * text_BE).sum(axis=1, dtype=np.float64)
    return cosine - temperature / 2 * (by_image + peak + np.log(total))


def _logsumexp(logits: np.ndarray) -> np.ndarray:
    peak = logits.max(axis=1)
    return peak + np.log(np.exp(logits - peak[:, None]).sum(axis=1, dtype=np.float64))


def arrays(losses: np.ndarray) -> list[pa.Array]:
    """The columns of FIELDS for some rows."""
    absent = np.isnan(losses)
    reasons = pa.array(np.full(len(losses), "no image_embedding"), pa.string(), mask=~absent)
    return [pa.array(losses, pa.float32(), mask=absent), reasons]
