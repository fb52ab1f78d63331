"""The one training loop. Needs torch and the model library; knows neither Ray nor where its batches come from.

A step is a pure function of the weights, the optimizer's state and the step's number: batches come by number, the
learning rate is computed from it, and the random state is set from it. So a run that was killed goes on to the bit.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.train import cached, checkpoint
from vlmpipe.train.adapters import LoraConfig
from vlmpipe.train.ahead import Ahead, Batch, Batches, to_device
from vlmpipe.train.blocks import shaped
from vlmpipe.train.guards import alone, deterministic
from vlmpipe.train.meter import Meter
from vlmpipe.train.optim import OptimizerConfig, freeze, make_optimizer, rate, set_rate
from vlmpipe.train.parallel import clip, device, fill, local, place, placed, shared, synchronized, whole
from vlmpipe.train.watch import SpikeConfig, batch_number, fault

CURVES = "curves.jsonl"
TIMING = "timing.jsonl"
CHECKPOINTS = "checkpoints"
SKIPPED = "skipped.json"
Objective = Callable[[nn.Module, Batch], tuple[Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    `batch_size` rows of all workers together make one update, in `accumulation` parts; a row is a picture with at
    most `per_row` of its texts, or as many of those as fit into `pack` tokens. `objective`: a name, or names with
    weights; null is what fits the model's heads. docs/training.md says when to use what.
    """

    steps: int = 600
    batch_size: int = 64
    accumulation: int = 1
    per_row: int = 1
    pack: int | None = None  # tokens of a row that several samples share; null: a sample has its row
    objective: str | dict[str, float] | None = None
    vision: Literal["scratch", "scorer"] = "scratch"  # pretraining only: where the vision tower's weights come from
    init: str | None = None  # pretraining only: a model directory to go on from, of ours or of Hugging Face
    captions: bool = False  # finetuning only: rehearse the packed captions beside the questions
    lora: LoraConfig | None = None  # finetuning only
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: Literal["float32", "bf16"] = "float32"
    compile: bool = False  # each transformer block with torch.compile: pays on a GPU, and needs a C++ compiler on a CPU
    activation_checkpointing: bool = False  # recompute what is inside a block: less memory, a third more arithmetic
    parallel: Literal["ddp", "fsdp"] = "ddp"
    prefetch: bool = True  # make the next batch while the last one is computed with
    ema: float | None = None  # decay of the averaged weights that are kept at the end; null: the last weights
    spike: SpikeConfig | None = None  # null: only what is not finite stops the run
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
        if self.pack is not None and self.pack < 1:
            raise UserError(f"found pack: {self.pack}; expected the tokens of a row such as 2048, or null")


@dataclass(frozen=True)
class Summary:
    """How a run ended: `steps` done in all, the first of them now `resumed_from`, `stopped` when it was told to.

    `mfu` is the share of its time that the device at its peak would have needed (see `meter`), None where unknown.
    """

    steps: int
    resumed_from: int
    stopped: bool
    loss: float
    seconds: float
    samples_per_second: float
    mfu: float | None = None
    memory_gib: float | None = None
    skipped: tuple[int, ...] = ()


def train(
    model: nn.Module, objective: Objective, batches: Batches, config: TrainConfig, state: Path, run: str = "",
    report: Callable[[dict], None] = lambda facts: None, stopped: Callable[[], bool] = lambda: False,
) -> Summary:
    """Train `model` in place to `config.steps`, from the newest checkpoint of this run in `state` if there is one.

    Args:
        objective: one that compares rows (see `cached`) has the loss of the whole batch, however many parts that
            comes in; the loss of any other is the mean over the parts.
        batches: part `i` of update `s` is `batches.at(s * accumulation + i)`, asked for in a thread.
        state: checkpoints; `curves.jsonl`: for each update its loss, learning rate, gradient norm and metrics;
            `timing.jsonl`: what the clock says.
        run: fingerprint of config, data and initial weights; checkpoints of another run are not touched or used.
        report: called by rank 0 every `log_every` steps with facts to show.
        stopped: asked as often; true saves a checkpoint and ends.

    Raises:
        UserError: the loss, the gradient or a weight is not finite, or the loss is a spike; a rule of the optimizer
            matches nothing; another run is at work in `state`.
    """
    state = Path(state)
    state.mkdir(parents=True, exist_ok=True)
    with deterministic(), alone(state):
        trainer = Trainer(model, objective, batches, config, state, run, report)
        blocks = shaped(trainer.model, config.compile, config.activation_checkpointing, trainer.meter.repeating)
        with blocks, contextlib.closing(trainer.batches):
            trainer.resume()
            return trainer.run_to_end(stopped)


class Trainer:
    """The state of one run on this worker; `train` is the way in."""

    def __init__(self, model, objective, batches, config: TrainConfig, state: Path, run: str, report):
        self.rank, self.world = place()
        self.device = device()
        self.config, self.state, self.fingerprint, self.report = config, state, run, report
        self.checkpoints = state / CHECKPOINTS
        freeze(model, config.optimizer.rules)
        self.given, self.model = model, placed(model, config.parallel).train()
        self.objective = objective
        self.loss = shared(Loss(self.model, objective), config.parallel)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.average = [parameter.detach().clone() for parameter in self.trained] if config.ema else []
        self.batches = Ahead(batches, config.steps * config.accumulation, config.prefetch, self.device.type == "cuda")
        self.meter = Meter(self.device, config.precision, self.world)
        self.step = self.resumed_from = 0
        self.skipped: list[int] = []  # numbers of batches that are left out
        self.curve: list[str] = []
        self.losses: list[float] = []  # of the curve
        self.pending: list[Tensor] = []  # [loss, gradient norm, metrics…] of the steps not looked at yet
        self.names: list[str] = []

    # --- one update ----------------------------------------------------------------------------------------

    def update(self) -> None:
        config = self.config
        if config.compile and self.meter.flops is None:
            self.count_uncompiled()
        set_rate(self.optimizer, self.learning_rate(self.step))
        self.optimizer.zero_grad(set_to_none=True)
        with self.meter.counting():
            loss, *metrics = self.gradient()
        norm = clip(self.trained, float("inf") if config.optimizer.clip is None else config.optimizer.clip)
        self.optimizer.step()
        if config.ema:
            torch._foreach_lerp_(
                [local(tensor) for tensor in self.average], [local(p.detach()) for p in self.trained], 1 - config.ema
            )
        self.pending.append(torch.stack([loss, norm.detach().float(), *metrics]))
        self.meter.update()
        self.step += 1

    def gradient(self) -> Tensor:
        """Set the gradient of this step's batch; return its [loss, metrics…]."""
        parts = self.config.accumulation
        first = batch_number(self.step, self.skipped) * parts
        numbers = range(first, first + parts)
        if parts > 1 and cached.compares(self.objective):
            return self.backward_whole(numbers)
        rows = [self.backward(number, last=number == numbers[-1]) for number in numbers]
        return torch.stack(rows).mean(dim=0)

    def backward(self, number: int, last: bool) -> Tensor:
        """Add the gradient of one part of the batch; return its [loss, metrics…]."""
        with synchronized(self.loss, now=last):
            loss, metrics = self.forward(number, self.fetch(number))
            (loss / self.config.accumulation).backward()
        return self.row(loss, metrics)

    def backward_whole(self, numbers: range) -> Tensor:
        """The same for an objective that compares all rows of the batch (see `cached`)."""
        batches = [self.fetch(number) for number in numbers]
        with torch.no_grad(), self.meter.repeating(), cached.buffers_kept(self.model):
            parts = [self.forward(*part, embeds=True) for part in zip(numbers, batches, strict=True)]
        joined = cached.join(parts)
        with self.autocast():
            loss, metrics = self.objective.loss(joined)
        loss.backward()
        for number, batch, share in zip(numbers, batches, cached.shares(joined, parts), strict=True):
            with synchronized(self.loss, now=number == numbers[-1]):
                cached.backward(self.forward(number, batch, embeds=True), share)
        return self.row(loss, metrics)

    def fetch(self, number: int) -> Batch:
        batch = self.batches.at(number)
        self.meter.count(batch)
        return batch

    def forward(self, number: int, batch: Batch, embeds: bool = False):
        # One generator state for each part and worker, so that nothing has to be saved.
        torch.manual_seed((self.config.seed * 1_000_003 + number) * 4099 + self.rank)
        batch = to_device(batch, self.device)
        with self.autocast():
            return self.loss(batch, embeds)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def row(self, loss: Tensor, metrics: dict[str, Tensor]) -> Tensor:
        self.names = sorted(metrics)
        return torch.stack([loss.detach().float(), *(metrics[name].detach().float() for name in self.names)])

    def count_uncompiled(self) -> None:
        """Count the arithmetic of this step's batch; what is compiled can't be seen into."""
        with cached.buffers_kept(self.model), torch.compiler.set_stance("force_eager"), self.meter.counting():
            self.gradient()
        self.meter.forget()

    def learning_rate(self, step: int) -> float:
        return self.config.optimizer.lr * rate(self.config.optimizer.schedule, step, self.config.steps)

    # --- the run -------------------------------------------------------------------------------------------

    def run_to_end(self, stopped: Callable[[], bool]) -> Summary:
        config, start, told = self.config, time.monotonic(), False
        while self.step < config.steps and not told:
            self.update()
            saves = self.step % config.checkpoint_every == 0 or self.step == config.steps
            if self.step % config.log_every == 0 or saves:
                told, found = self.look(stopped(), saves, start)
                if found is not None:
                    self.roll_back(*found)
                    continue
            told = told and self.step < config.steps
            if saves or told:
                self.save()
        if not told:
            self.finish()
        return self.summary(told, time.monotonic() - start)

    def look(self, told: bool, saves: bool, start: float) -> tuple[bool, tuple[int, str] | None]:
        """Read the losses since the last look, of all workers.

        Returns whether any worker was told to stop, and the first step that can't stand with what is wrong with it.
        """
        values = torch.stack(self.pending).double()
        votes = values.new_tensor([told, saves and not self.weights_are_finite()]).expand(len(values), 2)
        values = torch.cat([values, votes], dim=1)
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        *rows, stops, spoiled = values.T.tolist()
        self.pending = []
        found = self.record(list(zip(*rows, strict=True)))
        if found is None and any(spoiled):
            found = self.step, "found weights that are not finite numbers; expected finite ones"
        if self.rank == 0 and found is None:
            self.show(time.monotonic() - start)
        return any(stops), found

    def record(self, rows: list[tuple[float, ...]]) -> tuple[int, str] | None:
        """Add the curve's lines for the last `len(rows)` updates, as far as they can stand."""
        known, found = len(self.curve), None
        for step, (loss, norm, *metrics) in enumerate(rows, start=self.step - len(rows) + 1):
            found = fault(self.config.spike, self.losses, loss, norm)
            if found is not None:
                break
            line = {"step": step, "loss": loss, "lr": self.learning_rate(step - 1), "grad_norm": norm}
            line |= dict(zip(self.names, metrics, strict=True))
            before, number = (batch_number(step - back, self.skipped) if step >= back else -1 for back in (2, 1))
            if number != before + 1:
                line["skipped"] = list(range(before + 1, number))
            self.curve.append(json.dumps(line) + "\n")
            self.losses.append(loss)
        self.write_curve("a", self.curve[known:])
        return found and (step, found)

    def weights_are_finite(self) -> bool:
        norms = torch._foreach_norm([local(parameter.detach()) for parameter in self.trained])
        return bool(torch.stack(norms).isfinite().all())

    def write_curve(self, mode: str, lines: list[str]) -> None:
        if self.rank == 0:
            with open(self.state / CURVES, mode, encoding="utf-8") as file:
                file.writelines(lines)

    def show(self, seconds: float) -> None:
        """Report on a run under way; wall-clock facts stay out of the curve."""
        done = self.step - self.resumed_from
        line = json.loads(self.curve[-1])
        rates = self.meter.look()
        with open(self.state / TIMING, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, "seconds": seconds, **rates}) + "\n")
        self.report({
            **{name: line[name] for name in ("step", "loss", "lr", "grad_norm", *self.names)},
            "steps": self.config.steps, **rates,
            "seconds_left": (self.config.steps - self.step) * seconds / max(done, 1),
        })

    def finish(self) -> None:
        """Leave the averaged weights in the model that was given, if there are any, else the last."""
        with torch.no_grad():
            for parameter, average in zip(self.trained if self.average else [], self.average, strict=True):
                parameter.copy_(average)
        if self.given is not self.model:
            fill(self.given.state_dict(), whole(self.model.state_dict()))

    def summary(self, told: bool, seconds: float) -> Summary:
        seconds = max(seconds, 1e-9)
        return Summary(
            self.step, self.resumed_from, told, self.losses[-1] if self.losses else float("nan"), seconds,
            self.meter.all_samples / seconds, self.meter.mfu((self.step - self.resumed_from) / seconds),
            self.meter.memory_gib(), tuple(self.skipped),
        )

    # --- checkpoints ---------------------------------------------------------------------------------------

    def save(self) -> None:
        tensors = {
            "model": self.model.state_dict(),
            "optimizer": checkpoint.optimizer_tensors(self.optimizer),
            "average": {str(number): tensor for number, tensor in enumerate(self.average)},
        }
        gathered = {stem: whole(named, keep=self.rank == 0) for stem, named in tensors.items()}
        if self.rank == 0:
            texts = {CURVES: "".join(self.curve), SKIPPED: json.dumps(self.skipped)}
            checkpoint.save(self.checkpoints, self.step, self.fingerprint, gathered, texts, self.config.keep)

    def resume(self) -> None:
        path = checkpoint.newest(self.checkpoints, self.fingerprint)
        if path is not None:
            self.restore(path)
            self.resumed_from = self.step
        elif self.rank == 0:
            (self.state / TIMING).unlink(missing_ok=True)
        if path is None and self.config.spike is not None and self.config.spike.action == "rollback":
            self.save()  # somewhere to roll back to
        self.write_curve("w", self.curve)

    def restore(self, path: Path) -> None:
        fill(self.model.state_dict(), checkpoint.load_tensors(path, "model"))
        checkpoint.restore_optimizer(self.optimizer, checkpoint.load_tensors(path, "optimizer"))
        average = {str(number): tensor for number, tensor in enumerate(self.average)}
        fill(average, checkpoint.load_tensors(path, "average"))
        self.curve = (path / CURVES).read_text(encoding="utf-8").splitlines(keepends=True)
        self.losses = [json.loads(line)["loss"] for line in self.curve]
        self.skipped = json.loads((path / SKIPPED).read_text(encoding="utf-8"))
        self.step = checkpoint.read_marker(path)["step"]

    def roll_back(self, step: int, found: str) -> None:
        """Go on from the last checkpoint without the batch of `step`; stop where the config wants that.

        Raises:
            UserError: it does, or enough batches were left out.
        """
        spike, lr = self.config.spike, self.learning_rate(step - 1)
        advice = f"at learning rate {lr:g}: lower optimizer.lr, lengthen its warmup, or train in float32"
        if spike is None or spike.action == "stop":
            raise UserError(f"training stopped at step {step}: {found}; {advice}")
        if len(self.skipped) >= spike.skips:
            raise UserError(
                f"training stopped at step {step}: {found}; batches {self.skipped} were left out before; {advice}"
            )
        skipped = [*self.skipped, batch_number(step - 1, self.skipped)]
        path = checkpoint.newest(self.checkpoints, self.fingerprint)
        if path is None:
            raise UserError(f"training stopped at step {step}: {found}; found no checkpoint left to roll back to")
        self.restore(path)
        self.skipped = skipped
        self.write_curve("w", self.curve)
        if self.rank == 0:
            print(f"step {step}: {found}; back to step {self.step}, without batch {skipped[-1]}", file=sys.stderr)


class Loss(nn.Module):
    """The objective as a module, so that what wraps it (see `parallel`) sees every objective's use of the model."""

    def __init__(self, model: nn.Module, objective: Objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch, embeds: bool = False):
        """(loss, metrics), or the embeddings alone of an objective that can be cached."""
        return self.objective.embed(self.model, batch) if embeds else self.objective(self.model, batch)
