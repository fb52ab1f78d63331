"""How sure a model is of text and of itself: perplexity and calibration."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics.result import MetricResult, check_same_samples, probability, truth_value


def perplexity(nll: Mapping[Any, float], tokens: Mapping[Any, int]) -> MetricResult:
    """exp(total negative log-likelihood / total tokens), over all tokens of all samples.

    Args:
        nll: each sample's summed negative log-likelihood in nats. tokens: how many tokens that sum covers.
    """
    check_same_samples(nll, tokens, "perplexity")
    for sample, count in tokens.items():
        if count < 1 or not math.isfinite(nll[sample]):
            raise UserError(
                f"perplexity: found a loss of {nll[sample]} over {count} tokens for {sample!r}; "
                f"expected a finite loss over at least one token"
            )
    total = math.fsum(nll.values()) / sum(tokens.values())
    per_sample = {sample: _exp(nll[sample] / count) for sample, count in tokens.items()}
    return MetricResult(_exp(total), per_sample, {"nats_per_token": total, "tokens": sum(tokens.values())})


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        raise UserError(f"perplexity: found {nats:.0f} nats per token; expected less than 710") from None


def calibration_error(
    confidences: Mapping[Any, float], correct: Mapping[Any, bool], bins: int = 15
) -> MetricResult:
    """Expected calibration error: by how much confidence and accuracy differ, averaged over bins of confidence.

    The bins are of equal width. A confidence on an edge belongs to the bin below it, (low, high], and 0 to the first.

    Returns:
        value: the mean of |accuracy - confidence| over the bins, weighted by their samples. details: `max`, the worst
        bin's, and `bins`, for each bin that has samples: its edges, count, mean confidence and accuracy.

    Source: arXiv 1706.04599, equations 3 and 5.
    """
    right, sure, bin_of, edges = _binned(confidences, correct, bins)
    rows = [
        {
            "low": float(edges[b]), "high": float(edges[b + 1]), "count": int((bin_of == b).sum()),
            "confidence": float(sure[bin_of == b].mean()), "accuracy": float(right[bin_of == b].mean()),
        }
        for b in np.unique(bin_of)
    ]
    gaps = [abs(row["accuracy"] - row["confidence"]) for row in rows]
    value = math.fsum(gap * row["count"] for gap, row in zip(gaps, rows, strict=True)) / len(sure)
    return MetricResult(value, {}, {"max": max(gaps), "bins": rows})


def calibration_counts(
    confidences: Mapping[Any, float], correct: Mapping[Any, bool], bins: int = 15
) -> dict[Any, list[float]]:
    """What each sample gives to `calibration_error`: confidence minus right or wrong in its bin [bins], and 1.

    The error of any samples is the sum of the absolute sums of bins over the last sum.
    """
    right, sure, bin_of, _ = _binned(confidences, correct, bins)
    counts_NM = np.zeros((len(sure), bins + 1))
    counts_NM[np.arange(len(sure)), bin_of] = sure - right
    counts_NM[:, -1] = 1.0
    return dict(zip(correct, counts_NM.tolist(), strict=True))


def _binned(
    confidences: Mapping[Any, float], correct: Mapping[Any, bool], bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Right or wrong, confidence, and bin of each sample [N]; the bins' edges."""
    check_same_samples(confidences, correct, "calibration_error")
    if bins < 1:
        raise UserError(f"calibration_error: found {bins} bins; expected at least one")
    right = np.array([truth_value(value, sample, "calibration_error") for sample, value in correct.items()])
    sure = np.array([probability(confidences[sample], sample, "calibration_error") for sample in correct])
    edges = np.linspace(0.0, 1.0, bins + 1)
    return right, sure, np.maximum(np.searchsorted(edges, sure, side="left") - 1, 0), edges
