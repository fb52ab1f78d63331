"""What a download cost, URL by URL, and which of them a later run asks for again."""

import subprocess
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.curate.web_of_faults import faulty_web, picture
from vlmpipe import shards
from vlmpipe.curate import ledger
from vlmpipe.curate.fetch import download
from vlmpipe.curate.hosts import Record
from vlmpipe.curate.pool import PoolConfig
from vlmpipe.curate.refresh import refresh
from vlmpipe.dispatch import Cluster
from vlmpipe.errors import UserError

PATHS = ("/ok/1.jpg", "/status/404", "/status/500", "/once/503/60/a", "/to/http!{}/ok/2.jpg")


@pytest.fixture
def pool(tmp_path):
    """(web, root, run): a pool `p` of five rows, downloaded once; two of them are retriable."""
    with faulty_web() as web:
        paths = [path.format(f"127.0.0.1:{web.port}") for path in PATHS]
        urls = tmp_path / "list.parquet"
        pq.write_table(pa.table({"url": [web.url(path) for path in paths], "caption": list(PATHS)}), urls)
        config = PoolConfig(urls=str(urls), allow_addresses=("127.0.0.0/8",), threads=4, backoff=0.01, max_wait=1.0)

        def run():
            state, out = tmp_path / "state" / "download" / "p", tmp_path / "pools" / "p"
            download("p", urls, out, state, config, Cluster(backend="inline"))

        run()
        yield web, tmp_path, run


def lines(root):
    found = (ledger.read(path) for path in sorted((root / "state" / "download" / "p" / "ledger").iterdir()))
    return {line["url"].partition("/")[2][1:].partition("/")[2]: line for part in found for line in part}


def as_dvc(monkeypatch, run):
    """Let `run` stand in for the one stage that refresh has DVC run."""
    asked = []

    def instead(command, **_):
        asked.append(command[-3:])
        run()
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", instead)
    return asked


def test_every_url_has_its_outcome_cost_and_final_address(pool):
    web, root, _ = pool
    found = lines(root)
    assert len(found) == 5
    one = found["ok/1.jpg"]
    assert (one["status"], one["attempts"], one["bytes"], one["runs"]) == ("downloaded", 1, len(picture(1)), 1)
    assert one["sha256"] == shards.read_rows(root / "pools" / "p")["sha256"][0].as_py() and 0 < one["seconds"] < 10
    assert one["final_url"] == web.url("/ok/1.jpg") and one["host"] == "127.0.0.1" and one["next_attempt"] is None
    assert found["status/500"]["attempts"] == 3 and found["status/404"]["attempts"] == 1
    moved = next(line for line in found.values() if "/to/" in line["url"])
    assert moved["final_url"] == web.url("/ok/2.jpg") and moved["status"] == "downloaded"
    waiting = found["status/500"]
    assert waiting["next_attempt"] - waiting["tried_at"] == ledger.FIRST_WAIT_S


def test_the_summary_adds_up_by_outcome_and_by_host(pool, capsys):
    web, root, _ = pool
    found = ledger.summary(root / "state" / "download" / "p")
    assert found["rows"] == 5 == sum(row["rows"] for row in found["outcomes"]) and found["retriable"] == 2
    assert found["due"] == 0 and found["next_attempt"] is not None
    (host,) = found["hosts"]
    assert (host["downloaded"], host["retriable"], host["refused"], host["rows"]) == (2, 2, 1, 5)
    assert host["attempts"] == found["attempts"] == sum(web.hits.values()) - 1  # the redirect is one attempt
    ledger.show("p", found, 20)
    said = capsys.readouterr().out
    assert "http_404" in said and "127.0.0.1" in said and "0 of 2 retriable rows are due" in said
    with pytest.raises(UserError, match="found no ledger"):
        ledger.summary(root)


def test_refresh_asks_for_what_is_due_only_and_waits_longer_each_time(pool, monkeypatch, capsys):
    web, root, run = pool
    asked = as_dvc(monkeypatch, run)
    before = web.hits.copy()
    assert refresh("p", root) == 0 and not asked  # nothing is due within the hour
    assert "nothing to do" in capsys.readouterr().out
    make_due(root, "status/500")
    refresh("p", root)
    assert asked == [["--single-item", "--force", "download@p"]]
    assert {path for path, count in (web.hits - before).items() if count} == {"/status/500"}
    line = lines(root)["status/500"]
    assert (line["runs"], line["attempts"]) == (2, 6)
    assert line["next_attempt"] - line["tried_at"] == 2 * ledger.FIRST_WAIT_S
    assert lines(root)["once/503/60/a"]["runs"] == 1
    assert "0 of 2 retriable rows are due; 2 wait" in capsys.readouterr().out


def test_refresh_of_all_settles_what_answers_now_and_leaves_the_refused_alone(pool, monkeypatch, capsys):
    web, root, run = pool
    as_dvc(monkeypatch, run)
    before = web.hits.copy()
    refresh("p", root, all_rows=True)
    assert set(web.hits - before) == {"/status/500", "/once/503/60/a"}
    assert "1 of 2 rows are settled now" in capsys.readouterr().out
    statuses = shards.read_rows(root / "pools" / "p")["status"].to_pylist()
    assert statuses == ["downloaded", "refused", "retriable", "downloaded", "downloaded"]
    assert not (root / "state" / "download" / "p" / "refresh.json").exists()


def test_a_refresh_that_changes_nothing_leaves_every_byte(pool, monkeypatch):
    _, root, run = pool
    as_dvc(monkeypatch, run)
    out = root / "pools" / "p"
    make_due(root, "status/500")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    refresh("p", root)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_what_a_killed_run_spent_is_not_forgotten(pool):
    _, root, _ = pool
    state = root / "state" / "download" / "p"
    task = types.SimpleNamespace(state=state, name="00009")
    spooled = {"status": "downloaded", "cost": ledger.cost(Record(attempts=2, spent=1.5, final_url="http://b/"), 99.0)}
    ledger.write(task, ["u"], ["http://a/"], [spooled], {})
    ledger.write(task, ["u"], ["http://a/"], [{"status": "downloaded"}], {})  # a run that reuses the row
    (line,) = ledger.read(ledger.folder(state) / "00009.parquet")
    assert (line["attempts"], line["seconds"], line["runs"], line["tried_at"]) == (2, 1.5, 1, 99.0)
    assert line["final_url"] == "http://b/" and line["next_attempt"] is None


def test_waits_double_up_to_a_month():
    assert [ledger.wait(runs) / 3600 for runs in (1, 2, 3, 5)] == [1, 2, 4, 16]
    assert ledger.wait(10_000) == ledger.LONGEST_WAIT_S


def make_due(root, which):
    """Set the clock back for one row."""
    (path,) = (root / "state" / "download" / "p" / "ledger").iterdir()
    found = ledger.read(path)
    for line in found:
        if line["url"].endswith(which):
            line["next_attempt"] = 1.0
    shards.write_table(path, pa.Table.from_pylist(found, ledger.SCHEMA))
