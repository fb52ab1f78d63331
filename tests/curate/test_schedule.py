"""Which row is asked for next."""

import threading
import time
from itertools import pairwise

from vlmpipe.curate.schedule import Schedule


def filled(rows, **settings):
    schedule = Schedule(**{"connections": 0, "interval": 0.0, "threads": 8, **settings})
    for host, row in rows:
        schedule.add(host, row)
    return schedule


def drain(schedule, work, threads):
    def go():
        while (taken := schedule.take()) is not None:
            work(*taken)

    workers = [threading.Thread(target=go) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


def test_hosts_take_turns_and_each_keeps_the_order_of_the_list():
    schedule = filled([("a", 1), ("a", 2), ("a", 3), ("b", 1), ("c", 1)])
    taken = []
    for _ in range(5):
        taken.append(schedule.take())
        schedule.done(*taken[-1])
    assert taken == [("a", 1), ("b", 1), ("c", 1), ("a", 2), ("a", 3)] and schedule.take() is None


def test_no_host_has_more_than_its_connections_at_once():
    schedule = filled([("a", row) for row in range(30)] + [("b", row) for row in range(5)], connections=3)
    running, most, lock = {"a": 0, "b": 0}, {"a": 0, "b": 0}, threading.Lock()

    def work(host, row):
        with lock:
            running[host] += 1
            most[host] = max(most[host], running[host])
        time.sleep(0.005)
        with lock:
            running[host] -= 1
        schedule.done(host, row)

    drain(schedule, work, 8)
    assert most["a"] == 3 and most["b"] <= 3


def test_requests_to_one_host_keep_their_distance_and_other_hosts_do_not_wait_for_them():
    schedule, times = filled([(host, row) for row in range(4) for host in "ab"], interval=0.1), {"a": [], "b": []}
    schedule.slow_down("b", 0.15)

    def work(host, row):
        times[host].append(time.monotonic())
        schedule.done(host, row)

    drain(schedule, work, 4)
    gaps = {host: [later - sooner for sooner, later in pairwise(at)] for host, at in times.items()}
    assert min(gaps["a"]) >= 0.099 and min(gaps["b"][1:]) >= 0.149
    assert times["a"][-1] < times["b"][-1]


def test_a_slow_host_holds_only_its_share_of_the_threads_and_the_others_finish_long_before_it():
    slow = [("slow", row) for row in range(40)]
    schedule = filled(slow + [(f"h{row % 4}", row) for row in range(80)], threads=8)
    ended = {}

    def work(host, row):
        time.sleep(0.2 if host == "slow" else 0.001)
        ended[host] = time.monotonic()
        if host == "slow" and row > 12:
            schedule.stop()
        schedule.done(host, row)

    drain(schedule, work, 8)
    assert all(host in ended for host in ("h0", "h1", "h2", "h3"))
    assert max(at for host, at in ended.items() if host != "slow") < ended["slow"] - 0.3


def test_a_row_for_later_comes_back_first_and_a_held_host_is_left_alone():
    schedule = filled([("a", 1), ("a", 2), ("b", 1)])
    started = time.monotonic()
    assert schedule.take() == ("a", 1)
    schedule.hold("a", started + 0.2)
    schedule.done("a", 1, again_at=started + 0.1)
    assert schedule.take() == ("b", 1) and time.monotonic() - started < 0.09
    schedule.done("b", 1)
    assert schedule.take() == ("a", 1) and time.monotonic() - started >= 0.2
    schedule.done("a", 1)
    assert schedule.take() == ("a", 2)
    schedule.done("a", 2)
    assert schedule.take() is None


def test_more_rows_are_asked_for_before_the_last_are_taken():
    coming = iter([[("a", 1), ("a", 2)], [], [("b", 1)]])

    def more():
        rows = next(coming, None)
        for host, row in rows or ():
            schedule.add(host, row)
        return rows is not None

    schedule, taken = Schedule(0, 0.0, 4, more), []

    def work(host, row):
        taken.append((host, row))
        schedule.done(host, row)

    drain(schedule, work, 4)
    assert sorted(taken) == [("a", 1), ("a", 2), ("b", 1)]
