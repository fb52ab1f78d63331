"""What a metric returns, and the checks that all metrics share."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlmpipe.errors import UserError


@dataclass(frozen=True)
class MetricResult:
    """`value` sums up; `per_sample` holds each sample's share by id, where the metric decomposes."""

    value: float
    per_sample: dict[Any, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def check_same_samples(found: Mapping, expected: Mapping, metric: str) -> None:
    """Raise `UserError` unless both mappings hold the same sample ids and there is at least one."""
    if not expected:
        raise UserError(f"{metric}: found no samples; expected at least one; check the evaluation set")
    for odd, what in (
        (expected.keys() - found.keys(), "no prediction for"),
        (found.keys() - expected.keys(), "predictions for unknown"),
    ):
        if odd:
            example = min(odd, key=str)
            raise UserError(f"{metric}: found {what} samples ({len(odd)}, such as {example!r}); expected one each")


def mean(values: Mapping[Any, float]) -> float:
    return math.fsum(values.values()) / len(values)


def truth_value(value: Any, sample: Any, metric: str) -> bool:
    """A yes or no: a bool, or 0 or 1 as annotation files write it."""
    if isinstance(value, bool | np.bool_) or (isinstance(value, int | np.integer) and value in (0, 1)):
        return bool(value)
    raise UserError(f"{metric}: found {value!r} for {sample!r}; expected true or false")


def probability(value: Any, sample: Any, metric: str) -> float:
    """A number from 0 to 1; NaN is none."""
    if isinstance(value, str) or value is None or not 0 <= float(value) <= 1:
        raise UserError(f"{metric}: found {value!r} for {sample!r}; expected a probability from 0 to 1")
    return float(value)


def unit_vector(vector: Any, sample: Any, metric: str) -> np.ndarray:
    """`vector` [E] as float64 of length one. A zero vector has no direction: it is refused like NaN."""
    values = np.asarray(vector, dtype=np.float64)
    length = np.linalg.norm(values)
    if values.ndim != 1 or not np.isfinite(length) or length == 0:
        raise UserError(
            f"{metric}: found an embedding of shape {values.shape} and length {length} for {sample!r}; "
            f"expected one finite vector that is not zero"
        )
    return values / length
