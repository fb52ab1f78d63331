"""What is remembered of hosts."""

import time

import pytest

from vlmpipe.curate.failures import Failure
from vlmpipe.curate.hosts import Hosts, Rules


def test_a_host_that_only_asks_to_wait_is_given_up_after_some_waits_and_one_that_serves_is_not():
    hosts = Hosts(Rules(attempts=3))
    for _ in range(4 + Hosts.RUN):
        for host in ("never.test", "slowly.test"):
            hosts.limited(host, Failure("http_429", "", 429, wait=1e-9))
        hosts.served("slowly.test")
    assert set(hosts.dead) == {"never.test"}
    assert hosts.facts()["dead"] == {}


def test_waits_without_a_retry_after_grow_and_too_long_ones_end_it():
    hosts, waits = Hosts(Rules(backoff=10.0, max_wait=30.0, attempts=9)), []
    for _ in range(Hosts.RUN + 1):
        hosts.limited("a.test", Failure("http_503", "", 503))
        waits.append(hosts.ready_at("a.test") - time.monotonic())
        hosts._not_before.clear()
    assert [round(wait) for wait in waits[-2:]] == [20, 40] and set(hosts.dead) == {"a.test"}


def test_a_host_whose_answers_never_end_in_time_is_given_up():
    hosts = Hosts(Rules())
    for _ in range(Hosts.SLOW - 1):
        hosts.slow("drips.test", Failure("timeout", "late"))
        hosts.slow("sometimes.test", Failure("timeout", "late"))
        hosts.finished("sometimes.test")
    hosts.check("drips.test")
    hosts.slow("drips.test", Failure("timeout", "late"))
    with pytest.raises(Failure, match="timeout: late"):
        hosts.check("drips.test")
    hosts.check("sometimes.test")


def test_one_refused_connection_does_not_condemn_a_host_that_answered():
    hosts = Hosts(Rules())
    hosts.connected("a:80")
    for _ in range(2):
        hosts.failed("a:80", Failure("connection_refused"))
        hosts.check("a:80")
    hosts.failed("a:80", Failure("connection_refused"))
    with pytest.raises(Failure):
        hosts.check("a:80")
