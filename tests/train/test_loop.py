"""The loop learns, resumes to the bit after SIGKILL, stops on NaN, and splits batches without changing the gradient."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from vlmpipe.errors import UserError
from vlmpipe.train.loop import TrainConfig, alone, train
from vlmpipe.train.optim import OptimizerConfig, Rule, ScheduleConfig

OPTIMIZER = OptimizerConfig(lr=0.01, schedule=ScheduleConfig(warmup=2))
CONFIG = TrainConfig(steps=20, batch_size=6, optimizer=OPTIMIZER, checkpoint_every=5, log_every=2, ema=0.9)


class Rows:
    """Thirty-two rows whose sum is to be learned; batch `step` straddles epochs as batches of real data do."""

    def __init__(self, size: int = CONFIG.batch_size):
        self.size = size
        self.rows = torch.randn(32, 5, generator=torch.Generator().manual_seed(1))

    def at(self, step: int) -> dict[str, torch.Tensor]:
        places = torch.arange(step * self.size, (step + 1) * self.size) % len(self.rows)
        return {"x": self.rows[places], "y": self.rows[places].sum(1)}


class KillAt(Rows):
    """Kills its own process when batch `step` is asked for."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def at(self, step: int) -> dict[str, torch.Tensor]:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().at(step)


def make_model(dropout: float = 0.3) -> nn.Module:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 1))


def squared_error(model, batch):
    error = model(batch["x"])[:, 0] - batch["y"]
    return error.square().mean(), {"error": error.abs().mean()}


def curve(state: Path) -> list[dict]:
    return [json.loads(line) for line in (state / "curves.jsonl").read_text().splitlines()]


def test_learns_and_writes_its_curve(tmp_path):
    shown = []
    config = dataclasses.replace(CONFIG, steps=120, ema=None)
    summary = train(make_model(0.0), squared_error, Rows(), config, tmp_path, report=shown.append)
    lines = curve(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 121))
    assert lines[0]["lr"] == 0.005 and lines[1]["lr"] == 0.01 and lines[-1]["lr"] < 1e-5
    assert lines[-1]["loss"] < 0.05 * lines[0]["loss"] and summary.loss == lines[-1]["loss"]
    assert shown[-1]["step"] == 120 and shown[-1]["error"] == lines[-1]["error"]
    assert (summary.steps, summary.resumed_from, summary.stopped) == (120, 0, False)


def test_killed_and_resumed_is_the_same_to_the_bit(tmp_path):
    whole = make_model()
    train(whole, squared_error, Rows(), CONFIG, tmp_path / "whole", run="r")
    script = (
        "from pathlib import Path; from test_loop import *; "
        f"train(make_model(), squared_error, KillAt(13), CONFIG, Path({str(tmp_path / 'killed')!r}), run='r')"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    killed = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(curve(tmp_path / "killed")) == 12  # two beyond the checkpoint, which the resumed run replaces
    resumed = make_model()
    summary = train(resumed, squared_error, Rows(), CONFIG, tmp_path / "killed", run="r")
    assert (summary.steps, summary.resumed_from) == (20, 10)
    assert (tmp_path / "killed" / "curves.jsonl").read_bytes() == (tmp_path / "whole" / "curves.jsonl").read_bytes()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_another_run_starts_over(tmp_path):
    train(make_model(), squared_error, Rows(), CONFIG, tmp_path, run="first")
    assert train(make_model(), squared_error, Rows(), CONFIG, tmp_path, run="first").resumed_from == 20
    assert train(make_model(), squared_error, Rows(), CONFIG, tmp_path, run="second").resumed_from == 0
    assert len(curve(tmp_path)) == 20


def test_told_to_stop_it_saves_and_goes_on_later(tmp_path):
    answers = iter([False, False, True])
    summary = train(make_model(), squared_error, Rows(), CONFIG, tmp_path, stopped=lambda: next(answers))
    assert summary.stopped and summary.steps == 5
    assert train(make_model(), squared_error, Rows(), CONFIG, tmp_path).resumed_from == 5


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    models = make_model(0.0), make_model(0.0)
    config = dataclasses.replace(CONFIG, steps=4, ema=None)
    train(models[0], squared_error, Rows(6), config, tmp_path / "whole")
    train(models[1], squared_error, Rows(2), dataclasses.replace(config, accumulation=3), tmp_path / "parts")
    for whole, parts in zip(curve(tmp_path / "whole"), curve(tmp_path / "parts"), strict=True):
        assert parts == pytest.approx(whole, rel=1e-5)
    assert torch.allclose(models[0][0].weight, models[1][0].weight, rtol=1e-4, atol=1e-6)


def test_ema_of_still_weights_is_the_weights_and_lags_behind_moving_ones(tmp_path):
    frozen = dataclasses.replace(CONFIG.optimizer, rules=(Rule("0.*"),))
    model, start = make_model(), make_model()
    train(model, squared_error, Rows(), dataclasses.replace(CONFIG, optimizer=frozen, ema=None), tmp_path / "last")
    averaged = make_model()
    train(averaged, squared_error, Rows(), dataclasses.replace(CONFIG, optimizer=frozen, ema=0.999), tmp_path / "mean")
    assert torch.equal(averaged[0].weight, start[0].weight)
    moved, lagged = (model[3].weight - start[3].weight).norm(), (averaged[3].weight - start[3].weight).norm()
    assert 0 < lagged < 0.02 * moved


def test_bfloat16_trains_close_to_float32(tmp_path):
    curves = []
    for precision in ("float32", "bf16"):
        config = dataclasses.replace(CONFIG, precision=precision)
        train(make_model(), squared_error, Rows(), config, tmp_path / precision)
        curves.append(curve(tmp_path / precision))
    losses = [[line["loss"] for line in lines] for lines in curves]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.05)


def test_a_loss_that_is_not_finite_stops_and_says_where(tmp_path):
    def poisoned(model, batch):
        loss, metrics = squared_error(model, batch)
        poisoned.calls += 1
        return loss * (float("nan") if poisoned.calls == 8 else 1.0), metrics

    poisoned.calls = 0
    with pytest.raises(UserError, match=r"stopped at step 8: found loss nan.*expected finite.*lower optimizer.lr"):
        train(make_model(), poisoned, Rows(), CONFIG, tmp_path)
    assert [line["step"] for line in curve(tmp_path)] == list(range(1, 8))
    assert train(make_model(), squared_error, Rows(), CONFIG, tmp_path).resumed_from == 5


@pytest.mark.parametrize(
    ("values", "message"),
    [({"steps": 0}, "steps: 0"), ({"accumulation": 4}, "batch_size: 6 in accumulation: 4"), ({"ema": 1.0}, "ema: 1.0")],
)
def test_values_that_make_no_run_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **values)


def test_one_run_at_a_time_in_a_state_directory(tmp_path):
    with alone(tmp_path), pytest.raises(UserError, match="another run trains in"), alone(tmp_path, patience_s=0.1):
        pass
    with alone(tmp_path, patience_s=0.1):
        pass
