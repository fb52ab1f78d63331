"""Several objectives at once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from vlmpipe.train.cached import compares
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

    # --- a batch in parts, see `vlmpipe.train.cached` --------------------------------------------------------

    @property
    def compares(self) -> bool:
        """Whether the loss of a batch is more than the mean of its parts' losses."""
        return any(compares(objective) for _, _, objective in self.parts)

    def embed(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """What `loss` needs, by the part's name: embeddings, or its loss and metrics, each [1], where it is a mean."""
        found = {}
        for name, _, objective in self.parts:
            if compares(objective):
                mine = objective.embed(model, batch)
            else:
                loss, metrics = objective(model, batch)
                mine = {key: value[None] for key, value in {"loss": loss, **metrics}.items()}
            found |= {f"{name}/{key}": value for key, value in mine.items()}
        return found

    def loss(self, embedded: dict[str, Tensor]) -> Result:
        total, metrics = 0.0, {}
        for name, weight, objective in self.parts:
            mine = {key[len(name) + 1 :]: value for key, value in embedded.items() if key.startswith(f"{name}/")}
            if compares(objective):
                loss, found = objective.loss(mine)
            else:
                found = {key: value.mean() for key, value in mine.items()}
                loss = found.pop("loss")
            total = total + weight * loss
            metrics |= {f"{name}/{key}": value.detach() for key, value in {"loss": loss, **found}.items()}
        return total, metrics


def mixture(weights: Mapping[str, float], objectives: Mapping[str, Callable]) -> Mixture:
    """Of the named objectives, each made with its defaults."""
    return Mixture(tuple((name, weight, objectives[name]()) for name, weight in weights.items()))
