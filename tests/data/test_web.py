"""The loopback web: every fault really happens on the wire."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vlmpipe.data.web import Page, serve, write_pages
from vlmpipe.errors import UserError

ROOT = Path(__file__).parents[2]
PAGES = [
    Page("http://a.test/ok.jpg", b"picture" * 1000),
    Page("http://a.test/gone.jpg", status=410),
    Page("http://a.test/busy.jpg", b"later", first_status=429),
    Page("http://a.test/closed.jpg", status=429),
    Page("http://a.test/restarting.jpg", b"later", first_status=503),
    Page("http://a.test/short.jpg", b"half", claimed=400),
    Page("http://a.test/away.jpg", status=302, location="http://169.254.169.254/latest"),
    Page("http://a.test/mine.jpg", b"mine", robots="noai"),
    Page("http://slow.test/slow.jpg", b"slow", delay=0.6),
    Page("http://slow.test/endless.jpg", b"start", endless=True),
    Page("http://dead.test/any.jpg", listens=False),
]


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    world = tmp_path_factory.mktemp("world")
    write_pages(world / "web/pool.parquet", PAGES)
    with serve("scenes", world) as hosts:
        yield hosts


def get(web: dict, host: str, path: str, method: str = "GET") -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(*web[host], timeout=5)
    connection.request(method, path, headers={"Host": host})
    response = connection.getresponse()
    return response, response.read()


def test_pages_by_host_and_path(web):
    response, body = get(web, "a.test", "/ok.jpg")
    assert (response.status, body) == (200, b"picture" * 1000)
    assert response.headers["Content-Type"] == "image/jpeg"
    assert get(web, "slow.test", "/ok.jpg")[0].status == 404
    assert get(web, "a.test", "/gone.jpg")[0].status == 410
    assert get(web, "a.test", "/ok.jpg", "HEAD")[1] == b""
    assert get(web, "a.test", "/ok.jpg", "POST")[0].status == 405


@pytest.mark.parametrize(("path", "status"), [("/busy.jpg", 429), ("/restarting.jpg", 503)])
def test_a_busy_page_asks_to_wait_once(web, path, status):
    response, _ = get(web, "a.test", path)
    assert (response.status, response.headers["Retry-After"]) == (status, "1")
    response, body = get(web, "a.test", path)
    assert (response.status, body, response.headers["Retry-After"]) == (200, b"later", None)


def test_some_pages_stay_busy(web):
    assert [get(web, "a.test", "/closed.jpg")[0].status for _ in range(3)] == [429] * 3


def test_a_truncated_body_breaks_the_promise_of_its_length(web):
    with pytest.raises(http.client.IncompleteRead):
        get(web, "a.test", "/short.jpg")


def test_headers_of_redirects_and_opt_outs(web):
    response, _ = get(web, "a.test", "/away.jpg")
    assert (response.status, response.headers["Location"]) == (302, "http://169.254.169.254/latest")
    assert get(web, "a.test", "/mine.jpg")[0].headers["X-Robots-Tag"] == "noai"


def test_a_slow_host_holds_up_nobody_else(web):
    with ThreadPoolExecutor() as pool:
        start = time.monotonic()
        slow = [pool.submit(get, web, "slow.test", "/slow.jpg") for _ in range(4)]
        get(web, "a.test", "/ok.jpg")
        quick = time.monotonic() - start
        assert all(future.result()[1] == b"slow" for future in slow)
    assert quick < 0.6 <= time.monotonic() - start


def test_an_endless_body_goes_on(web):
    with socket.create_connection(web["slow.test"], timeout=5) as connection:
        connection.sendall(b"GET /endless.jpg HTTP/1.1\r\nHost: slow.test\r\n\r\n")
        received = b""
        while len(received) < 200:
            received += connection.recv(4096)
    assert b"Content-Length" not in received and b"start" in received


def test_a_dead_host_refuses_connections(web):
    with pytest.raises(ConnectionRefusedError):
        get(web, "dead.test", "/any.jpg")


def test_what_is_not_http_gets_an_answer(web):
    with socket.create_connection(web["a.test"], timeout=5) as connection:
        connection.sendall(b"hello\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")


def test_folders_by_host_and_nothing_outside_them(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    (tmp_path / "one/a b.png").write_bytes(b"png")
    (tmp_path / "two/secret.txt").write_bytes(b"secret")
    (tmp_path / "one/link.txt").symlink_to(tmp_path / "two/secret.txt")
    with serve("folder", tmp_path, ("one.test=one", "all.test")) as web:
        response, body = get(web, "one.test", "/a%20b.png?size=1")
        assert (body, response.headers["Content-Type"]) == (b"png", "image/png")
        outside = ["/../two/secret.txt", "/%2e%2e/two/secret.txt", "/link.txt", "//etc/hostname", "/a%00b", "/"]
        assert [get(web, "one.test", path)[0].status for path in outside] == [404] * len(outside)
        assert get(web, "all.test", "/two/secret.txt")[1] == b"secret"


def test_what_cannot_be_served_is_named(tmp_path):
    with pytest.raises(UserError, match="run the world stage"), serve("scenes", tmp_path):
        pass
    with pytest.raises(UserError, match=r"no folder .*nowhere for host 'a\.test'"):
        with serve("folder", tmp_path, ("a.test=nowhere",)):
            pass


def test_it_ends_with_a_killed_parent(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from vlmpipe.data.web import serve\n"
        "with serve('folder', Path(sys.argv[1]), ('a.test',)) as hosts:\n"
        "    print(hosts['a.test'][1], flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    port = int(parent.stdout.readline())
    socket.create_connection(("127.0.0.1", port)).close()
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.05)
    pytest.fail("the web outlived its parent")
