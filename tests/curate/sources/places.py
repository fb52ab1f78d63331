"""Shared by the tests of sources: pictures as files, and a download of what lies somewhere else than behind a URL."""

import io

from tests.curate.made_pools import picture
from vlmpipe import shards
from vlmpipe.config import parse
from vlmpipe.curate.fetch import download
from vlmpipe.curate.pool import PoolConfig
from vlmpipe.dispatch import Cluster

INLINE = Cluster(backend="inline")


def encoded(seed, kind="JPEG", size=(40, 30)):
    """A picture of its own for each seed, as the bytes of a file."""
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, kind)
    return buffer.getvalue()


def fill(folder, files):
    """Write {name: bytes, text, or the seed of a picture} below `folder`."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            content = encoded(content, "PNG" if name.endswith(".png") else "JPEG")
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def run(tmp_path, urls, cluster=INLINE, **changes):
    """Download the pool `p` of a config; returns its shard directory."""
    config = parse(PoolConfig, {"urls": str(urls), "samples_per_shard": 4, **changes}, "pool.p")
    download("p", urls, tmp_path / "out", tmp_path / "state", config, cluster)
    return tmp_path / "out"


def rows_of(out):
    return shards.read_rows(out).to_pylist()


def ends(out):
    """{url: caption, or the reason why there is no picture}."""
    return {row["url"]: row["caption"] if row["status"] == "downloaded" else row["reason"] for row in rows_of(out)}


def files_of(out):
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}
