"""A checkpoint is complete or invisible, belongs to one run, and gives back every bit."""

import json

import torch
from torch import nn

from vlmpipe.train import checkpoint

TENSORS = {"model": {"weight": torch.arange(6.0).reshape(2, 3)}}


def write(root, step, run="a", keep=2):
    return checkpoint.save(root, step, run, TENSORS, {"curves.jsonl": f"{step}\n"}, keep)


def test_newest_of_the_same_run_wins(tmp_path):
    write(tmp_path, 100)
    path = write(tmp_path, 200)
    assert checkpoint.newest(tmp_path, "a") == path
    assert checkpoint.newest(tmp_path, "b") is None
    assert torch.equal(checkpoint.load_tensors(path, "model")["weight"], TENSORS["model"]["weight"])
    assert (path / "curves.jsonl").read_text() == "200\n"


def test_only_the_newest_of_this_run_are_kept(tmp_path):
    write(tmp_path, 900, run="other")
    (tmp_path / ".step-00000950.partial").mkdir()
    for step in (1, 2, 3):
        write(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


def test_incomplete_and_damaged_ones_are_passed_over(tmp_path, capsys):
    good = write(tmp_path, 1, keep=9)
    damaged, unmarked = write(tmp_path, 2, keep=9), write(tmp_path, 3, keep=9)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    (unmarked / checkpoint.MARKER).unlink()
    assert checkpoint.newest(tmp_path, "a") == good
    assert "step-00000002 is damaged (model.safetensors)" in capsys.readouterr().err


def test_fingerprints_tell_runs_apart():
    facts = {"lr": 0.1, "data": "abc"}
    assert checkpoint.fingerprint(facts) == checkpoint.fingerprint(json.loads(json.dumps(facts)))
    assert checkpoint.fingerprint(facts) != checkpoint.fingerprint({**facts, "lr": 0.2})


def test_optimizer_state_and_tied_weights_come_back(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(3, 4)).square().mean().backward()
    optimizer.step()
    tensors = {"model": model.state_dict(), "optimizer": checkpoint.optimizer_tensors(optimizer)}
    path = checkpoint.save(tmp_path, 1, "a", tensors, {})
    fresh = torch.optim.AdamW(model.parameters(), fused=True)
    checkpoint.restore_optimizer(fresh, checkpoint.load_tensors(path, "optimizer"))
    expected, found = checkpoint.optimizer_tensors(optimizer), checkpoint.optimizer_tensors(fresh)
    assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    restored = checkpoint.load_tensors(path, "model")
    assert torch.equal(restored["0.weight"], restored["1.weight"])
