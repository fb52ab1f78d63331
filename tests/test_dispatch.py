"""Where work runs: same results everywhere, failures that name the item, nothing left behind."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from vlmpipe.dispatch import Cluster, local_ray, map_shards
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
