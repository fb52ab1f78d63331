"""Several workers do what one does: DDP and FSDP2, checkpoints that fit any number of them, every row once an epoch."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.train.rows import CONFIG, Rows, curve, make_toy, on_processes, squared_error
from vlmpipe.train.loop import train
from vlmpipe.train.watch import SpikeConfig

# A gradient that is nought but for rounding, as of the keys' bias, must not be scaled up to a step.
OPTIMIZER = dataclasses.replace(CONFIG.optimizer, eps=1e-3)
CONFIG = dataclasses.replace(CONFIG, steps=16, batch_size=8, ema=0.9, checkpoint_every=6, optimizer=OPTIMIZER)
ROLLBACK = dataclasses.replace(CONFIG, spike=SpikeConfig(action="rollback"))
KINDS = ("ddp", "fsdp")


class OneIsBad(Rows):
    """Batch 9 makes the loss infinite: whoever trains rolls back to step 6."""

    def at(self, step: int):
        batch = super().at(step)
        return {**batch, "y": batch["y"] * float("inf")} if step == 9 else batch


def both_kinds(root: str) -> None:
    """On each worker: train to the end, over a bad batch; then half the way, to stop in the middle of an epoch."""
    for kind in KINDS:
        config = dataclasses.replace(ROLLBACK, parallel=kind)
        model = make_toy(0.0)
        train(model, squared_error, OneIsBad(8), config, Path(root) / kind / "whole")
        if torch.distributed.get_rank() == 0:
            save_file(model.state_dict(), Path(root) / kind / "model.safetensors")
        rows = Rows(8, Path(root) / kind / f"asked-{torch.distributed.get_rank()}.jsonl")
        half = dataclasses.replace(CONFIG, parallel=kind, prefetch=False, activation_checkpointing=True)
        summary = train(make_toy(0.0), squared_error, rows, half, Path(root) / kind / "half", stopped=at_six())
        assert summary.stopped and summary.steps == 6


def at_six():
    answers = iter([False, False, True])
    return lambda: next(answers)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        (root / kind).mkdir()
    train(make_toy(0.0), squared_error, Rows(8), CONFIG, root / "one" / "half")
    model = make_toy(0.0)
    train(model, squared_error, OneIsBad(8), ROLLBACK, root / "one" / "whole")
    save_file(model.state_dict(), root / "one" / "model.safetensors")
    on_processes(2, both_kinds, str(root))
    return root


def same_curve(found: Path, expected: Path) -> None:
    for one, other in zip(curve(found), curve(expected), strict=True):
        assert one.pop("skipped", None) == other.pop("skipped", None)
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_curve_and_the_weights_of_one(runs, kind):
    same_curve(runs / kind / "whole", runs / "one" / "whole")
    assert [line["step"] for line in curve(runs / kind / "whole") if line.get("skipped") == [9]] == [10]
    found, expected = (load_file(runs / name / "model.safetensors") for name in (kind, "one"))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_goes_on_where_two_stopped_and_every_row_is_seen_once_an_epoch(runs, kind):
    asked = runs / kind / "asked-alone.jsonl"
    rows = Rows(8, asked)
    summary = train(
        make_toy(0.0), squared_error, rows, dataclasses.replace(CONFIG, prefetch=False), runs / kind / "half"
    )
    assert (summary.resumed_from, summary.steps) == (6, 16)
    same_curve(runs / kind / "half", runs / "one" / "half")
    lines = [json.loads(line) for path in (runs / kind).glob("asked-*") for line in path.read_text().splitlines()]
    seen = [row for _, _, places in sorted(lines) for row in places]
    assert [sorted(seen[at : at + 32]) for at in range(0, len(seen), 32)] == [list(range(32))] * 4
