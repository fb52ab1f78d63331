"""Batch norm over one process is torch's; a frozen one stands still. Over several: tests/train/test_objectives.py."""

import torch
from torch import nn

from vlmpipe.models.collective import BatchNorm


def test_in_one_process_it_is_torchs():
    torch.manual_seed(0)
    ours, theirs = BatchNorm(3), nn.BatchNorm2d(3)
    for _ in range(3):
        batch = torch.randn(4, 3, 5, 5) * 2 + 1
        assert torch.equal(ours(batch), theirs(batch))
    assert torch.equal(ours.running_var, theirs.running_var)
    assert torch.equal(ours.eval()(batch), theirs.eval()(batch))


def test_a_frozen_layer_gives_in_training_what_it_gives_after():
    norm = BatchNorm(3)
    norm(torch.randn(4, 3, 5, 5) + 2)
    norm.requires_grad_(False)
    before, batch = norm.running_mean.clone(), torch.randn(4, 3, 5, 5)
    in_training = norm(batch)
    assert torch.equal(norm.running_mean, before)
    assert torch.equal(in_training, norm.eval()(batch))
