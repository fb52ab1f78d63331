"""What each transformer block does beside its mathematics: be compiled, or forget and recompute its activations."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vlmpipe.errors import UserError
from vlmpipe.models.layers import Block


@contextlib.contextmanager
def shaped(
    model: nn.Module, compiled: bool, checkpointed: bool,
    again: Callable[[], AbstractContextManager] = contextlib.nullcontext,
) -> Iterator[None]:
    """Compile the blocks of `model`, and keep only their inputs for the backward pass, while this context is open.

    Block by block, because blocks of one shape share what was compiled, and because the input of a block is all that
    is kept of it (arXiv 1604.06174). Recomputing replays the random state: dropout falls the same way, and gradients
    are the same to the bit.

    Args:
        again: entered around every recomputation.

    Raises:
        UserError: there is no block.
    """
    blocks = [part for part in model.modules() if isinstance(part, Block)] if compiled or checkpointed else []
    if (compiled or checkpointed) and not blocks:
        raise UserError(
            "found no transformer block in the model; expected some to compile or to checkpoint; set compile and "
            "activation_checkpointing to false"
        )
    for block in blocks:
        forward = torch.compile(block.forward) if compiled else block.forward
        block.forward = partial(recomputed, forward, again) if checkpointed else forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class has it


def recomputed(forward: Callable, again: Callable[[], AbstractContextManager], *args, **context):
    """Call `forward`, keeping nothing but its inputs; `backward` calls it once more."""
    return checkpoint(
        forward, *args, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), again()), **context
    )
