"""Recomputed and compiled blocks: the same numbers, less memory or less time, and no trace afterwards."""

import dataclasses
import json
import shutil

import pytest
import torch
from torch import nn

from tests.train.rows import CONFIG, Rows, blocks, curve, make_toy, squared_error
from vlmpipe.errors import UserError
from vlmpipe.train.blocks import shaped
from vlmpipe.train.loop import train


def gradients(model, **shape) -> dict[str, torch.Tensor]:
    with shaped(model, **{"compiled": False, "checkpointed": False, **shape}):
        torch.manual_seed(5)
        squared_error(model, Rows().at(0))[0].backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_recomputed_gradients_are_the_same_to_the_bit_dropout_included():
    plain, recomputed = gradients(make_toy(0.3)), gradients(make_toy(0.3), checkpointed=True)
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert any((plain[name] != other).any() for name, other in gradients(make_toy(0.0)).items())  # dropout was on


def test_only_the_inputs_of_blocks_are_kept():
    def kept(checkpointed: bool) -> int:
        model, total = make_toy(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: total.append(t.numel()) or t, lambda t: t):
            with shaped(model, False, checkpointed):
                squared_error(model, Rows().at(0))
        return sum(total)

    assert kept(True) < 0.3 * kept(False)


def test_the_run_is_the_same_to_the_bit_and_blocks_are_as_before(tmp_path):
    models = make_toy(), make_toy()
    train(models[0], squared_error, Rows(), CONFIG, tmp_path / "plain")
    config = dataclasses.replace(CONFIG, activation_checkpointing=True)
    train(models[1], squared_error, Rows(), config, tmp_path / "recomputed")
    assert curve(tmp_path / "plain") == curve(tmp_path / "recomputed")
    assert all(torch.equal(*pair) for pair in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert all("forward" not in vars(block) for block in blocks(models[1]))


@pytest.mark.parametrize("shape", [(True, False), (False, True)])
def test_a_model_without_blocks_is_refused(shape):
    with pytest.raises(UserError, match="found no transformer block"), shaped(nn.Linear(2, 2), *shape):
        pass


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile builds with a C++ compiler on a CPU")
def test_compiled_blocks_compute_the_same(tmp_path):
    config = dataclasses.replace(CONFIG, steps=2, log_every=1)
    train(make_toy(0.0), squared_error, Rows(), config, tmp_path / "plain")
    config = dataclasses.replace(config, compile=True, activation_checkpointing=True)
    train(make_toy(0.0), squared_error, Rows(), config, tmp_path / "compiled")
    for found, expected in zip(curve(tmp_path / "compiled"), curve(tmp_path / "plain"), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    assert flops(tmp_path / "compiled") == pytest.approx(flops(tmp_path / "plain"))


def flops(state) -> float:
    """Of one sample."""
    line = json.loads((state / "timing.jsonl").read_text().splitlines()[-1])
    return line["tflops"] / line["samples_per_second"]
