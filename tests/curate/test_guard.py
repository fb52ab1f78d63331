"""The guard against a web that does everything wrong."""

import contextlib
import datetime
import gzip
import ipaddress
import socket
import ssl
import threading
import time
import urllib.request
import zlib
from contextlib import contextmanager

import pytest

from tests.curate.web_of_faults import faulty_web, picture
from vlmpipe.curate import guard as guard_module
from vlmpipe.curate.failures import Failure, status_of
from vlmpipe.curate.guard import Guard, is_public, tagged
from vlmpipe.curate.hosts import Hosts, Rules
from vlmpipe.curate.pool import PoolConfig

LOOPBACK = ("127.0.0.0/8",)


@pytest.fixture(scope="module")
def web():
    with faulty_web() as server:
        yield server


def fetch(guard, url, tag="0"):
    with guard.installed():
        with urllib.request.urlopen(urllib.request.Request(tagged(url, tag)), timeout=1) as response:
            return response.read()


def failure(url, tag="0", **rules):
    with pytest.raises(Failure) as caught:
        fetch(Guard(Rules(allow=LOOPBACK, **rules)), url, tag)
    return caught.value


def test_an_image_comes_through_whole_and_the_opener_is_removed_afterwards(web):
    guard = Guard(Rules(allow=LOOPBACK))
    assert fetch(guard, web.url("/ok/7.jpg")) == picture(7)
    assert guard.record("0").attempts == 1 and guard.record("0").http_status == 200
    assert urllib.request._opener is None


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/a.jpg", "data:image/png;base64,AAAA", "gopher://a/"])
def test_other_schemes_are_refused(url):
    assert failure(url).reason == "scheme"


@pytest.mark.parametrize("url", ["http:///a.jpg", "http://me:secret@127.0.0.1/a.jpg", "http://a:99999/"])
def test_unusable_urls_are_refused(url):
    assert failure(url).reason == "bad_url"


@pytest.mark.parametrize("address", [
    "127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.9.9", "169.254.169.254", "0.0.0.0", "100.64.0.1", "224.0.0.1",
    "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:10.0.0.1", "2002:7f00:1::",
    "64:ff9b::7f00:1", "::127.0.0.1",
])
def test_addresses_that_are_not_public(address):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_that_are_public(address):
    assert is_public(ipaddress.ip_address(address))


def test_a_private_address_is_never_connected_to_unless_listed(web):
    before = sum(web.hits.values())
    with pytest.raises(Failure) as caught:
        fetch(Guard(Rules()), web.url("/ok/1.jpg"))
    assert caught.value.reason == "private_address"
    for disguise in ("http://localhost", "http://0x7f000001", "http://2130706433", "http://[::ffff:127.0.0.1]"):
        with pytest.raises(Failure) as caught:
            fetch(Guard(Rules()), f"{disguise}:{web.port}/ok/1.jpg")
        assert caught.value.reason in ("private_address", "dns"), disguise
    assert sum(web.hits.values()) == before


def test_a_redirect_into_a_private_network_is_refused(web):
    hosts = {"pictures.test": ("127.0.0.1", web.port)}
    with pytest.raises(Failure) as caught:
        fetch(Guard(Rules(hosts=hosts)), f"http://pictures.test/to/http!127.0.0.1:{web.port}/ok/55.jpg")
    assert caught.value.reason == "private_address"
    assert web.hits["/ok/55.jpg"] == 0


def test_a_name_that_changes_its_address_after_the_check_is_caught_by_the_peer(web, monkeypatch):
    real = socket.socket.connect
    monkeypatch.setattr(guard_module, "_resolve", lambda host, port: [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", port))])
    monkeypatch.setattr(guard_module.Bounded, "connect", lambda self, target: real(self, ("127.0.0.1", web.port)),
                        raising=False)
    with pytest.raises(Failure) as caught:
        fetch(Guard(Rules()), "http://rebinding.test/ok/56.jpg")
    assert caught.value.reason == "private_address"
    assert web.hits["/ok/56.jpg"] == 0


def test_mapped_hosts_go_where_the_map_says_and_their_redirects_too(web):
    guard = Guard(Rules(hosts={"a.test": ("127.0.0.1", web.port), "b.test": ("127.0.0.1", web.port)}))
    assert fetch(guard, "http://A.test/to/http!b.test/ok/9.jpg") == picture(9)


def test_redirects_are_bounded_and_stay_on_http(web):
    assert failure(web.url("/loop/a"), redirects=3).reason == "redirect"
    assert web.hits["/loop/axxx"] == 1 and web.hits["/loop/axxxx"] == 0
    assert failure(web.url("/to/ftp!127.0.0.1/a")).reason == "scheme"
    assert failure(web.url("/to/file!/etc/passwd")).reason == "scheme"


def test_sizes_are_capped_by_the_header_and_by_what_comes(web):
    assert failure(web.url("/large/5000000"), max_bytes=1000).reason == "too_large"
    started = time.monotonic()
    assert failure(web.url("/flood/a"), max_bytes=100_000).reason == "too_large"
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("path", ["/endless/1", "/headers/1"])
def test_the_deadline_ends_what_drips_for_ever(web, path):
    started = time.monotonic()
    assert failure(web.url(path), deadline=0.6).reason == "timeout"
    assert 0.5 < time.monotonic() - started < 2


def test_the_deadline_is_for_all_attempts_together(web):
    guard = Guard(Rules(allow=LOOPBACK, deadline=0.5, attempts=5))
    with pytest.raises(Failure):
        fetch(guard, web.url("/endless/2"))
    assert not guard.may_retry("0", "timeout")


def test_a_short_body_is_truncated_and_a_cut_line_is_a_reset(web):
    assert failure(web.url("/short/a")).reason == "truncated"
    assert failure(web.url("/reset/a")).reason == "reset"


@pytest.mark.parametrize("code, again", [
    (404, False), (410, False), (403, False), (500, True), (503, True), (408, True),
])
def test_which_answers_are_worth_another_attempt(web, code, again):
    guard = Guard(Rules(allow=LOOPBACK))
    with pytest.raises(Failure) as caught:
        fetch(guard, web.url(f"/status/{code}"))
    assert caught.value.reason == f"http_{code}" and caught.value.http_status == code
    assert guard.may_retry("0", caught.value.reason) is again
    assert status_of(caught.value.reason) == ("retriable" if again else "refused")


def test_retry_after_sets_when_to_come_back_and_too_long_a_wait_is_given_up(web):
    guard = Guard(Rules(allow=LOOPBACK, max_wait=10))
    for tag, wait in (("a", 3), ("b", 60)):
        with pytest.raises(Failure):
            fetch(guard, web.url(f"/wait/{wait}/{tag}"), tag)
    assert 2 < guard.record("a").not_before - time.monotonic() <= 3
    assert guard.may_retry("a", "http_429")
    assert not guard.may_retry("b", "http_429")


def test_a_run_of_429_leaves_the_host_alone_but_other_hosts_go_on(web):
    hosts = {"busy.test": ("127.0.0.1", web.port), "free.test": ("127.0.0.1", web.port)}
    guard = Guard(Rules(hosts=hosts))
    for i in range(6):
        with pytest.raises(Failure):
            fetch(guard, f"http://busy.test/wait/5/run{i}", i)
    assert sum(web.hits[f"/wait/5/run{i}"] for i in range(6)) == Hosts.RUN
    assert guard.record(5).attempts == 0 and guard.may_retry(5, "http_429")
    assert fetch(guard, "http://free.test/ok/3.jpg", "other") == picture(3)


def test_a_dead_host_is_asked_once(monkeypatch):
    asked = []
    monkeypatch.setattr(guard_module, "_resolve", lambda host, port: asked.append(host) or _no_such_name())
    guard = Guard(Rules())
    for i in range(5):
        with pytest.raises(Failure) as caught:
            fetch(guard, f"http://gone.test/{i}.jpg", i)
        assert (caught.value.reason, caught.value.detail) == ("dns", "no such name")
    assert asked == ["gone.test"]


def test_when_no_host_answers_at_all_the_rest_is_not_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(guard_module, "_resolve", lambda host, port: asked.append(host) or _no_such_name())
    guard = Guard(Rules(offline_after=10))
    reasons = []
    for i in range(15):
        with pytest.raises(Failure) as caught:
            fetch(guard, f"http://host{i}.test/a.jpg", i)
        reasons.append(caught.value.reason)
    assert reasons == ["dns"] * 10 + ["offline"] * 5
    assert len(asked) == 10


def _no_such_name():
    raise Failure("dns", "no such name")


def test_a_refused_port_is_remembered_too():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    guard = Guard(Rules(allow=LOOPBACK))
    with pytest.raises(Failure) as caught:
        fetch(guard, f"http://127.0.0.1:{port}/a.jpg")
    assert caught.value.reason == "connection_refused"
    assert f"127.0.0.1:{port}" in guard.hosts.dead


def test_urls_with_spaces_and_other_letters_are_sent_as_browsers_do(web):
    web.files["/a%20b%C3%A9.jpg"] = b"found"
    assert fetch(Guard(Rules(allow=LOOPBACK)), web.url("/a bé.jpg#part")) == b"found"
    assert tagged("http://bücher.example/ä?q=1&r=%20#x", 4) == "http://xn--bcher-kva.example/%C3%A4?q=1&r=%20#4"
    assert tagged("http://[::1/a", 4) == tagged("http://a..é/", 4) == "#4"


# --- connections that are kept -----------------------------------------------------------------------------

def test_one_connection_serves_several_requests_and_one_that_was_dropped_is_replaced(web):
    web.peers.clear()
    guard = Guard(Rules(allow=LOOPBACK))
    with guard.installed():
        for path in ("/kept/1.jpg", "/kept/2.jpg", "/kept/drop/3.jpg", "/kept/4.jpg"):
            assert ask(web.url(path), path) == picture(int(path[-5]))
    assert sorted(map(len, web.peers.values())) == [1, 3]
    assert sum(guard.record(path).attempts for path in ("/kept/1.jpg", "/kept/2.jpg")) == 2


def test_an_answer_that_was_not_read_to_its_end_is_no_connection_to_use_again(web):
    guard = Guard(Rules(allow=LOOPBACK))
    with guard.installed():
        with urllib.request.urlopen(urllib.request.Request(tagged(web.url("/kept/5.jpg"), 1))):
            pass
        assert ask(web.url("/kept/6.jpg"), 2) == picture(6)


def ask(url, tag):
    with urllib.request.urlopen(urllib.request.Request(tagged(url, tag))) as answer:
        return answer.read()


# --- more attacks ------------------------------------------------------------------------------------------

def test_a_body_packed_unasked_is_unpacked_and_a_packed_bomb_is_not(web):
    web.files["/packed/gzip/a"], web.files["/packed/deflate/a"] = gzip.compress(picture(4)), zlib.compress(picture(4))
    web.files["/packed/gzip/bomb"] = gzip.compress(bytes(30_000_000))
    web.files["/packed/gzip/rubbish"] = web.files["/packed/br/a"] = b"neither"
    guard = Guard(Rules(allow=LOOPBACK))
    assert fetch(guard, web.url("/packed/gzip/a")) == fetch(guard, web.url("/packed/deflate/a"), 1) == picture(4)
    started = time.monotonic()
    assert failure(web.url("/packed/gzip/bomb"), max_bytes=1_000_000).reason == "too_large"
    assert time.monotonic() - started < 3
    assert failure(web.url("/packed/gzip/rubbish")).reason == failure(web.url("/packed/br/a")).reason == "encoding"


def test_huge_and_many_headers_end_in_a_reason(web):
    assert failure(web.url("/many/1/70000")).reason == "protocol"
    assert failure(web.url("/many/150/10")).reason == "protocol"
    assert failure(web.url("/many/90/60000"), max_bytes=1000).reason == "too_large"


def test_a_name_with_a_private_address_is_refused_even_beside_a_public_one(web, monkeypatch):
    monkeypatch.setattr(guard_module, "_resolve", lambda host, port: [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", web.port)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", web.port))])
    with pytest.raises(Failure) as caught:
        fetch(Guard(Rules()), "http://inside.test/ok/57.jpg")
    assert caught.value.reason == "private_address" and web.hits["/ok/57.jpg"] == 0


def test_a_name_server_that_does_not_answer_costs_the_connect_timeout_once(monkeypatch):
    monkeypatch.setattr(guard_module, "_resolve", lambda host, port: time.sleep(5))
    guard, started = Guard(Rules(connect_timeout=0.3)), time.monotonic()
    for i in range(3):
        with pytest.raises(Failure, match="dns: no answer"):
            fetch(guard, f"http://silent.test/{i}.jpg", i)
    assert time.monotonic() - started < 2


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path):
    files = own_certificate(tmp_path, "127.0.0.1")
    with tls_server(*files) as port:
        caught = failure(f"https://127.0.0.1:{port}/a.jpg")
    assert caught.reason == "certificate" and status_of("certificate") == "refused"


def own_certificate(folder, name):
    """Files of a certificate that is its own issuer, and of its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    made = x509.CertificateBuilder(subject, subject, key.public_key(), 1, now, now + datetime.timedelta(days=1))
    (folder / "cert.pem").write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return folder / "cert.pem", folder / "key.pem"


@contextmanager
def tls_server(certificate, key):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        def greet():
            with contextlib.suppress(OSError):
                context.wrap_socket(listening.accept()[0], server_side=True)

        threading.Thread(target=greet, daemon=True).start()
        yield listening.getsockname()[1]


# --- manners -----------------------------------------------------------------------------------------------

def test_the_user_agent_is_ours_and_says_whom_to_ask(web):
    rules = PoolConfig(urls="a.csv", contact="https://example.org/bot").rules({})
    assert rules.agent == "vlmpipe (+https://example.org/bot)"
    assert fetch(Guard(Rules(allow=LOOPBACK, agent=rules.agent)), web.url("/agent/a")) == rules.agent.encode()


def test_a_reservation_of_rights_is_honoured_unless_told_otherwise(web):
    assert failure(web.url("/reserved/1/a")).reason == "opt_out"
    assert fetch(Guard(Rules(allow=LOOPBACK)), web.url("/reserved/0/a")) == picture(2)
    assert fetch(Guard(Rules(allow=LOOPBACK, opt_out=False)), web.url("/reserved/1/b")) == picture(2)


def test_robots_txt_is_read_once_a_host_and_obeyed(web):
    web.files["/robots.txt"] = b"User-agent: vlmpipe\nDisallow: /ok/8\nCrawl-delay: 2\n\nUser-agent: *\nDisallow: /\n"
    before = web.hits["/robots.txt"]
    guard = Guard(Rules(allow=LOOPBACK, robots_txt=True, agent="vlmpipe (+me@example.org)"))
    assert fetch(guard, web.url("/ok/7.jpg"), 1) == picture(7)
    with pytest.raises(Failure, match="robots_txt"):
        fetch(guard, web.url("/ok/8.jpg"), 2)
    with pytest.raises(Failure, match="robots_txt"):
        fetch(guard, web.url(f"/to/http!127.0.0.1:{web.port}/ok/8.jpg"), 3)
    assert web.hits["/robots.txt"] - before == 1 and guard.robots.delays == {"127.0.0.1": 2.0}
    assert failure(web.url("/ok/7.jpg"), robots_txt=True, agent="another").reason == "robots_txt"
    assert fetch(Guard(Rules(allow=LOOPBACK)), web.url("/ok/8.jpg")) == picture(8)
    del web.files["/robots.txt"]
    assert fetch(Guard(Rules(allow=LOOPBACK, robots_txt=True)), web.url("/ok/8.jpg")) == picture(8)
