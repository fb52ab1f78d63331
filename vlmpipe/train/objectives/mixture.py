"""Several objectives at once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from vlmpipe.train.objectives.base import Batch, Result


@dataclass(frozen=True)
class Mixture:
    """The weighted sum of objectives over the same batch, each with a pass of its own.

    Batch: what its parts need. The metrics are each part's loss and metrics, under its name.
    """

    parts: tuple[tuple[str, float, Callable[[nn.Module, Batch], Result]], ...]

    def __call__(self, model: nn.Module, batch: Batch) -> Result:
        total, metrics = 0.0, {}
        for name, weight, objective in self.parts:
            loss, found = objective(model, batch)
            total = total + weight * loss
            metrics |= {f"{name}/{key}": value for key, value in {"loss": loss.detach(), **found}.items()}
        return total, metrics


def mixture(weights: Mapping[str, float], objectives: Mapping[str, Callable]) -> Mixture:
    """Of the named objectives, each made with its defaults."""
    return Mixture(tuple((name, weight, objectives[name]()) for name, weight in weights.items()))
