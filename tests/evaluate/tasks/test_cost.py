"""What a model costs beside a champion, measured on models whose costs are known; its checkpoint, there and back."""

import json
import multiprocessing
import os
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from types import SimpleNamespace

import pytest
import torch

from tests.evaluate.test_tasks import INLINE, see, write_model, write_packed, write_questions
from vlmpipe.data.task import TaskConfig
from vlmpipe.errors import UserError
from vlmpipe.evaluate.store import CHALLENGER, CHAMPION
from vlmpipe.evaluate.tasks import TASKS, EvaluateConfig, cost, evaluate
from vlmpipe.evaluate.tasks.chunks import Chunk, Contender
from vlmpipe.models import load, save
from vlmpipe.shards import read_json

CONFIG = EvaluateConfig(batch_size=4, tasks=("vqa",), attention_samples=0)
SECONDS, HOARD = 0.004, 100 << 20


def predict(model, processor, batch, right, wrong, config):
    """A model whose first answer is `slow` takes twice as long for a sample, and once held 400 MiB."""
    slow = processor.answers[0] == "slow"
    time.sleep(len(batch) * SECONDS * (2 if slow else 1))
    if slow and len(batch) == 2:
        torch.ones(HOARD)
    if processor.answers[0] == "lost":
        raise UserError("it can't do this")
    return see(model, processor, batch, right, wrong, config)


TASK = replace(TASKS["vqa"], predict=predict)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("cost")
    write_questions(root / "questions/test")
    write_packed(root / "packed/test")
    for name in ("slow", "fast", "lost"):
        write_model(root / name, "prefix")
        model, processor = load(root / name)
        processor.answers = (name, *processor.answers)
        save(model, processor, root / name)
    return root


def chunk(place, name="slow", count=8) -> Chunk:
    samples = tuple(TASK.read(place / "questions/test", TaskConfig())[:count])
    return Chunk("costs", "vqa", place / "questions/test", samples, model=Contender(CHALLENGER, place / name, "a"))


@pytest.fixture
def threads(monkeypatch):
    """Threads in place of processes, which take seconds to start."""

    class Worker(threading.Thread):
        def __init__(self, target, args, daemon):
            ours = Connection(os.dup(args[0].fileno()))  # a process gets a copy, too
            super().__init__(target=target, args=(ours, *args[1:]), daemon=daemon)

        def terminate(self):
            pass  # a daemon, and nobody talks to it any more

        def join(self):
            pass

    context = SimpleNamespace(Pipe=multiprocessing.Pipe, Process=Worker)
    monkeypatch.setattr(cost.multiprocessing, "get_context", lambda _: context)


def test_a_model_twice_as_slow_shows_by_its_ratios(place, threads):
    found = cost.costs(chunk(place), TASK, CONFIG, Contender(CHAMPION, place / "fast", "b"), turns=8)
    assert found["models"] == {CHALLENGER: "a", CHAMPION: "b"} and set(found["n"].values()) == {8}
    values = found["metrics"]
    assert 1.4 < values["cost.seconds_ratio"] < 2.6 and 0.35 < values["cost.throughput_ratio"] < 0.75
    assert values["cost.memory_ratio"] == pytest.approx(1, rel=0.02)  # of one process here
    # A sample is asked about two pictures; the sleep is for both.
    assert SECONDS < values["cost.seconds_per_sample"] < 10 * SECONDS
    assert 0.1 / SECONDS < values["cost.samples_per_second"] < 1 / SECONDS


@pytest.mark.slow  # it starts a process that imports torch
def test_memory_is_that_of_the_models_own_process(place):
    mine = torch.ones(2 * HOARD)  # 800 MiB that the model doesn't hold
    found = cost.costs(chunk(place, count=2), TASK, CONFIG, turns=1)["metrics"]
    assert 400 < found["cost.peak_memory_mib"] < cost.peak_memory() / cost.MIB - 300
    assert mine[0] == 1 and "cost.memory_ratio" not in found


def test_without_a_champion_that_can_do_it_there_are_no_ratios(place, threads):
    found = cost.costs(chunk(place, "fast"), TASK, CONFIG, Contender(CHAMPION, place / "lost"), turns=1)
    assert set(found["metrics"]) == {"cost.seconds_per_sample", "cost.samples_per_second", "cost.peak_memory_mib"}
    assert set(found["details"].values()) == {"champion: it can't do this"}
    with pytest.raises(UserError, match="it can't do this"):
        cost.costs(chunk(place, "lost"), TASK, CONFIG, turns=1)


def test_a_checkpoint_that_loses_a_bit_is_found(place, monkeypatch):
    assert cost.round_trip(chunk(place, "fast", 2), TASKS["vqa"], CONFIG)

    def rounded(model, processor, directory):
        next(model.parameters()).data.view(torch.int32).view(-1)[0] ^= 1
        save(model, processor, directory)

    monkeypatch.setattr(cost, "save", rounded)
    one, _ = load(place / "fast")
    assert cost.same_weights(one, load(place / "fast")[0])
    next(one.parameters()).data.view(-1)[0] = torch.nan
    assert cost.same_weights(one, one) and not cost.same_weights(one, load(place / "fast")[0])


def test_evaluation_writes_costs_beside_what_is_tracked(place, tmp_path, monkeypatch):
    asked = {}

    def instead(chunk, task, config, champion):
        asked.update(samples=len(chunk.samples), champion=champion)
        return {"metrics": {"cost.seconds_per_sample": 1.0}, "models": {}}

    monkeypatch.setattr(cost, "costs", instead)
    out = tmp_path / "out"
    evaluate(
        "test", place / "fast", place / "packed", place / "questions", out, out / "metrics.json",
        replace(CONFIG, cost_samples=3), INLINE, champion=("v1.0.0", place / "slow"), state=tmp_path / "state",
    )
    assert asked == {"samples": 3, "champion": asked["champion"]} and asked["champion"].role == CHAMPION
    assert read_json(tmp_path / "state/costs.json")["metrics"] == {"cost.seconds_per_sample": 1.0}
    found = json.loads((out / "metrics.json").read_text())
    assert found["metrics"]["checkpoint.round_trip"] == 1 and found["n"]["checkpoint.round_trip"] == 3
    assert not any(name.startswith("cost.") for name in found["metrics"])
