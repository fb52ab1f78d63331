"""What a training run holds while it is at work: its directory, and deterministic kernels."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist

from vlmpipe.errors import UserError
from vlmpipe.train.parallel import place


@contextlib.contextmanager
def alone(state: Path, patience_s: float = 60.0) -> Iterator[None]:
    """Hold `state` for this run: a worker whose driver was killed may write there for a moment longer.

    Raises:
        UserError: another run holds it for longer than `patience_s`.
    """
    rank, world = place()
    with open(state / "lock", "a", encoding="utf-8") as file:
        end = time.monotonic() + patience_s
        while rank == 0 and not locked(file):
            if time.monotonic() > end:
                raise UserError(f"another run trains in {state}; expected one at a time; end it or wait for it")
            time.sleep(0.2)
        if world > 1:
            dist.barrier()
        yield


def locked(file: IO) -> bool:
    """Take the lock that the kernel releases with the process that holds it, if nobody has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic kernels where torch has them; the rest only warn."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and changes nothing that is read
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill
