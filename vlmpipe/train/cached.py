"""The exact gradient of a contrastive loss over a batch that does not fit: GradCache (arXiv 2101.06983).

A contrastive loss compares every row with every other, so the mean of the losses of a batch's parts is another loss
than that of the batch: each part sees fewer negatives. Here all parts are embedded without a graph, the loss of the
whole is differentiated as far as the embeddings, and each part is then embedded again, with the same random state, to
carry its share of that gradient into the weights. It costs a second forward pass and holds one part's activations.

Exact for all that treats rows apart, dropout included. Batch norm does not: it normalises each part by itself.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

Named = dict[str, Tensor]


@runtime_checkable
class Cacheable(Protocol):
    """An objective in two steps, of which only the first knows the model.

    `embed` gives tensors with a row for each row of the batch, and scalars that are the same for every part, such as
    a learned scale; `loss` needs nothing else. Integers ride along without gradient.
    """

    def embed(self, model: nn.Module, batch: Named) -> Named: ...

    def loss(self, embedded: Named) -> tuple[Tensor, Named]: ...


def compares(objective: object) -> bool:
    """Whether the loss of a batch is more than the mean of its parts' losses, and can be had in two steps.

    What is made of several objectives has both steps, and says by an attribute of this name whether it needs them.
    """
    return isinstance(objective, Cacheable) and getattr(objective, "compares", True)


def join(parts: Sequence[Named]) -> Named:
    """Rows of all parts one after the other; scalars of the first. Leaves, which gather gradients if they can."""
    first = parts[0]
    joined = {
        name: torch.cat([part[name] for part in parts]) if first[name].ndim else first[name] for name in first
    }
    return {name: tensor.detach().requires_grad_(tensor.is_floating_point()) for name, tensor in joined.items()}


def shares(joined: Named, parts: Sequence[Named]) -> list[Named]:
    """The gradient that `joined` got, for each part its own rows; that of a scalar goes to the first part alone."""
    gradients = {name: tensor.grad for name, tensor in joined.items() if tensor.grad is not None}
    rows = {name: gradient.split([len(part[name]) for part in parts]) for name, gradient in gradients.items()
            if gradient.ndim}
    return [
        {
            name: rows[name][number] if gradient.ndim else (gradient if number == 0 else torch.zeros_like(gradient))
            for name, gradient in gradients.items()
        }
        for number in range(len(parts))
    ]


def backward(embedded: Named, gradients: Named) -> None:
    """Carry `gradients` of the embeddings on into what made them."""
    names = [name for name in gradients if embedded[name].requires_grad]
    torch.autograd.backward([embedded[name] for name in names], [gradients[name] for name in names])


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Running statistics move once a batch, not once for each time that it is embedded."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
