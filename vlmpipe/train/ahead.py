"""The next batch, made while the last one is computed with."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

Batch = dict[str, Tensor]


class Batches(Protocol):
    """Batches by number, each this process's part of a batch of all."""

    def at(self, step: int) -> Batch: ...


class Ahead:
    """Batches by number, out of one thread that already makes the one after; which batch is which stays the same.

    Args:
        end: the number that no batch is made for unasked.
        ahead: false makes each batch when it is asked for.
        pin: put tensors where a GPU fetches them by itself.
    """

    def __init__(self, batches: Batches, end: int, ahead: bool, pin: bool):
        self.batches, self.end, self.ahead, self.pin = batches, end, ahead, pin
        self.thread = ThreadPoolExecutor(1, "batches")
        self.waiting: dict[int, Future] = {}

    def at(self, number: int) -> Batch:
        future = self.waiting.pop(number, None) or self.thread.submit(self.make, number)
        batch = future.result()
        self.waiting = {}
        if self.ahead and number + 1 < self.end:
            self.waiting[number + 1] = self.thread.submit(self.make, number + 1)
        return batch

    def make(self, number: int) -> Batch:
        batch = self.batches.at(number)
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self.pin else batch

    def close(self) -> None:
        self.thread.shutdown(cancel_futures=True)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; pictures travel as the bytes that they are."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
