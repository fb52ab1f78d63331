"""Where work runs: same results everywhere, failures that name the item, nothing left behind."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from vlmpipe.dispatch import Cluster, local_ray, map_shards, run_training
from vlmpipe.errors import UserError


def square(number: int) -> int:
    time.sleep(0.02 * (3 - number % 3))  # later items finish first
    return number * number


def refuse(number: int) -> int:
    raise UserError(f"found {number}; expected none; do without")


def crash(number: int) -> int:
    raise KeyError(number)


def fill_disk(number: int) -> int:
    raise OSError(28, "No space left on device")


def die_once(number: int, marker: Path) -> int:
    if number == 1 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def ray_address():
    with local_ray(cpus=2) as address:
        yield address


@pytest.mark.parametrize("backend", ["inline", "processes", "ray"])
def test_results_come_in_item_order(backend, request):
    if backend == "ray":
        request.getfixturevalue("ray_address")
    cluster = Cluster(backend=backend, tasks=2)
    assert map_shards(square, range(7), cluster, "squares") == [n * n for n in range(7)]
    assert map_shards(square, [], cluster, "squares") == []


@pytest.mark.parametrize("backend", ["inline", "processes", "ray"])
def test_failures_name_the_item(backend, request):
    if backend == "ray":
        request.getfixturevalue("ray_address")
    cluster = Cluster(backend=backend)
    with pytest.raises(UserError, match="squares, 4: found 4; expected none; do without"):
        map_shards(refuse, [4], cluster, "squares")
    with pytest.raises(RuntimeError, match="squares failed on 5: KeyError: 5"):
        map_shards(crash, [5], cluster, "squares")
    with pytest.raises(OSError) as caught:
        map_shards(fill_disk, [6], cluster, "squares")
    assert caught.value.errno == 28 and "squares failed on 6" in caught.value.__notes__


@pytest.mark.parametrize("backend", ["processes", "ray"])
def test_a_killed_worker_is_replaced(backend, request, tmp_path):
    if backend == "ray":
        request.getfixturevalue("ray_address")
    cluster = Cluster(backend=backend, tasks=2, max_failures=1)
    assert map_shards(partial(die_once, marker=tmp_path / "died"), range(4), cluster, "items") == [0, 1, 2, 3]
    assert (tmp_path / "died").exists()


def test_a_worker_that_always_dies_is_reported():
    with pytest.raises(RuntimeError, match=r"died 1 time.*at work on 3"):
        map_shards(die, [3], Cluster(backend="processes", max_failures=0), "items")


# --- training ----------------------------------------------------------------------------------------------

def sum_of_ranks(config, report, stopped):
    import torch
    import torch.distributed as dist

    total = torch.tensor([float(os.environ.get("RANK", 0)) + 1])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(total)
    report({"step": 1, "steps": 1, "loss": 0.5})
    return {"total": total.item(), "threads": torch.get_num_threads(), "config": config, "stopped": stopped()}


def refuse_training(config, report, stopped):
    raise UserError("found no data; expected some; add it")


def die_in_first_attempt(config, report, stopped):
    marker = Path(config["marker"])
    if not marker.exists():
        marker.touch()
        time.sleep(2)  # Ray does not retry what dies while it is still starting the workers
        os.kill(os.getpid(), signal.SIGKILL)
    raise UserError("found a second attempt; expected one; none needed")


def wait_for_stop(config, report, stopped):
    Path(config["ready"]).touch()
    while not stopped():
        time.sleep(0.05)
    return {"stopped": True}


def test_inline_training_needs_no_ray(tmp_path):
    result = run_training(sum_of_ranks, {"a": 1}, Cluster(backend="inline", threads=1), tmp_path, "pretrain")
    assert result == {"total": 1.0, "threads": 1, "config": {"a": 1}, "stopped": False}


def test_two_workers_talk_and_report(ray_address, tmp_path, capsys):
    cluster = Cluster(workers=2, cpus_per_worker=1, max_failures=0)
    result = run_training(sum_of_ranks, {"a": 1}, cluster, tmp_path, "pretrain")
    assert result == {"total": 3.0, "threads": 1, "config": {"a": 1}, "stopped": False}
    assert "pretrain: 1/1 (100%) loss 0.5" in capsys.readouterr().err


def test_user_errors_of_training_workers_reach_the_user(tmp_path):
    with pytest.raises(UserError, match=r"^found no data; expected some; add it$"):
        run_training(refuse_training, {}, Cluster(backend="inline", threads=1), tmp_path, "pretrain")


def test_a_killed_training_worker_is_restarted(ray_address, tmp_path):
    config = {"marker": str(tmp_path / "died")}
    cluster = Cluster(cpus_per_worker=1, max_failures=1)
    with pytest.raises(UserError, match="found a second attempt"):
        run_training(die_in_first_attempt, config, cluster, tmp_path, "pretrain")


def test_more_workers_than_the_cluster_holds_are_refused_at_once(ray_address, tmp_path):
    with pytest.raises(UserError, match=r"found 3 worker.*1 CPU each.*2 CPU/0 GPU.*at most 2.*lower cluster.workers"):
        run_training(sum_of_ranks, {}, Cluster(workers=3, cpus_per_worker=1), tmp_path, "pretrain")
    with pytest.raises(UserError, match=r"1 CPU and 1 GPU each.*at most 0"):
        map_shards(square, [1], Cluster(gpus_per_task=1), "squares")
