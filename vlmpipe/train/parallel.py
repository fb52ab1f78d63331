"""One worker among several: the same model on each (DDP), or its weights split over all (FSDP2).

Checkpoints and results hold whole tensors, so a run may go on with another number of workers, and in another way.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from vlmpipe.models.layers import Block


def place() -> tuple[int, int]:
    """This worker's rank and the number of workers."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def device() -> torch.device:
    """The GPU that this worker was given, or the CPU. Ray hides GPUs from workers that asked for none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def placed(model: nn.Module, kind: str) -> nn.Module:
    """`model` on this worker's device; a copy where its weights will be split, which can't be undone, and where one
    device may not hold them all."""
    splits = kind == "fsdp" and place()[1] > 1
    return copy.deepcopy(model) if splits else model.to(device())


def shared(loss: nn.Module, kind: str) -> nn.Module:
    """`loss`, a module that has the model inside, such that its gradients are the mean over all workers.

    Args:
        kind: `ddp` keeps all weights on every worker; `fsdp` splits weights, gradients and the optimizer's state over
            them, and gathers the weights of one block at a time (arXiv 2304.11277). Optimizers are made afterwards.
    """
    _, world = place()
    if world == 1:
        return loss
    if kind == "ddp":  # an objective may leave heads of the model out
        return DistributedDataParallel(loss, find_unused_parameters=True)
    mesh = init_device_mesh(device().type, (world,))
    scalars = {parameter for parameter in loss.parameters() if not parameter.ndim}  # a number can't be split
    for block in [part for part in loss.modules() if isinstance(part, Block)]:
        fully_shard(block, mesh=mesh, ignored_params=scalars)
    fully_shard(loss, mesh=mesh, ignored_params=scalars)
    # Sums alone, divided afterwards: gloo knows no mean.
    loss.set_force_sum_reduction_for_comms(dist.get_backend() == "gloo")
    return loss.to(device())  # the parts are there already; this is for what is not split


@contextlib.contextmanager
def synchronized(loss: nn.Module, now: bool) -> Iterator[None]:
    """Gradients of a backward pass in this block go to the other workers, or wait for the next that does."""
    if isinstance(loss, FSDPModule):
        loss.set_requires_gradient_sync(now)
        yield
    elif isinstance(loss, DistributedDataParallel) and not now:
        with loss.no_sync():
            yield
    else:
        yield


def clip(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scale the gradients down to a norm of `limit` all together; returns the norm that they had, a scalar."""
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return nn.utils.clip_grad_norm_(parameters, limit)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shards = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    for gradient in whole:  # what is not split, FSDP does not average
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    square = torch.stack([shard.square().sum() for shard in shards]).sum()
    dist.all_reduce(square)
    norm = (square + sum(gradient.square().sum() for gradient in whole)).sqrt()
    torch._foreach_mul_(shards + whole, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def local(tensor: Tensor) -> Tensor:
    """The part of `tensor` that this worker has."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """The same tensors, on the CPU and put together again where they are split; every worker has to ask.

    Args:
        keep: false on workers that only give their parts; they get nothing back.
    """
    found = {}
    for name, tensor in tensors.items():  # one after the other: no device holds them all
        full = tensor.full_tensor().to("cpu") if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = full
    return found


def split_like(target: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, which every worker has, split as `target` is."""
    if not isinstance(target, DTensor):
        return tensor
    return distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


@torch.no_grad()
def fill(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into those of the same names, split or not.

    Raises:
        KeyError: one is missing.
    """
    for name, target in targets.items():
        target.copy_(split_like(target, tensors[name]))
