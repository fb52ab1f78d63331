"""What is remembered of hosts."""

import pytest

from vlmpipe.curate.failures import Failure
from vlmpipe.curate.hosts import Hosts, Rules


def test_a_host_that_only_asks_to_wait_is_given_up_after_some_passes_and_one_that_serves_is_not():
    hosts = Hosts(Rules(attempts=3))
    for _ in range(3):
        for host in ("never.test", "slowly.test"):
            hosts.limited(host, Failure("http_429", "", 429, wait=0.0))
        hosts.served("slowly.test")
        hosts.end_pass()
    assert set(hosts.dead) == {"never.test"}
    assert hosts.facts()["dead"] == {}


def test_one_refused_connection_does_not_condemn_a_host_that_answered():
    hosts = Hosts(Rules())
    hosts.connected("a:80")
    for _ in range(2):
        hosts.failed("a:80", Failure("connection_refused"))
        hosts.check("a:80")
    hosts.failed("a:80", Failure("connection_refused"))
    with pytest.raises(Failure):
        hosts.check("a:80")
