"""Whether an update can stand: finite, and not far above what the loss was lately."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vlmpipe.errors import UserError

# What makes the median absolute deviation of a normal distribution its standard deviation.
NORMAL = 1.4826
# A loss that hardly moves has no spread to measure by: this share of it counts as one.
LEAST_SPREAD = 0.01


@dataclass(frozen=True)
class SpikeConfig:
    """A spike is a loss more than `factor` deviations over the median of the last `window` losses, or not finite.

    The deviation is the median absolute one, which the spike itself hardly moves. `stop` ends the run and says why.
    `rollback` goes back to the last checkpoint and on as if the batch of the spike had never been (as PaLM did by
    hand, arXiv 2204.02311, section 5.1), `skips` times; then it stops too.
    """

    factor: float = 10.0
    window: int = 50  # updates
    action: Literal["stop", "rollback"] = "stop"
    skips: int = 3

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise UserError(f"found factor: {self.factor}; expected a positive number of deviations such as 10")
        if self.window < 3:
            raise UserError(f"found window: {self.window}; expected at least 3 updates to take a median of")
        if self.skips < 1:
            raise UserError(f"found skips: {self.skips}; expected at least 1; use action: stop to skip none")


def fault(config: SpikeConfig | None, losses: Sequence[float], loss: float, norm: float) -> str | None:
    """What is wrong with an update of this loss and gradient norm after those `losses`; None where nothing is."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return f"found loss {loss:g} and gradient norm {norm:g}; expected finite numbers"
    if config is None or len(losses) < config.window:
        return None
    recent = losses[-config.window :]
    middle = statistics.median(recent)
    spread = NORMAL * statistics.median(abs(loss - middle) for loss in recent)
    limit = middle + config.factor * max(spread, LEAST_SPREAD * abs(middle))
    if loss <= limit:
        return None
    return f"found loss {loss:g}; expected at most {limit:g}, for the last {config.window} have the median {middle:g}"


def batch_number(step: int, skipped: Sequence[int]) -> int:
    """Which batch of the stream update `step` uses, both counted from 0, when those are left out."""
    for number in sorted(skipped):
        step += number <= step
    return step
