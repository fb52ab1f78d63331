"""Batches of phrases and pictures, and processes played one after another."""

import torch

from tests.models.heads.test_pointing import make
from tests.models.tiny import pictures
from vlmpipe.models.processor import stack

PHRASES = ["red", "a blue square", "two shapes", "a red circle above a blue square"]


def make_batch(processor, rows=(0, 1, 2, 3), first=(0, 1), images=2):
    """Some of PHRASES about the first `images` pictures, whose phrases begin at the rows `first`."""
    batch = stack([[processor.encode(PHRASES[row])] for row in rows])
    batch = {name: batch[name] for name in ("tokens", "segments", "positions")}
    return {"images": processor.images(pictures(images)), "image_rows": torch.tensor(first), **batch}


def as_processes(objective, module, model, parts, monkeypatch):
    """The mean over `parts`, one for each process, of the loss and of the metrics; gradients lie in the model.

    The numbers that processes share are collected in a first pass and shared out in a second.
    """
    counts = []
    for part in parts:
        seen = []
        monkeypatch.setattr(module, "mean", lambda value, seen=seen: seen.append(value.detach()) or value)
        objective(model, part)
        counts.append(seen)
    means = [torch.stack(values).mean() for values in zip(*counts, strict=True)]
    totals = {}
    for part in parts:
        ahead = iter(means)
        monkeypatch.setattr(module, "mean", lambda value, ahead=ahead: next(ahead))
        loss, metrics = objective(model, part)
        (loss / len(parts)).backward()
        for name, value in {"loss": loss.detach(), **metrics}.items():
            totals[name] = totals.get(name, 0) + value / len(parts)
    return totals


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


__all__ = ["PHRASES", "as_processes", "gradients", "make", "make_batch"]
