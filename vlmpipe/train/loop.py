"""The one training loop. Needs torch alone; knows neither Ray nor where its batches come from.

A step is a pure function of the weights, the optimizer's state and the step's number: batches come by number, the
learning rate is computed from it, and the random state is set from it. So a run that was killed goes on to the bit.
"""

import contextlib
import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vlmpipe.errors import UserError
from vlmpipe.train import checkpoint
from vlmpipe.train.optim import OptimizerConfig, make_optimizer, rate, set_rate

CURVES = "curves.jsonl"
Batch = dict[str, Tensor]
Objective = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    `batch_size` rows of all workers together make one update, in `accumulation` parts; a row is a picture with at
    most `per_row` of its texts. `objective` null is what fits the model's heads.
    """

    steps: int = 600
    batch_size: int = 64
    accumulation: int = 1
    per_row: int = 1
    objective: str | None = None
    vision: Literal["scratch", "scorer"] = "scratch"  # pretraining only: where the vision tower's weights come from
    captions: bool = False  # finetuning only: rehearse the packed captions beside the questions
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: Literal["float32", "bf16"] = "float32"
    ema: float | None = None  # decay of the averaged weights that are kept at the end; null: the last weights
    seed: int = 0
    log_every: int = 10  # steps between looks at the loss: a GPU waits for each look
    checkpoint_every: int = 100
    keep: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "per_row", "log_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"found {name}: {getattr(self, name)}; expected at least 1; raise it")
        if self.batch_size % self.accumulation:
            raise UserError(
                f"found batch_size: {self.batch_size} in accumulation: {self.accumulation} parts; expected a multiple; "
                f"change either"
            )
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"found ema: {self.ema}; expected a decay between 0 and 1 such as 0.999, or null")


class Batches(Protocol):
    """Batches by number, each this process's part of a batch of all."""

    def at(self, step: int) -> Batch: ...


@dataclass(frozen=True)
class Summary:
    """How a run ended: `steps` done in all, the first of them now `resumed_from`, `stopped` when it was told to."""

    steps: int
    resumed_from: int
    stopped: bool
    loss: float
    seconds: float
    samples_per_second: float


def train(
    model: nn.Module, objective: Objective, batches: Batches, config: TrainConfig, state: Path, run: str = "",
    report: Callable[[dict], None] = lambda facts: None, stopped: Callable[[], bool] = lambda: False,
) -> Summary:
    """Train `model` in place to `config.steps`, from the newest checkpoint of this run in `state` if there is one.

    Args:
        batches: part `i` of update `s` is `batches.at(s * accumulation + i)`.
        state: checkpoints, and `curves.jsonl`: for each update its loss, learning rate, gradient norm and metrics.
        run: fingerprint of config, data and initial weights; checkpoints of another run are not touched or used.
        report: called by rank 0 every `log_every` steps with facts to show.
        stopped: asked as often; true saves a checkpoint and ends.

    Raises:
        UserError: the loss or the gradient is not finite; a rule of the optimizer matches nothing; another run is
            at work in `state`.
    """
    state = Path(state)
    state.mkdir(parents=True, exist_ok=True)
    with deterministic(), alone(state):
        trainer = Trainer(model, objective, config, state, run, report)
        trainer.resume()
        return trainer.run_to_end(batches, stopped)


class Trainer:
    """The state of one run on this worker; `train` is the way in."""

    def __init__(self, model, objective, config: TrainConfig, state: Path, run: str, report):
        self.rank, self.world = place()
        self.device = device()
        self.model = model.to(self.device).train()
        self.config, self.state, self.fingerprint, self.report = config, state, run, report
        self.optimizer = make_optimizer(model, config.optimizer)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.average = [parameter.detach().clone() for parameter in self.trained] if config.ema else []
        self.loss: nn.Module = Loss(model, objective)
        if self.world > 1:  # an objective may leave heads of the model out
            self.loss = DistributedDataParallel(self.loss, find_unused_parameters=True)
        self.step = self.resumed_from = 0
        self.curve: list[str] = []
        self.pending: list[Tensor] = []  # [loss, gradient norm, metrics…] of the steps not looked at yet
        self.names: list[str] = []
        self.last_loss = float("nan")

    # --- one update ----------------------------------------------------------------------------------------

    def update(self, batches: Batches) -> None:
        config = self.config
        set_rate(self.optimizer, self.learning_rate(self.step))
        self.optimizer.zero_grad(set_to_none=True)
        parts = [self.backward(batches, part) for part in range(config.accumulation)]
        limit = float("inf") if config.optimizer.clip is None else config.optimizer.clip
        norm = nn.utils.clip_grad_norm_(self.trained, limit)
        self.optimizer.step()
        if config.ema:
            torch._foreach_lerp_(self.average, [p.detach() for p in self.trained], 1 - config.ema)
        loss, *metrics = torch.stack(parts).mean(dim=0)
        self.pending.append(torch.stack([loss, norm.detach().float(), *metrics]))
        self.step += 1

    def backward(self, batches: Batches, part: int) -> Tensor:
        """Add the gradient of one part of the batch; return its [loss, metrics…]."""
        number = self.step * self.config.accumulation + part
        # One generator state for each part and worker, so that nothing has to be saved.
        torch.manual_seed((self.config.seed * 1_000_003 + number) * 4099 + self.rank)
        batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batches.at(number).items()}
        last = part == self.config.accumulation - 1
        with contextlib.nullcontext() if last or self.world == 1 else self.loss.no_sync():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                loss, metrics = self.loss(batch)
            (loss / self.config.accumulation).backward()
        self.names = sorted(metrics)
        return torch.stack([loss.detach().float(), *(metrics[name].detach().float() for name in self.names)])

    def learning_rate(self, step: int) -> float:
        return self.config.optimizer.lr * rate(self.config.optimizer.schedule, step, self.config.steps)

    # --- the run -------------------------------------------------------------------------------------------

    def run_to_end(self, batches: Batches, stopped: Callable[[], bool]) -> Summary:
        config, start, told = self.config, time.monotonic(), False
        while self.step < config.steps and not told:
            self.update(batches)
            saves = self.step % config.checkpoint_every == 0 or self.step == config.steps
            if self.step % config.log_every == 0 or saves:
                told = self.look(stopped(), start) and self.step < config.steps
            if saves or told:
                self.save()
        if not told:
            self.keep_average()
        seconds = time.monotonic() - start
        done = (self.step - self.resumed_from) * config.batch_size
        return Summary(self.step, self.resumed_from, told, self.last_loss, seconds, done / max(seconds, 1e-9))

    def look(self, told: bool, start: float) -> bool:
        """Read the losses since the last look, of all workers; return whether any worker was told to stop."""
        values = torch.stack(self.pending).double()
        votes = torch.full_like(values[:, :1], float(told))
        values = torch.cat([values, votes], dim=1)
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        *rows, votes = values.T.tolist()
        self.pending = []
        self.record(list(zip(*rows, strict=True)))
        if self.rank == 0:
            self.report(self.facts(time.monotonic() - start))
        return any(votes)

    def record(self, rows: list[tuple[float, ...]]) -> None:
        """Add the curve's lines for the last `len(rows)` updates, as far as they are finite."""
        known = len(self.curve)
        try:
            for step, (loss, norm, *metrics) in enumerate(rows, start=self.step - len(rows) + 1):
                lr = self.learning_rate(step - 1)
                check_finite(step, loss, norm, lr)
                line = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm}
                self.curve.append(json.dumps({**line, **dict(zip(self.names, metrics, strict=True))}) + "\n")
                self.last_loss = loss
        finally:
            self.write_curve("a", self.curve[known:])

    def write_curve(self, mode: str, lines: list[str]) -> None:
        if self.rank == 0:
            with open(self.state / CURVES, mode, encoding="utf-8") as file:
                file.writelines(lines)

    def facts(self, seconds: float) -> dict:
        """What to show of a run under way; wall-clock facts stay out of the curve."""
        done = self.step - self.resumed_from
        a_second = done / max(seconds, 1e-9)
        line = json.loads(self.curve[-1])
        return {
            **{name: line[name] for name in ("step", "loss", "lr", *self.names)},
            "steps": self.config.steps,
            "samples_per_second": a_second * self.config.batch_size,
            "seconds_left": (self.config.steps - self.step) / max(a_second, 1e-9),
        }

    def keep_average(self) -> None:
        with torch.no_grad():
            for parameter, average in zip(self.trained if self.average else [], self.average, strict=True):
                parameter.copy_(average)

    # --- checkpoints ---------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> Path:
        return self.state / "checkpoints"

    def save(self) -> None:
        if self.rank == 0:
            tensors = {
                "model": self.model.state_dict(),
                "optimizer": checkpoint.optimizer_tensors(self.optimizer),
                "average": {str(number): tensor for number, tensor in enumerate(self.average)},
            }
            texts = {CURVES: "".join(self.curve)}
            checkpoint.save(self.checkpoints, self.step, self.fingerprint, tensors, texts, self.config.keep)

    def resume(self) -> None:
        path = checkpoint.newest(self.checkpoints, self.fingerprint)
        if path is not None:
            self.restore(path)
        self.write_curve("w", self.curve)

    def restore(self, path: Path) -> None:
        self.model.load_state_dict(checkpoint.load_tensors(path, "model"))
        checkpoint.restore_optimizer(self.optimizer, checkpoint.load_tensors(path, "optimizer"))
        saved = checkpoint.load_tensors(path, "average")
        for number, tensor in enumerate(self.average):
            tensor.copy_(saved[str(number)])
        self.curve = (path / CURVES).read_text(encoding="utf-8").splitlines(keepends=True)
        self.step = self.resumed_from = checkpoint.read_marker(path)["step"]
        self.last_loss = json.loads(self.curve[-1])["loss"]


class Loss(nn.Module):
    """The objective as a module, so that DistributedDataParallel sees every objective's use of the model."""

    def __init__(self, model: nn.Module, objective: Objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective(self.model, batch)


def check_finite(step: int, loss: float, norm: float, lr: float) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(
            f"training stopped at step {step}: found loss {loss:g} and gradient norm {norm:g} at learning rate {lr:g}; "
            f"expected finite numbers; lower optimizer.lr, lengthen its warmup, or train in float32"
        )


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
