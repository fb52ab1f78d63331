"""Object storage: URL lists, a pool's tars and the DVC remote on S3, through an S3 endpoint on loopback."""

import io
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import split
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from tests.by_hand import (
    ANNOTATE,
    DOWNLOAD,
    PACK,
    PICTURES,
    POOL,
    SELECT,
    Said,
    call,
    change,
    contents,
    lay_out,
    refused,
    typed,
    url_list,
)
from tests.conftest import Workspace, copy_workspace
from vlmpipe import shards
from vlmpipe.errors import UserError
from vlmpipe.publish import Registry

BUCKET = "bucket"


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
def s3(tmp_path_factory) -> Iterator[S3]:
    """What a user sets is all that there is: AWS's own variables, AWS_ENDPOINT_URL among them."""
    import boto3
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    nothing = tmp_path_factory.mktemp("aws") / "empty"
    nothing.touch()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": str(nothing),
            "AWS_SHARED_CREDENTIALS_FILE": str(nothing),
        }.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket=BUCKET)
        yield S3(endpoint, client)
    fsspec.get_filesystem_class("s3").clear_instance_cache()  # it remembers the endpoint
    server.stop()


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    lay_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def add_pool(name: str, **settings: object) -> list[str]:
    """Configure another pool; returns the command that downloads it."""
    change(f"pool.{name}", POOL | settings)
    urls = str(settings.get("urls", "list.csv"))
    return ["download", name, "--urls", urls, "--out", f"data/pools/{name}", "--state", f"data/state/download/{name}"]


def annotate(name: str) -> list[str]:
    return split(f"annotate {name} --pool data/pools/{name} --scorer data/scorer --out data/annotations/{name}")


# --- lists and pools ---------------------------------------------------------------------------------------

def test_lists_are_read_from_object_storage(s3, place, capfd):
    address = s3.put("lists/all/part-0.csv", url_list())
    commands = [DOWNLOAD, add_pool("file", urls=address), add_pool("folder", urls=f"s3://{BUCKET}/lists/all")]
    assert [call(capfd, *command).status for command in commands] == [0, 0, 0]
    local, *remote = (shards.read_rows(Path("data/pools") / name).drop(["pool"]) for name in ("p", "file", "folder"))
    assert all(rows.equals(local) for rows in remote) and local["status"].to_pylist().count("downloaded") == PICTURES


def test_a_pool_whose_tars_are_in_object_storage_gives_the_same_dataset(s3, place, capfd):
    command = add_pool("q", store=f"s3://{BUCKET}/pools")
    for words in (DOWNLOAD, ANNOTATE, command, annotate("q")):
        assert call(capfd, *words).status == 0
    stored = s3.keys("pools/q/")
    assert len(stored) == 3 and not list(Path("data/pools/q").glob("*.tar"))
    assert dataset(capfd, "q") == dataset(capfd, "p")

    # A second run looks for what is stored and fetches nothing: the web is gone.
    Path("pictures").rename("elsewhere")
    Path("pictures").mkdir()
    shutil.rmtree("data/state")
    assert call(capfd, *command).status == 0 and s3.keys("pools/q/") == stored

    # A damaged object is named, and made again once it is deleted.
    whole = s3.client.get_object(Bucket=BUCKET, Key=stored[1])["Body"].read()
    s3.put(stored[1], whole[:-1] + b"x")
    shutil.rmtree("data/annotations/q")
    refused(call(capfd, *annotate("q")), f"corrupt shard s3://{BUCKET}/{stored[1]}: its sha256 is", "delete the file")
    s3.client.delete_object(Bucket=BUCKET, Key=stored[1])
    Path("pictures").rmdir()
    Path("elsewhere").rename("pictures")
    assert call(capfd, *command).status == call(capfd, *annotate("q")).status == 0
    assert s3.client.get_object(Bucket=BUCKET, Key=stored[1])["Body"].read() == whole


def dataset(capfd, pool: str) -> dict[str, list[dict]]:
    """The rows of each split when that pool alone is selected from, without its name."""
    change("curation.select.pools", [pool])
    assert call(capfd, *SELECT).status == call(capfd, *PACK).status == 0
    tables = {path.parent.name: pq.read_table(path).drop(["pool"]) for path in Path("data/packed").rglob("*.parquet")}
    return {split: table.to_pylist() for split, table in tables.items()}


def test_storage_that_is_not_there_is_said_in_one_line(s3, place, capfd):
    said = call(capfd, *add_pool("none", urls=f"s3://{BUCKET}/none.csv"))
    refused(said, f"found no URL list s3://{BUCKET}/none.csv")

    said = call(capfd, *add_pool("q", store="s3://no-such-bucket/x"))
    refused(said, "found no place for s3://no-such-bucket/x/q/0000", "expected a bucket or folder that exists")
    assert not Path("data/pools/q/manifest.json").exists()
    assert [bucket["Name"] for bucket in s3.client.list_buckets()["Buckets"]] == [BUCKET]

    command = add_pool("q", store=f"s3://{BUCKET}/x")
    assert call(capfd, *command).status == 0  # goes on where the storage failed
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        away = "http://{}:{}".format(*nobody.getsockname())
        said = typed(*command, AWS_ENDPOINT_URL=away, AWS_MAX_ATTEMPTS="1")
    refused(said, f"can't use s3://{BUCKET}/x/q/00000-", away, "check address, credentials and endpoint")


# --- DVC ---------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_data_is_pushed_to_s3_and_comes_back_in_a_fresh_clone(s3, tiny, tmp_path, monkeypatch):
    workspace = copy_workspace(tiny, tmp_path / "workspace")
    monkeypatch.delenv("AWS_ENDPOINT_URL")  # the remote's own setting is enough
    workspace.done("dvc", "remote", "add", "--default", "store", f"s3://{BUCKET}/dvc")
    workspace.done("dvc", "remote", "modify", "store", "endpointurl", s3.endpoint)
    workspace.done("git", "commit", "-qam", "data goes to S3")
    params = yaml.safe_load((workspace.root / "params.yaml").read_text())
    said = Registry(workspace.root, params).push()
    pushed = len(s3.keys("dvc/files/md5"))
    assert said == f"dvc: {pushed} file(s) pushed to remote 'store'" and pushed > 20
    assert "Everything is up to date" in workspace.done("dvc", "push")

    clone = fresh_clone(workspace, tmp_path / "clone")
    clone.done("dvc", "pull")
    lock = yaml.safe_load((clone.root / "dvc.lock").read_text())["stages"]
    outs = [out["path"] for stage in lock.values() for out in stage["outs"]]
    assert len(outs) > 12
    for out in outs:
        assert files(clone.root / out) == files(workspace.root / out), out
    assert "up to date" in clone.done("dvc", "status")

    # The champion's files alone, where nothing has been pulled.
    other = fresh_clone(workspace, tmp_path / "other")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    assert other.done("python", "-m", "vlmpipe", "caption", str(tmp_path / "red.png")).strip()
    assert not (other.root / "data/tiny").exists()

    # A remote that does not answer.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    third = fresh_clone(workspace, tmp_path / "third")
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        away = "http://{}:{}".format(*nobody.getsockname())
        for place in (workspace, third):
            place.done("dvc", "remote", "modify", "--local", "store", "endpointurl", away)
        (workspace.root / ".dvc/tmp").rename(tmp_path / "known")  # what DVC remembers of the remote
        with pytest.raises(UserError, match=f"dvc push failed: .*{away}.*expected a reachable remote"):
            Registry(workspace.root, params).push()
        said = third.run("python", "-m", "vlmpipe", "caption", str(tmp_path / "red.png"))
    refused(Said(said.returncode, said.stderr), "come from neither the DVC cache nor the remote", away)


def fresh_clone(workspace: Workspace, root: Path) -> Workspace:
    workspace.done("git", "clone", "-q", str(workspace.root), str(root))
    return Workspace(root)


def files(path: Path) -> dict[str, bytes]:
    return contents(path) if path.is_dir() else {"": path.read_bytes()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_dvc_follows_a_list_on_s3(s3, tiny, tmp_path, monkeypatch):
    workspace = copy_workspace(tiny, tmp_path / "workspace")
    rows = pq.read_table(workspace.root / "data/tiny/world/scenes/pools/scenes.parquet")
    pool = read_pool(workspace)
    address = s3.put("lists/scenes.parquet", parquet(rows))
    workspace.done("python", "-m", "vlmpipe", "compose", "--profile", "tiny", "--set", f"pool.scenes.urls={address}")
    workspace.done("dvc", "repro", "download@scenes")
    assert read_pool(workspace) == pool
    assert "didn't change, skipping" in workspace.done("dvc", "repro", "download@scenes")
    s3.put("lists/scenes.parquet", parquet(rows.slice(0, 100)))
    workspace.done("dvc", "repro", "download@scenes")
    assert read_pool(workspace) == pool[:100]


def read_pool(workspace: Workspace) -> list[dict]:
    return shards.read_rows(workspace.root / "data/tiny/pools/scenes", ["uid", "status", "reason"]).to_pylist()


def parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()
