"""Object storage: URL lists, a pool's tars and the DVC remote on S3, through an S3 endpoint on loopback."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import Workspace, copy_workspace
from tests.curate.made_pools import jpeg, picture
from vlmpipe import shards
from vlmpipe.__main__ import main

ROOT = Path(__file__).parents[1]
PICTURES = 20
BUCKET = "bucket"
PYTHON = (sys.executable, "-m", "vlmpipe")
SELECT = {"order": ["downloaded", "decoded", "clip"], "clip": {"min": -1.0}}


@dataclass(frozen=True)
class S3:
    """An S3 endpoint; `client` is boto3's."""

    endpoint: str
    client: Any

    def keys(self, prefix: str = "") -> list[str]:
        return [entry["Key"] for entry in self.client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])]

    def put(self, key: str, data: bytes) -> str:
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)
        return f"s3://{BUCKET}/{key}"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    """What a user sets is all that there is: AWS's own variables, AWS_ENDPOINT_URL among them."""
    import boto3
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket=BUCKET)
        yield S3(endpoint, client)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # it remembers the endpoint
    server.stop()


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A workspace by hand: pictures behind a loopback web, a scorer, and configs of the pools `here` and `there`."""
    from tests.models.tiny import make
    from vlmpipe.models.directory import save

    (tmp_path / "pictures").mkdir()
    for number in range(PICTURES):
        (tmp_path / f"pictures/{number}.jpg").write_bytes(jpeg(picture(number)))
    save(*make("dual"), tmp_path / "scorer")
    shards.write_json(tmp_path / "verdict.json", {"passed": True})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_params(**pools: dict) -> None:
    common = {"serve": {"kind": "folder", "path": ".", "hosts": ["images.test=pictures"]}, "samples_per_shard": 8,
              "threads": 4, "deadline": 5.0, "max_wait": 1.0}
    params = {
        "cluster": {"backend": "inline"}, "pool": {name: common | pool for name, pool in pools.items()},
        "curation": {"annotate": {}, "select": SELECT, "pack": {"validation": 0.1, "test": 0.1}},
    }
    Path("params.yaml").write_text(yaml.safe_dump(params))


def url_list() -> bytes:
    rows = [f"http://images.test/{number}.jpg,picture number {number}" for number in range(PICTURES)]
    return "\n".join(["url,caption", *rows, "http://images.test/gone.jpg,a dead link"]).encode()


def download(name: str, urls: str) -> int:
    return main(["download", name, "--urls", urls, "--out", f"pools/{name}", "--state", f"state/{name}"])


def annotate(name: str) -> int:
    return main(["annotate", name, "--pool", f"pools/{name}", "--scorer", "scorer", "--out", f"annotations/{name}"])


def curate(name: str) -> dict[str, bytes]:
    """Everything from the pool to the dataset, with that pool alone; returns the dataset's data."""
    folders = ["--pools", "pools", "--annotations", "annotations"]
    change = yaml.safe_load(Path("params.yaml").read_text())
    change["curation"]["select"]["pools"] = [name]
    Path("params.yaml").write_text(yaml.safe_dump(change))
    assert annotate(name) == 0
    assert main(["select", *folders, "--questions", "none", "--out", "selection"]) == 0
    assert main(["pack", *folders, "--selection", "selection", "--verdict", "verdict.json", "--out", "packed"]) == 0
    return {path.parent.name: columns_but_pool(path) for path in Path("packed").rglob("*.parquet")}


def columns_but_pool(path: Path) -> list[dict]:
    import pyarrow.parquet as pq

    return [{key: value for key, value in row.items() if key != "pool"} for row in pq.read_table(path).to_pylist()]


def said(capfd) -> str:
    """The one line that stands for an error."""
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_lists_are_read_from_object_storage(s3, place):
    address = s3.put("lists/all/part-0.csv", url_list())
    write_params(there={"urls": address}, folder={"urls": f"s3://{BUCKET}/lists/all"})
    Path("here.csv").write_bytes(url_list())
    assert download("there", address) == download("folder", "ignored: the config's address counts") == 0
    rows = [shards.read_rows(Path("pools") / name).drop(["pool"]) for name in ("there", "folder")]
    assert rows[0].equals(rows[1]) and rows[0]["status"].to_pylist().count("downloaded") == PICTURES


def test_a_pool_whose_tars_are_in_object_storage_gives_the_same_dataset(s3, place, capfd):
    Path("list.csv").write_bytes(url_list())
    write_params(here={"urls": "list.csv"}, there={"urls": "list.csv", "store": f"s3://{BUCKET}/pools"})
    assert download("here", "list.csv") == download("there", "list.csv") == 0
    stored = s3.keys("pools/there/")
    assert len(stored) == 3 and not list(Path("pools/there").glob("*.tar"))
    assert curate("there") == curate("here")

    # A second run looks at what is stored and fetches nothing: the web is gone.
    shutil.rmtree("pictures")
    Path("pictures").mkdir()
    shutil.rmtree("state")
    assert download("there", "list.csv") == 0
    assert s3.keys("pools/there/") == stored

    # A damaged object is named, and made again once it is deleted.
    whole = s3.client.get_object(Bucket=BUCKET, Key=stored[1])["Body"].read()
    s3.put(stored[1], whole[:-1] + b"x")
    shutil.rmtree("annotations/there")
    capfd.readouterr()
    assert annotate("there") == 2
    assert f"corrupt shard s3://{BUCKET}/{stored[1]}: its sha256 is" in said(capfd)
    s3.client.delete_object(Bucket=BUCKET, Key=stored[1])
    for number in range(PICTURES):
        Path(f"pictures/{number}.jpg").write_bytes(jpeg(picture(number)))
    assert download("there", "list.csv") == annotate("there") == 0
    assert s3.client.get_object(Bucket=BUCKET, Key=stored[1])["Body"].read() == whole


def test_storage_that_is_not_there_is_said_in_one_line(s3, place, monkeypatch, capfd):
    Path("list.csv").write_bytes(url_list())
    write_params(none={"urls": f"s3://{BUCKET}/none.csv"}, store={"urls": "list.csv", "store": "s3://no-such-bucket/x"})
    assert download("none", f"s3://{BUCKET}/none.csv") == 2
    assert f"found no URL list s3://{BUCKET}/none.csv" in said(capfd)
    assert download("store", "list.csv") == 2
    assert "found no place for s3://no-such-bucket/x/store/00000-" in said(capfd)
    assert not Path("pools/store/manifest.json").exists()
    assert [bucket["Name"] for bucket in s3.client.list_buckets()["Buckets"]] == [BUCKET]

    write_params(store={"urls": "list.csv", "store": f"s3://{BUCKET}/x"})
    assert download("store", "list.csv") == 0  # goes on where the storage failed
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "AWS_ENDPOINT_URL": away, "AWS_MAX_ATTEMPTS": "1"}
        words = ["download", "store", "--urls", "list.csv", "--out", "pools/store", "--state", "state/store"]
        ended = subprocess.run([*PYTHON, *words], env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert f"can't use s3://{BUCKET}/x/store/00000-" in ended.stderr and away in ended.stderr
