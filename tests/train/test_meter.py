"""Arithmetic counted against the formula by hand; rates; what is said where."""

import dataclasses
import json
import time

import pytest
import torch
from torch import nn

from tests.models.tiny import make, pictures
from tests.train.rows import CONFIG, Rows, make_toy, squared_error
from vlmpipe.models.processor import stack
from vlmpipe.train import meter
from vlmpipe.train.loop import train
from vlmpipe.train.meter import Counter, Meter
from vlmpipe.train.objectives import objective_for

CPU = torch.device("cpu")


def test_a_linear_layer_costs_two_a_weight_and_row_forward_and_four_backward():
    model = nn.Sequential(nn.Linear(7, 11), nn.Linear(11, 3))
    with Counter() as counter:
        model(torch.randn(5, 7)).sum().backward()
    forward = 2 * 5 * (7 * 11 + 11 * 3)
    assert counter.flops == 3 * forward - 2 * 5 * 7 * 11  # nobody wants the gradient of the input


def test_attention_is_counted():
    query = torch.randn(2, 4, 6, 8, requires_grad=True)
    with Counter() as counter:
        nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
    product = 2 * 2 * 4 * 6 * 6 * 8
    assert counter.flops == (2 + 5) * product  # backward forms the scores anew


@pytest.mark.parametrize("preset", ["prefix", "dual"])
def test_counting_changes_no_bit(preset):
    found = []
    for counts in (False, True):
        model, processor = make(preset)
        encoded = [processor.encode_answer("what?", text) for text in ("red", "a blue square")]
        batch = {"images": processor.images(pictures(2)), **stack([[text] for text in encoded])}
        with Counter() if counts else torch.enable_grad():
            objective_for(model)(model, batch)[0].backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def flops(tmp_path, **changes) -> float:
    shown = []
    config = dataclasses.replace(CONFIG, steps=2, **changes)
    train(make_toy(), squared_error, Rows(6 // config.accumulation), config, tmp_path, report=shown.append)
    (line,) = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert shown[0].items() >= {name: line[name] for name in ("mfu", "tflops", "memory_gib")}.items()
    return line["tflops"] / line["samples_per_second"]


def test_repeated_and_divided_work_counts_once(tmp_path):
    plain = flops(tmp_path / "plain")
    assert plain > 0
    assert flops(tmp_path / "recomputed", activation_checkpointing=True) == pytest.approx(plain)
    assert flops(tmp_path / "parts", accumulation=2) == pytest.approx(plain, rel=0.01)


def test_rates_are_since_the_last_look():
    found = Meter(CPU, "float32", world=2)
    found.flops = 10**9
    found.peak = 1e12
    segments = torch.tensor([[-1, 1, 2, 0], [-1, 1, -2, 5000]])  # one sample, and two packed into a row
    time.sleep(0.02)
    found.count({"tokens": segments, "segments": segments})
    found.update()
    first = found.look()
    assert first["tokens_per_second"] / first["samples_per_second"] == pytest.approx(7 / 3)
    assert first["tflops"] == pytest.approx(2 * 1e12 * first["mfu"] / 1e12)
    assert 0 < first["samples_per_second"] < 2 * 3 / 0.02
    assert found.look()["samples_per_second"] == 0
    assert found.all_samples == 6


@pytest.mark.parametrize(
    ("name", "bf16", "float32"),
    [("NVIDIA H200", 989e12, 67e12), ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12), ("NVIDIA L4", 121e12, 30.3e12),
     ("NVIDIA H100 80GB HBM3", 989e12, 67e12), ("NVIDIA H100 PCIe", 756e12, 51e12), ("NVIDIA T1", 0.0, 0.0)],
)
def test_peaks_by_name(monkeypatch, name, bf16, float32):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert meter.peak(torch.device("cuda"), "bf16") == bf16
    assert meter.peak(torch.device("cuda"), "float32") == float32


def test_an_unknown_gpu_has_no_mfu():
    found = Meter(CPU, "bf16", world=1)
    found.flops, found.peak = 10**9, 0.0
    assert found.mfu(1.0) is None and "mfu" not in found.look()
