"""How far the data moved since the champion's: score quantiles, language mix, success rate and share kept.

The reference is what the data gate saw when the champion was made (`audit` in results/<profile>/champion.json).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from vlmpipe.errors import UserError
from vlmpipe.shards import read_json

QUANTILES = {"p05": 0.05, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p95": 0.95}
SCORE, LANGUAGE = "annotations.score_", "selection.language."
SHARES = {"download.success_rate": "success_rate", "selection.kept_fraction": "kept_fraction"}
NOISE = 3.0  # standard errors that a share may be off beside its margin, on either side
FIRST = "drift: no earlier version of the data to compare with"
OFF = "drift: not compared (audit.expectations.drift is null)"


@dataclass(frozen=True)
class Drift:
    """How far a number may lie from the champion's, up or down: scores in raw cosine, the others in shares of rows."""

    scores: float = 0.05
    languages: float = 0.1
    success_rate: float = 0.1
    kept_fraction: float = 0.15

    def __post_init__(self):
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise UserError(f"{field.name}: found {getattr(self, field.name)}; expected more than 0; raise it")


def quantiles(scores: np.ndarray) -> dict[str, float]:
    """The quantiles of the finite scores by metric name; none where there is no score."""
    scores = scores[np.isfinite(scores)]
    return {f"{SCORE}{name}": float(np.quantile(scores, at)) for name, at in QUANTILES.items() if len(scores)}


def read_reference(champion: Path | None) -> tuple[str, Mapping] | None:
    """The champion's version and what its data gate saw (`metrics` and `n`); None where there is none yet.

    Raises:
        UserError: the file is no champion's.
    """
    if champion is None or not Path(champion).exists():
        return None
    found = read_json(champion)
    if not isinstance(found, Mapping) or "version" not in found:
        raise UserError(f"{champion}: found no 'version'; expected what a promotion writes; restore it")
    seen = found.get("audit")
    return (found["version"], seen) if seen else None


def limits(reference: Mapping, now: Mapping[str, float], rows: int, config: Drift) -> dict[str, tuple[float, float]]:
    """The lowest and highest value that each number may have, by metric name.

    Args:
        reference: `metrics` and `n` of the champion's audit.
        now: this audit's metrics, for languages that the champion's data had none of.
        rows: how many rows this audit's shares rest on.
    """
    before, counts, found = reference["metrics"], reference.get("n", {}), {}
    for name, value in before.items():
        if name.startswith(SCORE):
            found[name] = (value - config.scores, value + config.scores)
        elif name in SHARES:
            found[name] = _around(value, getattr(config, SHARES[name]), counts.get(name), rows)
    spoken = {name for name in (*before, *now) if name.startswith(LANGUAGE)}
    kept = counts.get("selection.kept_fraction") and before.get("selection.kept")
    for name in sorted(spoken):
        found[name] = _around(before.get(name, 0.0), config.languages, kept, int(now.get("selection.kept", rows)))
    return found


def _around(share: float, margin: float, before: float | None, now: int) -> tuple[float, float]:
    """The share give or take the margin and the noise of two samples."""
    spread = share * (1 - share) * (1 / max(before or 1, 1) + 1 / max(now, 1))
    wide = margin + NOISE * math.sqrt(spread)
    return share - wide, share + wide
