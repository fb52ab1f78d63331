"""Pictures that a model made, against real ones.

Shapes: N pictures, E width of the features.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics.result import MetricResult


def fid(made: Mapping[Any, np.ndarray], real: Mapping[Any, np.ndarray]) -> MetricResult:
    """Frechet distance between the features [E] of pictures made and of real ones; 0 is best, and it has no bound.

    The published scale is that of InceptionV3's 2,048 features and 50,000 pictures; another extractor has its own. With
    few pictures the distance comes out too large: with no more than E of them the covariance hasn't full rank, and
    numbers compare only at equal counts.

    Args:
        made, real: features by picture. The ids need not agree; the sets are compared as wholes.

    Returns:
        details: `mean`, the part from the means; `covariance`, the rest; `made`, `real`, how many; `full_rank`.

    Source: arXiv 1706.08500, equation 6.
    """
    made_NE, real_NE = _features(made, "made"), _features(real, "real")
    width = real_NE.shape[1]
    if made_NE.shape[1] != width:
        raise UserError(f"fid: found features {made_NE.shape[1]} and {width} wide; expected those of one extractor")
    moments = [(x.mean(axis=0), np.cov(x, rowvar=False).reshape(width, width)) for x in (made_NE, real_NE)]
    (mean_E, cov_EE), (real_mean_E, real_cov_EE) = moments
    of_means = float(np.sum((mean_E - real_mean_E) ** 2))
    distance = frechet_distance(mean_E, cov_EE, real_mean_E, real_cov_EE)
    counts = {"made": len(made_NE), "real": len(real_NE)}
    details = {"mean": of_means, "covariance": distance - of_means, **counts}
    return MetricResult(distance, {}, details | {"full_rank": min(counts.values()) > width})


def frechet_distance(mean_E: np.ndarray, cov_EE: np.ndarray, other_E: np.ndarray, other_EE: np.ndarray) -> float:
    """|m - m'|² + tr(C + C' - 2 (C C')^½), of two normal distributions; also for published means and covariances.

    The trace of the root is the sum of singular values of C^½ C'^½. That stays real and finite where covariances are
    singular, for which the usual root of the product needs a correction.
    """
    roots = [_root(np.asarray(c, dtype=np.float64)) for c in (cov_EE, other_EE)]
    shared = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    apart = np.sum((np.asarray(mean_E, dtype=np.float64) - np.asarray(other_E, dtype=np.float64)) ** 2)
    return max(0.0, float(apart + np.trace(cov_EE) + np.trace(other_EE) - 2 * shared))


def _root(cov_EE: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(cov_EE)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def _features(features: Mapping[Any, np.ndarray], what: str) -> np.ndarray:
    if len(features) < 2:
        raise UserError(f"fid: found {len(features)} pictures {what}; expected at least two, thousands for use")
    rows = {sample: np.asarray(row, dtype=np.float64) for sample, row in features.items()}
    width = next(iter(rows.values())).shape
    for sample, row in rows.items():
        if row.ndim != 1 or row.shape != width or not row.size or not np.isfinite(row).all():
            raise UserError(f"fid: found features of shape {row.shape} for {sample!r}; expected finite [{width}]")
    return np.stack(list(rows.values()))
