"""Batches made ahead are the same batches in the same order, and none is made that nobody needs."""

import dataclasses
import threading

import pytest

from tests.train.rows import CONFIG, Rows, curve, make_toy, squared_error
from vlmpipe.train.ahead import Ahead
from vlmpipe.train.loop import train


class Asked(Rows):
    def __init__(self):
        super().__init__()
        self.numbers, self.threads = [], set()

    def at(self, step: int):
        self.numbers.append(step)
        self.threads.add(threading.get_ident())
        return super().at(step)


@pytest.mark.parametrize(("ahead", "made"), [(True, [0, 1, 2]), (False, [0, 1])])
def test_the_next_batch_is_made_in_another_thread(ahead, made):
    rows = Asked()
    batches = Ahead(rows, 9, ahead, pin=False)
    for number in (0, 1):
        assert batches.at(number)["x"].equal(Rows().at(number)["x"])
    batches.close()
    assert rows.numbers[: len(made)] == made[: len(rows.numbers)] and threading.get_ident() not in rows.threads


def test_a_jump_is_answered_and_the_end_is_kept():
    rows = Asked()
    batches = Ahead(rows, 6, True, pin=False)
    for number in (0, 4, 5):
        assert batches.at(number)["x"].equal(Rows().at(number)["x"])
    batches.close()
    assert max(rows.numbers) == 5


def test_an_error_in_the_thread_is_the_runs():
    class Broken(Rows):
        def at(self, step: int):
            raise OSError("disk")

    batches = Ahead(Broken(), 6, True, pin=False)
    with pytest.raises(OSError, match="disk"):
        batches.at(0)
    batches.close()


def test_the_run_is_the_same_to_the_bit(tmp_path):
    for prefetch in (True, False):
        config = dataclasses.replace(CONFIG, prefetch=prefetch, accumulation=2)
        train(make_toy(), squared_error, Rows(3), config, tmp_path / str(prefetch))
    assert curve(tmp_path / "True") == curve(tmp_path / "False")
