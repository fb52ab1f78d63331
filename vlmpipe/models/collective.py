"""What several training processes do together, with gradients: each function is the identity in a single process.

A loss that is the mean over processes then has the gradients of the whole batch in one process.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


def distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Gather(torch.autograd.Function):
    """[B, ...] of each process to [W * B, ...] of all, through which gradients flow back to whoever sent the rows."""

    @staticmethod
    def forward(context, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


class Mean(torch.autograd.Function):
    """The mean over processes; so is its gradient."""

    @staticmethod
    def forward(context, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values / dist.get_world_size()

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        return Mean.forward(context, gradient)


def gather(rows: Tensor) -> Tensor:
    return Gather.apply(rows) if distributed() else rows


def mean(values: Tensor) -> Tensor:
    return Mean.apply(values) if distributed() else values


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation (arXiv 1502.03167) over the rows of all processes; torch's own does this on GPUs only.

    Processes must have equally many rows, as `Batches` gives them. A frozen layer keeps the statistics it has: with
    those of the batch, a frozen tower would still change with every step.
    """

    def forward(self, x_BCYX: Tensor) -> Tensor:
        if not (self.training and self.weight.requires_grad):
            kept = self.running_mean, self.running_var
            return F.batch_norm(x_BCYX, *kept, self.weight, self.bias, training=False, eps=self.eps)
        if not distributed():
            return super().forward(x_BCYX)
        over = (0, 2, 3)
        mean_C = mean(x_BCYX.mean(dim=over))
        centred_BCYX = x_BCYX - mean_C[:, None, None]
        variance_C = mean(centred_BCYX.square().mean(dim=over))
        count = x_BCYX.numel() // x_BCYX.shape[1] * dist.get_world_size()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean_C, self.momentum)
            self.running_var.lerp_(variance_C * count / (count - 1), self.momentum)
        scale_C = self.weight / (variance_C + self.eps).sqrt()
        return centred_BCYX * scale_C[:, None, None] + self.bias[:, None, None]
