"""Spikes and what is not finite: found by a known rule, and taken back as if their batch had never been."""

import dataclasses
import json

import pytest
import torch

from tests.train.rows import CONFIG, Rows, curve, make_toy, squared_error
from vlmpipe.errors import UserError
from vlmpipe.train.checkpoint import load_tensors
from vlmpipe.train.loop import train
from vlmpipe.train.watch import SpikeConfig, batch_number, fault

SPIKE = SpikeConfig(factor=10.0, window=4, action="rollback", skips=2)
CONFIG = dataclasses.replace(CONFIG, spike=SPIKE, ema=0.9)


class Spoiled(Rows):
    """Some batches are not like the others."""

    def __init__(self, spoiled: dict[int, float]):
        super().__init__()
        self.spoiled = spoiled

    def at(self, step: int):
        batch = super().at(step)
        return {**batch, "y": batch["y"] * self.spoiled.get(step, 1.0)}


class Without(Rows):
    """The stream with batches left out."""

    def __init__(self, skipped: list[int]):
        super().__init__()
        self.skipped = skipped

    def at(self, step: int):
        return super().at(batch_number(step, self.skipped))


# --- the rule ----------------------------------------------------------------------------------------------

def test_the_limit_is_the_median_and_so_many_deviations():
    losses = [100.0, 1.0, 2.0, 3.0, 4.0]  # of the last four: median 2.5, absolute deviations 1.5 .5 .5 1.5
    limit = 2.5 + 10 * 1.4826 * 1.0
    assert fault(SPIKE, losses, limit - 0.01, 1.0) is None
    assert f"expected at most {limit:g}" in fault(SPIKE, losses, limit + 0.01, 1.0)
    assert fault(SPIKE, losses[:3], 1e9, 1.0) is None  # too few to know what is usual
    assert fault(None, losses, 1e9, 1.0) is None


def test_a_flat_loss_may_tremble():
    assert fault(SPIKE, [2.0] * 4, 2.19, 1.0) is None
    assert "found loss 2.21" in fault(SPIKE, [2.0] * 4, 2.21, 1.0)


@pytest.mark.parametrize("numbers", [(float("nan"), 1.0), (1.0, float("inf")), (1.0, float("nan"))])
def test_what_is_not_finite_is_always_a_fault(numbers):
    assert "expected finite numbers" in fault(None, [], *numbers)


def test_numbers_of_batches_jump_over_those_left_out():
    assert [batch_number(step, []) for step in range(4)] == [0, 1, 2, 3]
    assert [batch_number(step, [3, 0, 4]) for step in range(4)] == [1, 2, 5, 6]


@pytest.mark.parametrize("values", [{"factor": 0.0}, {"window": 2}, {"skips": 0}])
def test_values_that_make_no_rule_are_refused(values):
    with pytest.raises(UserError, match=next(iter(values))):
        dataclasses.replace(SPIKE, **values)


# --- the run -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value", [1e4, float("nan")])
def test_rolled_back_is_as_if_the_batch_had_never_been(tmp_path, value, capfd):
    models = make_toy(0.0), make_toy(0.0)  # batches have their random state by number
    summary = train(models[0], squared_error, Spoiled({12: value}), CONFIG, tmp_path / "spoiled")
    assert summary.skipped == (12,) and summary.steps == 20
    assert "back to step 10, without batch 12" in capfd.readouterr().err
    plain = dataclasses.replace(CONFIG, spike=None)
    train(models[1], squared_error, Without([12]), plain, tmp_path / "without")
    found, expected = curve(tmp_path / "spoiled"), curve(tmp_path / "without")
    assert found[12].pop("skipped") == [12]
    assert found == expected
    assert all(torch.equal(*pair) for pair in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_killed_and_resumed_skips_the_same(tmp_path):
    train(make_toy(), squared_error, Spoiled({7: 1e4, 13: float("nan")}), CONFIG, tmp_path / "whole")
    answers = iter([False] * 11 + [True])  # told to stop after both
    stopped = train(
        make_toy(), squared_error, Spoiled({7: 1e4, 13: float("nan")}), CONFIG, tmp_path / "parts",
        stopped=lambda: next(answers),
    )
    assert stopped.stopped and 13 < stopped.steps < 20
    resumed = train(make_toy(), squared_error, Spoiled({7: 1e4, 13: float("nan")}), CONFIG, tmp_path / "parts")
    assert resumed.skipped == (7, 13)
    assert (tmp_path / "parts/curves.jsonl").read_bytes() == (tmp_path / "whole/curves.jsonl").read_bytes()
    assert [line["skipped"] for line in curve(tmp_path / "whole") if "skipped" in line] == [[7], [13]]


def test_before_the_first_checkpoint_it_rolls_back_to_the_start(tmp_path):
    assert train(make_toy(), squared_error, Spoiled({1: float("nan")}), CONFIG, tmp_path).skipped == (1,)


def test_enough_is_enough(tmp_path):
    spoiled = Spoiled({number: float("nan") for number in (6, 7, 8)})
    with pytest.raises(UserError, match=r"stopped at step 7: found loss nan.*batches \[6, 7\] were left out before"):
        train(make_toy(), squared_error, spoiled, CONFIG, tmp_path)


def test_stop_says_what_a_spike_is(tmp_path):
    config = dataclasses.replace(CONFIG, spike=dataclasses.replace(SPIKE, action="stop"))
    with pytest.raises(UserError, match=r"stopped at step 9: found loss .*; expected at most .*lower optimizer\.lr"):
        train(make_toy(), squared_error, Spoiled({8: 1e4}), config, tmp_path)


def test_weights_that_are_not_finite_never_reach_the_disk(tmp_path):
    """A weight that nothing uses spoils no loss and no gradient."""
    model = make_toy()

    def spoils(model, batch):
        spoils.calls += 1
        if spoils.calls == 10:
            model.unused.weight.data[0, 0] = float("nan")
        return squared_error(model, batch)

    spoils.calls = 0
    with pytest.raises(UserError, match="stopped at step 10: found weights that are not finite"):
        train(model, spoils, Rows(), dataclasses.replace(CONFIG, spike=None), tmp_path)
    (kept,) = (tmp_path / "checkpoints").iterdir()
    assert json.loads((kept / "complete.json").read_text())["step"] == 5
    assert all(tensor.isfinite().all() for tensor in load_tensors(kept, "model").values())
