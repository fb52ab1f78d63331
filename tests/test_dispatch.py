"""Where work runs: same results everywhere, failures that name the item, nothing left behind."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import psutil
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


def driver(code: str, stdout: int | None = None, **environment: str) -> subprocess.Popen:
    """A process of its own that runs `code` with everything of this module at hand."""
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "VLMPIPE_"))}
    return subprocess.Popen(
        [sys.executable, "-c", f"from test_dispatch import *\n{code}"],
        env={**inherited, "PYTHONPATH": path, **environment}, start_new_session=True, stdout=stdout, text=True,
        cwd=Path(__file__).parent,
    )


def wait_until(condition, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


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


def sleep_and_tell(number: int, folder: Path) -> None:
    (folder / f"{number}").touch()
    time.sleep(600)


def test_processes_die_with_a_killed_parent(tmp_path):
    task = f"partial(sleep_and_tell, folder=Path({str(tmp_path)!r}))"
    code = f"map_shards({task}, [1, 2], Cluster('processes', tasks=2), 'x')"
    parent = driver(code)
    assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    family = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    assert len(family) >= 2 and wait_until(lambda: all(gone(child) for child in family), 10)


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


@pytest.mark.slow
def test_two_workers_talk_and_report(ray_address, tmp_path, capsys):
    cluster = Cluster(workers=2, cpus_per_worker=1, max_failures=0)
    result = run_training(sum_of_ranks, {"a": 1}, cluster, tmp_path, "pretrain")
    assert result == {"total": 3.0, "threads": 1, "config": {"a": 1}, "stopped": False}
    assert "pretrain: 1/1 (100%) loss 0.5" in capsys.readouterr().err


def test_user_errors_of_training_workers_reach_the_user(tmp_path):
    with pytest.raises(UserError, match=r"^found no data; expected some; add it$"):
        run_training(refuse_training, {}, Cluster(backend="inline", threads=1), tmp_path, "pretrain")


@pytest.mark.slow
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


def test_sigterm_ends_training_in_order(tmp_path):
    code = (
        f"facts = run_training(wait_for_stop, {{'ready': {str(tmp_path / 'ready')!r}}}, Cluster('inline', threads=1), "
        f"Path({str(tmp_path)!r}), 'pretrain')\nsys.exit(0 if facts == {{'stopped': True}} else 1)"
    )
    process = driver(code)
    assert wait_until((tmp_path / "ready").exists)
    process.terminate()
    assert process.wait(30) == 0
    assert not (tmp_path / "stop").exists()


@pytest.mark.slow
def test_a_killed_driver_leaves_no_process_of_ray_behind(tmp_path):
    code = (
        f"run_training(wait_for_stop, {{'ready': {str(tmp_path / 'ready')!r}}}, Cluster(cpus_per_worker=1), "
        f"Path({str(tmp_path)!r}), 'pretrain')"
    )
    process = driver(code)
    assert wait_until((tmp_path / "ready").exists, 120)
    family = psutil.Process(process.pid).children(recursive=True)
    assert any("RayTrainWorker" in child.name() or "ray::" in child.name() for child in family)
    process.kill()
    process.wait()
    assert wait_until(lambda: all(gone(child) for child in family)), [c for c in family if not gone(c)]


# --- joining -----------------------------------------------------------------------------------------------

@pytest.fixture
def apart(monkeypatch):
    """No Ray in the environment, whatever other tests have there."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_an_address_that_nobody_answers_fails_at_once(apart):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(UserError, match=f"nothing answers at the cluster address {address}.*ray start --head"):
        map_shards(square, [1], Cluster(address=address), "squares")


def test_an_address_of_something_else_is_told_apart(apart):
    with socket.create_server(("127.0.0.1", 0)) as server:
        def answer():
            connection, _ = server.accept()
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=f"what answers at the cluster address {address} is not Ray"):
            map_shards(square, [1], Cluster(address=address), "squares")


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "head", ":6379"])
def test_an_address_that_is_none_is_refused(apart, address):
    with pytest.raises(UserError, match="expected host:port"):
        map_shards(square, [1], Cluster(address=address), "squares")


TWO_NODES = """
import sys
from ray.cluster_utils import Cluster
options = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=options)
cluster.add_node(**{key: value for key, value in options.items() if key != "include_dashboard"})
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture
def two_nodes(apart, monkeypatch):
    """Address of a Ray cluster of two nodes of one CPU that somebody else started, elsewhere and with a token."""
    for key, value in {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "GLOO_SOCKET_IFNAME": "lo"}.items():
        monkeypatch.setenv(key, value)
    nodes = subprocess.Popen(
        [sys.executable, "-c", TWO_NODES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
    )
    yield nodes.stdout.readline().strip()
    nodes.stdin.close()
    nodes.wait(60)


def where(item):
    import ray

    import vlmpipe

    time.sleep(1)
    return ray.get_runtime_context().get_node_id(), vlmpipe.__file__


def node_of_rank(config, report, stopped):
    import torch.distributed as dist

    nodes = [None] * dist.get_world_size()
    dist.all_gather_object(nodes, where(None)[0])
    return {"nodes": nodes}


JOIN = """
cluster = Cluster(address={address!r}, workers=2, max_failures=0)
nodes, files = zip(*map_shards(where, range(6), cluster, "items"))
print(len(set(nodes)), cluster.worker_cpus, *set(files))
print(len(set(run_training(node_of_rank, {{}}, cluster, Path({state!r}), "pretrain")["nodes"])))
try:
    run_training(node_of_rank, {{}}, Cluster(address={address!r}, cpus_per_worker=2), Path({state!r}), "pretrain")
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_cluster_of_two_nodes_is_joined_by_address(two_nodes, tmp_path):
    code = JOIN.format(address=two_nodes, state=str(tmp_path))
    keep = {key: os.environ[key] for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    process = driver(code, stdout=subprocess.PIPE, **keep)
    mapped, trained, refused = process.communicate(timeout=240)[0].splitlines()
    nodes, cpus, *files = mapped.split()
    assert (nodes, cpus) == ("2", "1")  # both nodes worked; a worker takes one CPU of a cluster that is not ours
    assert all("runtime_resources" in file for file in files)  # the code that we sent along, not what lies there
    assert trained == "2"
    assert "1 CPU/0 GPU + 1 CPU/0 GPU; expected at most 0" in refused


def test_values_that_make_no_cluster_are_refused():
    with pytest.raises(UserError, match="found workers: 0; expected at least 1"):
        Cluster(workers=0)
