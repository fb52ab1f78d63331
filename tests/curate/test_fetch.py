"""The download stage on the real img2dataset, against a faulty web on loopback."""

import csv
import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.curate.web_of_faults import faulty_web, picture
from vlmpipe import shards
from vlmpipe.config import parse
from vlmpipe.curate import ledger
from vlmpipe.curate.fetch import download
from vlmpipe.curate.pool import PoolConfig
from vlmpipe.curate.spool import Spool
from vlmpipe.curate.urls import Columns, read_list
from vlmpipe.dispatch import Cluster
from vlmpipe.errors import UserError

INLINE = Cluster(backend="inline")
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture
def web():
    with faulty_web() as server:
        yield server


def settings(urls, **changes):
    base = {"allow_addresses": ("127.0.0.0/8",), "threads": 8, "deadline": 2.0, "backoff": 0.05, "max_wait": 3.0,
            "samples_per_shard": 10}
    return PoolConfig(urls=str(urls), **{**base, **changes})


def write_list(path, addresses, captions=None):
    captions = captions or [f"caption {i}" for i in range(len(addresses))]
    pq.write_table(pa.table({"url": addresses, "caption": captions}), path)
    return path


def run(tmp_path, urls, **changes):
    download("p", urls, tmp_path / "out", tmp_path / "state", settings(urls, **changes), INLINE)
    return tmp_path / "out"


def rows_by_caption(out):
    return {row["caption"]: row for row in shards.read_rows(out).to_pylist()}


def files_of(out):
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


# --- what becomes of each kind of URL ----------------------------------------------------------------------

FAULTS = {
    "/ok/1.jpg": ("downloaded", None), "/status/404": ("refused", "http_404"), "/status/410": ("refused", "http_410"),
    "/status/500": ("retriable", "http_500"), "/once/429/1/a": ("downloaded", None),
    "/once/503/1/a": ("downloaded", None), "/wait/60/a": ("retriable", "http_429"),
    "/endless/a": ("retriable", "timeout"),
    "/short/a": ("retriable", "truncated"), "/robots/noai": ("refused", "opt_out"),
    "/robots/vlmpipe: noindex": ("refused", "opt_out"), "/robots/other: noai": ("downloaded", None),
    "/large/99999999": ("refused", "too_large"), "/loop/a": ("refused", "redirect"),
    "/page": ("refused", "not_an_image"),
    "/cut.jpg": ("refused", "broken_image"), "/bomb.bmp": ("refused", "decompression_bomb"),
    "/empty": ("refused", "not_an_image"),
}
OTHER = {
    "file:///etc/passwd": ("refused", "scheme"), "http://192.168.7.7/a.jpg": ("refused", "private_address"),
    "": ("refused", "bad_url"), "no url": ("refused", "bad_url"), "http://nobody.invalid/a.jpg": ("retriable", "dns"),
}


@pytest.fixture
def faults(web):
    web.files |= {
        "/page": b"<!DOCTYPE html><html>sorry</html>", "/cut.jpg": picture(1, (300, 200))[:-900], "/empty": b"",
        "/bomb.bmp": picture(1, kind="BMP")[:18] + (60000).to_bytes(4, "little") * 2 + picture(1, kind="BMP")[26:],
    }
    return {**{web.url(path): end for path, end in FAULTS.items()}, **OTHER}


def test_every_url_ends_with_a_status_and_a_reason(tmp_path, web, faults):
    out = run(tmp_path, write_list(tmp_path / "list.parquet", list(faults), list(faults)))
    found = {row["caption"]: (row["status"], row["reason"]) for row in shards.read_rows(out).to_pylist()}
    assert found == faults
    manifest = shards.read_manifest(out, "pool")
    assert manifest["rows"] == len(faults) == sum(manifest[s] for s in ("downloaded", "retriable", "refused"))
    assert web.hits["/status/404"] == 1 and web.hits["/status/500"] == 3 and web.hits["/wait/60/a"] == 1
    first, second = web.times["/once/429/1/a"]
    assert second - first >= 0.99


def test_the_shard_is_in_list_order_and_holds_what_the_contract_says(tmp_path, web):
    addresses = [web.url(f"/ok/{i}.jpg") for i in range(23)] + [web.url("/status/404")]
    table = pa.table({"link": addresses, "alt": [f"a {i}" for i in range(24)], "group": list("ab" * 12)})
    pq.write_table(table, tmp_path / "list.parquet")
    columns = Columns(url="link", caption="alt", extra=("group",))
    out = run(tmp_path, tmp_path / "list.parquet", columns=columns)
    rows = shards.read_rows(out).to_pylist()
    assert [row["url"] for row in rows] == addresses and [row["group"] for row in rows] == list("ab" * 12)
    assert [s["rows"] for s in shards.read_manifest(out)["shards"]] == [10, 10, 4]
    with tarfile.open(out / "00000.tar") as tar:
        names = tar.getnames()
        assert names == [f"{row['uid']}.{kind}" for row in rows[:10] for kind in ("jpg", "txt", "json")]
        assert tar.extractfile(names[1]).read() == b"a 0"
        assert json.load(tar.extractfile(names[2])) == rows[0]
        assert {member.mtime for member in tar} == {0}
    uid, data = next(shards.iter_images(out, "00000"))
    stored = Image.open(io.BytesIO(data))
    assert uid == rows[0]["uid"] and stored.size == (rows[0]["width"], rows[0]["height"]) == (40, 30)
    original = np.asarray(Image.open(io.BytesIO(picture(0))).convert("RGB")).astype(int)
    assert abs(np.asarray(stored).astype(int) - original).mean() < 3
    assert rows[0]["bytes"] == len(picture(0)) and rows[0]["http_status"] == 200


def test_two_runs_give_the_same_bytes_and_keep_clocks_out(tmp_path, web, faults):
    urls = write_list(tmp_path / "list.parquet", [*faults, *(web.url(f"/ok/{i}.jpg") for i in range(10))])
    first = run(tmp_path / "a", urls)
    web.hits.clear()
    second = run(tmp_path / "b", urls, threads=3)
    assert files_of(first) == files_of(second)


def test_large_images_are_made_smaller_and_small_ones_stay(tmp_path, web):
    web.files |= {"/large.png": picture(1, (1000, 500), "PNG"), "/thin.png": picture(2, (2000, 3), "PNG")}
    addresses = [web.url(path) for path in ("/large.png", "/thin.png", "/ok/1.jpg")]
    urls = write_list(tmp_path / "l.parquet", addresses, ["l", "t", "s"])
    rows = rows_by_caption(run(tmp_path, urls, image_size=128))
    names = ("original_width", "original_height", "width", "height")
    sizes = {key: [row[name] for name in names] for key, row in rows.items()}
    assert sizes == {"l": [1000, 500, 128, 64], "t": [2000, 3, 128, 1], "s": [40, 30, 40, 30]}


def test_a_slow_host_stalls_no_other_and_is_given_up(tmp_path, web):
    slow = [web.url(f"/endless/{i}").replace("127.0.0.1", "localhost") for i in range(40)]
    quick = [web.url(f"/ok/{i}.jpg") for i in range(30)]
    out = run(tmp_path, write_list(tmp_path / "l.parquet", [*slow, *quick]), deadline=3.0, samples_per_shard=100)
    rows = shards.read_rows(out).to_pylist()
    assert {row["reason"] for row in rows[:40]} == {"timeout"} and {row["reason"] for row in rows[40:]} == {None}
    first_end = min(web.times[f"/endless/{i}"][0] for i in range(40) if f"/endless/{i}" in web.times) + 3.0
    assert max(web.times[f"/ok/{i}.jpg"][0] for i in range(30)) < first_end  # before any slow one was over
    assert sum(path.startswith("/endless") for path in web.hits) < 40


def test_size_limits_refuse(tmp_path, web):
    web.files |= {"/thin.png": picture(2, (2000, 40), "PNG")}
    urls = write_list(tmp_path / "l.parquet", [web.url("/ok/1.jpg"), web.url("/thin.png"), web.url("/ok/2.jpg")])
    with pytest.raises(UserError, match="too_small 2"):
        run(tmp_path, urls, min_size=35, max_aspect_ratio=3.0)
    assert shards.read_rows(tmp_path / "out")["reason"].to_pylist() == ["too_small", "aspect_ratio", "too_small"]


def test_opt_outs_may_be_ignored_on_purpose(tmp_path, web):
    urls = write_list(tmp_path / "l.parquet", [web.url("/robots/noai")])
    assert shards.read_rows(run(tmp_path, urls, opt_out=False))["status"].to_pylist() == ["downloaded"]


def test_a_decoder_that_dies_costs_its_image_only(tmp_path, web, monkeypatch):
    broken = tmp_path / "lib"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        "import os\nfrom PIL import Image\nplain = Image.open\n"
        "def opened(file, *a, **k):\n"
        "    if b'DIE' in file.getvalue(): os.abort()\n"
        "    return plain(file, *a, **k)\n"
        "Image.open = opened\n")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    web.files["/die.jpg"] = picture(1) + b"DIE"
    addresses = [web.url("/ok/1.jpg"), web.url("/die.jpg"), web.url("/ok/2.jpg")]
    urls = write_list(tmp_path / "l.parquet", addresses)
    out = run(tmp_path, urls, decode_timeout=19.0)  # another timeout, so another decoder than the other tests'
    assert shards.read_rows(out)["reason"].to_pylist() == [None, "decoder_crash", None]


# --- doing it again ----------------------------------------------------------------------------------------

def test_a_rerun_tries_only_the_retriable_rows(tmp_path, web, faults):
    urls = write_list(tmp_path / "list.parquet", [*faults, *(web.url(f"/ok/{i}.jpg") for i in range(10, 25))])
    out = run(tmp_path, urls)
    before, uids = files_of(out), shards.read_rows(out)["uid"].to_pylist()
    manifest = shards.read_manifest(out)
    web.hits.clear()
    web.files["/status/500"] = b""
    run(tmp_path, urls)
    retried = {path.split("?")[0] for path in web.hits}
    assert retried == {path for path, end in FAULTS.items() if end[0] == "retriable"}
    assert shards.read_rows(out)["uid"].to_pylist() == uids
    assert files_of(out) == before and manifest == shards.read_manifest(out)


def test_a_retriable_row_that_now_answers_is_added_and_other_shards_stay(tmp_path, web):
    addresses = [web.url(f"/ok/{i}.jpg") for i in range(10)] + [web.url("/once/503/60/a"), web.url("/ok/99.jpg")]
    urls = write_list(tmp_path / "list.parquet", addresses)
    out = run(tmp_path, urls)
    assert shards.read_manifest(out)["retriable"] == 1
    first = (out / "00000.tar").stat().st_mtime_ns
    asked = web.hits.copy()
    run(tmp_path, urls)
    assert web.hits - asked == {"/once/503/60/a": 1}
    assert set(shards.read_rows(out)["status"].to_pylist()) == {"downloaded"}
    assert (out / "00000.tar").stat().st_mtime_ns == first


def test_a_complete_pool_is_not_asked_for_again_even_without_its_state(tmp_path, web):
    urls = write_list(tmp_path / "list.parquet", [web.url(f"/ok/{i}.jpg") for i in range(12)])
    out = run(tmp_path, urls)
    before = files_of(out)
    web.hits.clear()
    download("p", urls, out, tmp_path / "other-state", settings(urls), INLINE)
    assert not web.hits and files_of(out) == before


def test_a_changed_list_fetches_what_is_new_and_drops_what_is_gone(tmp_path, web):
    addresses = [web.url(f"/ok/{i}.jpg") for i in range(25)]
    out = run(tmp_path, write_list(tmp_path / "a.parquet", addresses, addresses))
    web.hits.clear()
    fewer = [web.url("/ok/100.jpg"), *addresses[5:15]]
    run(tmp_path, write_list(tmp_path / "b.parquet", fewer, fewer))
    assert web.hits == {"/ok/100.jpg": 1}
    assert [row["url"] for row in shards.read_rows(out).to_pylist()] == fewer
    assert sorted(files_of(out)) == ["00000.parquet", "00000.tar", "00001.parquet", "00001.tar", "manifest.json"]
    fresh = tmp_path / "fresh"
    assert files_of(run(fresh, tmp_path / "b.parquet")) == files_of(out)


def test_changed_settings_fetch_again(tmp_path, web):
    urls = write_list(tmp_path / "a.parquet", [web.url(f"/ok/{i}.jpg") for i in range(4)])
    out = run(tmp_path, urls)
    run(tmp_path, urls, image_size=16)
    assert set(web.hits.values()) == {2}
    assert set(shards.read_rows(out)["width"].to_pylist()) == {16}


def test_a_damaged_or_deleted_tar_is_fetched_again(tmp_path, web):
    urls = write_list(tmp_path / "a.parquet", [web.url(f"/ok/{i}.jpg") for i in range(20)])
    out = run(tmp_path, urls)
    before = files_of(out)
    (out / "00001.tar").write_bytes(b"rubbish")
    run(tmp_path, urls)
    assert files_of(out) == before and sum(web.hits.values()) == 30


KILLED = """
import sys
from pathlib import Path
from vlmpipe.curate.fetch import download
from vlmpipe.curate.pool import PoolConfig
from vlmpipe.dispatch import Cluster
urls, root, backend = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
if __name__ == "__main__":
    config = PoolConfig(urls=str(urls), allow_addresses=("127.0.0.0/8",), threads=4, samples_per_shard=40)
    download("p", urls, root / "out", root / "state", config, Cluster(backend=backend, tasks=2))
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["inline", "processes"])
def test_a_killed_download_fetches_no_image_twice(tmp_path, web, backend):
    addresses = [web.url(f"/ok/{i}.jpg") for i in range(120)]
    urls = write_list(tmp_path / "list.parquet", addresses)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    web.pause = 0.25  # slow enough that a busy machine still finds it midway
    process = subprocess.Popen([sys.executable, script, urls, tmp_path, backend], env=environment)
    wait_until(lambda: len(web.hits) >= 60)
    wait_until(lambda: sum(path.stat().st_size for path in (tmp_path / "state" / "spool").glob("*")) > 5000)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)  # workers of the killed process notice and end
    assert not (tmp_path / "out" / shards.MANIFEST).exists()
    kept = finished_uids(tmp_path)
    assert kept
    web.pause = 0.0
    asked = dict(web.hits)
    download("p", urls, tmp_path / "out", tmp_path / "state", settings(urls, samples_per_shard=40), INLINE)
    rows = shards.read_rows(tmp_path / "out").to_pylist()
    assert [row["url"] for row in rows] == addresses and {row["status"] for row in rows} == {"downloaded"}
    again = {row["uid"] for row in rows if web.hits[path_of(row)] > asked.get(path_of(row), 0)}
    assert again == {row["uid"] for row in rows} - kept
    whole = run(tmp_path / "whole", urls, samples_per_shard=40)
    assert files_of(tmp_path / "out") == files_of(whole)


def path_of(row):
    return "/ok/" + row["url"].rpartition("/")[2]


def wait_until(true, seconds=180):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def finished_uids(root):
    uids = set()
    for path in (root / "state" / "spool").glob("*.spool"):
        with Spool(path) as spool:
            uids |= set(spool.uids())
    for path in (root / "state" / "done").glob("*.json"):
        uids |= set(pq.read_table(root / "out" / f"{path.stem}.parquet")["uid"].to_pylist())
    return uids


def test_a_spool_cut_anywhere_keeps_its_whole_records(tmp_path):
    path = tmp_path / "a.spool"
    with Spool(path) as spool:
        for i in range(3):
            spool.append({"uid": f"u{i}"}, bytes([i]) * 50)
    whole = path.read_bytes()
    record = len(whole) // 3
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with Spool(path) as spool:
            assert spool.uids() == [f"u{i}" for i in range(cut // record)]
            spool.append({"uid": "new"}, b"image")
        with Spool(path) as spool:
            assert spool.image("new") == b"image"


def test_a_full_disk_stops_the_stage_and_keeps_what_was_finished(tmp_path, web, monkeypatch):
    urls = write_list(tmp_path / "a.parquet", [web.url(f"/ok/{i}.jpg") for i in range(20)])
    append = Spool.append

    def until_full(self, facts, image=None):
        if len(self.uids()) >= 5:
            raise OSError(28, "No space left on device")
        append(self, facts, image)

    monkeypatch.setattr(Spool, "append", until_full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, urls, samples_per_shard=20, threads=2)
    assert sum(web.hits.values()) < 20
    monkeypatch.undo()
    out = run(tmp_path, urls, samples_per_shard=20, threads=2)
    assert shards.read_manifest(out)["downloaded"] == 20


def test_one_download_of_a_pool_at_a_time(tmp_path, web):
    import fcntl

    (tmp_path / "state").mkdir()
    with open(tmp_path / "state" / "lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another download of pool 'p'"):
            run(tmp_path, write_list(tmp_path / "a.parquet", [web.url("/ok/1.jpg")]))


# --- pools that fail ---------------------------------------------------------------------------------------

def test_a_pool_of_dead_urls_ends_by_itself_and_leaves_its_evidence(tmp_path):
    addresses = [f"http://host{i % 700}.invalid/{i}.jpg" for i in range(2000)]
    urls = write_list(tmp_path / "a.parquet", addresses)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"no image behind any of its 2000 URLs \(.*dns"):
        run(tmp_path, urls, samples_per_shard=500, threads=32, offline_after=50)
    assert time.monotonic() - started < 30
    assert set(shards.read_rows(tmp_path / "out")["status"].to_pylist()) == {"retriable"}
    lines = [line for path in (tmp_path / "state" / "ledger").iterdir() for line in ledger.read(path)]
    assert len(lines) == 2000 and {line["status"] for line in lines} == {"retriable"}


@pytest.mark.slow
def test_ten_thousand_real_addresses_offline(tmp_path):
    urls = SHARED / "url-lists" / "laion_like_10000.parquet"
    if not urls.exists():
        pytest.skip("no ../shared/data with the list of real web addresses")
    started = time.monotonic()
    with pytest.raises(UserError, match="no image behind any of its 10000 URLs"):
        run(tmp_path, urls, columns=Columns(url="URL", caption="TEXT"), samples_per_shard=2000, threads=64)
    assert time.monotonic() - started < 180
    assert shards.read_manifest(tmp_path / "out")["rows"] == 10_000


# --- lists -------------------------------------------------------------------------------------------------

ROWS = [{"url": "http://a.test/1", "caption": 'one, "two"'}, {"url": "http://a.test/2", "caption": "ä\nb"}]


def list_file(kind, folder):
    path = folder / f"list{kind}"
    opened = gzip.open if kind.endswith(".gz") else open
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif "jsonl" in kind:
        with opened(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in ROWS)
    else:
        with opened(path, "wt", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["url", "caption"], delimiter="\t" if "tsv" in kind else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    return path


@pytest.mark.parametrize("kind", [".parquet", ".csv", ".tsv", ".jsonl", ".csv.gz", ".tsv.gz", ".jsonl.gz"])
def test_every_kind_of_list_gives_the_same_rows_and_uids(tmp_path, kind):
    rows = list(read_list(list_file(kind, tmp_path), Columns()))
    assert [{k: row[k] for k in ("url", "caption")} for row in rows] == ROWS
    pairs = [f"{row['url']}\0{row['caption']}\0{0}" for row in ROWS]
    assert [row["uid"] for row in rows] == [hashlib.sha256(pair.encode()).hexdigest()[:32] for pair in pairs]


def test_directories_and_other_filesystems(tmp_path):
    import fsspec

    for kind in (".csv", ".jsonl"):
        list_file(kind, tmp_path)
    assert len(list(read_list(tmp_path, Columns()))) == 4
    with fsspec.open("memory://lists/a.csv", "w") as file:
        file.write("url,caption\nhttp://a.test/1,one\n")
    assert [row["caption"] for row in read_list("memory://lists/a.csv", Columns())] == ["one"]


def test_the_same_pair_twice_gets_two_uids(tmp_path):
    path = write_list(tmp_path / "a.parquet", ["http://a.test/1"] * 3, ["x", "x", "y"])
    assert len({row["uid"] for row in read_list(path, Columns())}) == 3


def test_own_uids(tmp_path):
    def rows(uids):
        table = pa.table({"url": ["a"] * len(uids), "caption": ["b"] * len(uids), "id": uids})
        pq.write_table(table, tmp_path / "a.parquet")
        return [row["uid"] for row in read_list(tmp_path / "a.parquet", Columns(uid="id"))]

    assert rows([7, 8]) == ["7", "8"]
    for bad in (["a", "a"], ["a/b"], ["a.b"], [None]):
        with pytest.raises(UserError, match="expected"):
            rows(bad)


def test_columns_that_change_their_type_between_shards(tmp_path, web):
    path = tmp_path / "a.jsonl"
    values = [None] * 10 + [1] * 10 + [2.5] * 2
    path.write_text("".join(json.dumps({"url": web.url(f"/ok/{i}.jpg"), "caption": "c", "n": n}) + "\n"
                            for i, n in enumerate(values)))
    out = run(tmp_path, path, columns=Columns(extra=("n",)))
    assert shards.read_rows(out)["n"].to_pylist() == values


@pytest.mark.parametrize("text, config, message", [
    ("URL,ALT\na,b\n", {}, "found columns URL, ALT; expected 'url'; did you mean"),
    ("url,caption\n", {}, "found no rows"),
    ("url,caption\na,b\n", {"columns": Columns(extra=("lang",))}, "expected 'lang'"),
    ("", {}, "found columns"),
])
def test_unusable_lists_fail_in_one_line(tmp_path, text, config, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        run(tmp_path, tmp_path / "a.csv", **config)
    assert "\n" not in str(caught.value)


def test_missing_and_damaged_lists(tmp_path):
    with pytest.raises(UserError, match="found no URL list"):
        run(tmp_path, tmp_path / "none.parquet")
    for name in ("a.parquet", "a.jsonl", "a.csv.gz"):
        (tmp_path / name).write_bytes(b"\x1f\x8brubbish")
        with pytest.raises(UserError, match="found damaged"):
            run(tmp_path, tmp_path / name)


def test_config_values_are_checked():
    given = {"urls": "a.csv", "columns": {"extra": ["x"]}, "serve": {"kind": "folder", "path": "d"}}
    config = parse(PoolConfig, given, "pool.a")
    assert config.columns.extra == ("x",) and config.serve.kind == "folder"
    for bad in ({"allow_addresses": ["loopback"]}, {"threads": 0}, {"jpeg_quality": 101}, {"colums": {}},
                {"columns": {"extra": ["status"]}}):
        with pytest.raises(UserError, match=r"pool\.a"):
            parse(PoolConfig, {"urls": "a.csv", **bad}, "pool.a")


def test_tars_may_live_in_a_store(tmp_path, web):
    addresses = [web.url(f"/ok/{i}.jpg") for i in range(12)] + [web.url("/once/503/60/a")]
    urls = write_list(tmp_path / "a.parquet", addresses)
    out = run(tmp_path, urls, store=f"file://{tmp_path}/store")
    assert not list(out.glob("*.tar"))
    assert len(list(shards.iter_images(out, "00000"))) == 10
    asked = web.hits.copy()
    run(tmp_path, urls, store=f"file://{tmp_path}/store")
    assert web.hits - asked == {"/once/503/60/a": 1}
    assert len(list(shards.iter_images(out, "00001"))) == 3
