"""How fast training is: samples and tokens a second, arithmetic counted and as a share of what the machine can do."""

import contextlib
import re
import resource
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from vlmpipe.models.text import TEXTS

# Dense peaks in TFLOP/s of tensor cores in bfloat16, and of plain float32, from NVIDIA's data sheets of each.
PEAKS = (
    (r"H200|GH200|H100 80GB HBM3", 989.0, 67.0),
    (r"H100 PCIe", 756.0, 51.0),
    (r"A100", 312.0, 19.5),
    (r"L40S", 362.0, 91.6),
    (r"L4\b", 121.0, 30.3),
    (r"RTX 4090", 165.2, 82.6),
)
# The CPU's attention is missing in torch's table (2.13); its arguments begin as the others' do.
FORMULAS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
GIB = 2**30


class Counter(TorchDispatchMode):
    """Adds up the floating-point operations of what runs inside: a multiplication and an addition are two.

    The formulas are torch's (`torch.utils.flop_counter`). Its own counter also decomposes operations and hooks
    modules; this one leaves everything that it sees as it is, so that a counted step gives the same bits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


class Meter:
    """Counts what this worker does; rates are since the last look.

    Args:
        precision: of matrix products, `float32` or `bf16`.
        world: number of workers, which are taken to do as much each.
    """

    def __init__(self, device: torch.device, precision: str, world: int):
        self.device, self.precision, self.world = device, precision, world
        self.flops: int | None = None  # of one update on this worker, forward and backward
        self.counter: Counter | None = None
        self.peak: float | None = None  # FLOP/s of one worker's device, None until asked for
        self.start = self.last = time.monotonic()
        self.updates = self.samples = self.tokens = self.all_samples = 0

    # --- arithmetic ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count one update, if none was counted yet; batches of other shapes are taken to cost the same."""
        if self.flops is not None:
            yield
            return
        self.counter = Counter()
        try:
            with self.counter:
                yield
            self.flops = self.counter.flops
        finally:
            self.counter = None

    @contextlib.contextmanager
    def repeating(self) -> Iterator[None]:
        """What runs inside is done a second time to save memory: it costs time and is no work of the model."""
        before = self.counter.flops if self.counter else 0
        try:
            yield
        finally:
            if self.counter:
                self.counter.flops = before

    # --- rates ---------------------------------------------------------------------------------------------

    def count(self, batch: dict[str, Tensor]) -> None:
        """Take note of one part of a batch before it goes to the device. A packed row counts as its samples."""
        segments = batch.get("segments")
        samples = len(next(iter(batch.values())))
        if segments is not None:
            samples = int(((segments.amax(dim=1) - 1) // TEXTS + 1).clamp(min=1).sum())
            self.tokens += int((segments != 0).sum())
        self.samples += samples * self.world
        self.all_samples += samples * self.world

    def update(self) -> None:
        self.updates += 1

    def forget(self) -> None:
        """Take nothing of what was counted so far for work that was done."""
        self.updates = self.samples = self.tokens = self.all_samples = 0

    def look(self) -> dict[str, float]:
        """Rates of all workers since the last look; `mfu` only where the device's peak is known."""
        now = time.monotonic()
        seconds = max(now - self.last, 1e-9)
        found = {"samples_per_second": self.samples / seconds}
        if self.tokens:
            found["tokens_per_second"] = self.tokens * self.world / seconds
        if self.flops:
            found["tflops"] = self.flops * self.world * self.updates / seconds / 1e12
        share = self.mfu(self.updates / seconds)
        if share is not None:
            found["mfu"] = share
        found["memory_gib"] = self.memory_gib()
        self.last = time.monotonic()
        self.updates = self.samples = self.tokens = 0
        return found

    def mfu(self, updates_per_second: float) -> float | None:
        """Model FLOPs utilisation (arXiv 2204.02311, appendix B): the share of a device's peak that the model uses."""
        if not self.flops:
            return None
        if self.peak is None:
            self.peak = peak(self.device, self.precision)
        return self.flops * updates_per_second / self.peak if self.peak else None

    def memory_gib(self) -> float:
        """At the peak so far: of the GPU's memory, or of this process's."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / GIB
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def peak(device: torch.device, precision: str) -> float:
    """FLOP/s that the device can do at most in `precision`; 0.0 for a GPU that is not in the table.

    Of a CPU it is what a large matrix product reaches now, on the threads that torch may use: a share of that is
    comparable between runs on one machine, not between machines.
    """
    if device.type != "cuda":
        return matmul_speed(torch.bfloat16 if precision == "bf16" else torch.float32)
    name = torch.cuda.get_device_name(device)
    bf16, float32 = next((peaks for pattern, *peaks in PEAKS if re.search(pattern, name)), (0.0, 0.0))
    if precision == "bf16":
        return bf16 * 1e12
    return 1e12 * (bf16 / 2 if torch.backends.cuda.matmul.allow_tf32 else float32)


def matmul_speed(dtype: torch.dtype, side: int = 512, times: int = 5) -> float:
    """FLOP/s of the quickest of some square matrix products."""
    matrix = torch.ones(side, side, dtype=dtype)
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds)

