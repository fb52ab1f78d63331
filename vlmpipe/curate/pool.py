"""A pool of image-text pairs: how it is configured, the columns of its shards, and a shard on its way."""

import hashlib
import ipaddress
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

import pyarrow as pa

from vlmpipe import shards
from vlmpipe.curate.hosts import Limits, Rules
from vlmpipe.curate.pixels import ResizeMode, Wanted
from vlmpipe.curate.sources.flavours import Columns
from vlmpipe.curate.sources.source import Source
from vlmpipe.errors import UserError
from vlmpipe.images import MAX_PIXELS

KIND = "pool"
FACTS = {
    "status": pa.string(), "reason": pa.string(), "detail": pa.string(), "http_status": pa.int32(),
    "bytes": pa.int64(), "sha256": pa.string(), "original_width": pa.int32(), "original_height": pa.int32(),
    "width": pa.int32(), "height": pa.int32(), "pool": pa.string(),
}


@dataclass(frozen=True)
class Serve:
    """Serve the pool's images from loopback while it downloads: the embedded world, or a folder of files."""

    kind: Literal["scenes", "folder"]
    path: str
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True)
class PoolConfig(Limits):
    """One pool of image-text pairs. Sizes are pixels and bytes, times are seconds.

    `urls`: a parquet, csv, tsv or jsonl file, a directory of them, or an fsspec URL; or where another `source` lies.
    `columns`: what they are called; recognised where they are not given. `allow_addresses`: networks in CIDR form
    beside the public ones. `resize_mode` as in img2dataset; nothing is enlarged. `min_size` is of the shorter side.
    `reduced_decode`: large jpegs are decoded at a half, quarter or eighth of their size, which takes half the time
    and changes a stored picture as much as its own compression does. `opt_out` honours X-Robots-Tag and
    TDM-Reservation; `user_agent` is the name they may address, sent with `contact` (a page or a mail address) as
    the User-Agent. `store`: an fsspec URL for the tars. What the network may cost stands in `Limits`.
    """

    urls: str
    source: Source = field(default_factory=Source)
    columns: Columns = field(default_factory=Columns)
    serve: Serve | None = None
    allow_addresses: tuple[str, ...] = ()
    samples_per_shard: int = 1000
    image_size: int = 384
    resize_mode: ResizeMode = "keep_ratio_largest"
    jpeg_quality: int = 95
    min_size: int = 0
    max_aspect_ratio: float | None = None
    max_pixels: int = MAX_PIXELS
    reduced_decode: bool = True
    decode_timeout: float = 20.0
    threads: int = 64
    opt_out: bool = True
    user_agent: str = "vlmpipe"
    contact: str | None = None
    store: str | None = None

    def __post_init__(self) -> None:
        positive = (
            "samples_per_shard", "image_size", "jpeg_quality", "max_pixels", "max_bytes", "connect_timeout",
            "deadline", "decode_timeout", "threads", "attempts",
        )
        for name in ("host_connections", "host_rate", "redirects", "backoff", "max_wait", "offline_after"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: found {getattr(self, name)}; expected 0 or more")
        agent = f"{self.user_agent}{self.contact or ''}"
        if not self.user_agent.strip() or not agent.isascii() or not agent.isprintable():
            raise UserError(f"user_agent, contact: found {agent!r}; expected a name, in plain ASCII")
        for name in positive:
            if getattr(self, name) <= 0:
                raise UserError(f"{name}: found {getattr(self, name)}; expected more than 0")
        if self.jpeg_quality > 100:
            raise UserError(f"jpeg_quality: found {self.jpeg_quality}; expected 1 to 100")
        if self.serve and self.source.kind not in ("list", "documents"):
            raise UserError(f"found serve with source.kind {self.source.kind}; expected it with URLs only; drop serve")
        for network in self.allow_addresses:
            try:
                ipaddress.ip_network(network, strict=False)
            except ValueError:
                raise UserError(f"allow_addresses: found '{network}'; expected CIDR such as 127.0.0.0/8") from None

    def rules(self, hosts: Mapping[str, tuple[str, int]]) -> Rules:
        limits = {limit.name: getattr(self, limit.name) for limit in fields(Limits)}
        agent = f"{self.user_agent} (+{self.contact})" if self.contact else self.user_agent
        return Rules(hosts=dict(hosts), allow=self.allow_addresses, agent=agent, opt_out=self.opt_out, **limits)

    @property
    def wanted(self) -> Wanted:
        """What of this the decoders need to know."""
        return Wanted(self.image_size, self.resize_mode, self.jpeg_quality, self.min_size, self.max_aspect_ratio,
                      self.max_pixels, self.reduced_decode)

    def settings(self, source: str) -> str:
        """A hash of all that decides what a URL becomes: a row is reused only under the same settings."""
        kept = ("allow_addresses", "image_size", "resize_mode", "jpeg_quality", "min_size", "max_aspect_ratio",
                "max_pixels", "max_bytes", "redirects", "opt_out", "user_agent", "reduced_decode", "robots_txt")
        facts = {name: getattr(self, name) for name in kept}
        if self.serve:  # the same addresses may mean other pictures: those of another world
            facts["serve"] = [asdict(self.serve), shards.sha256_file(source) if os.path.isfile(source) else source]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ShardTask:
    """One shard to download; travels to whatever process does it. `root`: where its rows' places lie."""

    name: str
    pool: str
    rows: int
    fingerprint: str
    settings: str
    out: Path
    state: Path
    config: PoolConfig
    root: str

    @property
    def list_file(self) -> Path:
        return self.state / "list" / f"{self.name}.parquet"

    @property
    def spool_file(self) -> Path:
        return self.state / "spool" / f"{self.settings}-{self.name}-{self.fingerprint}.spool"

    @property
    def done_file(self) -> Path:
        return self.state / "done" / f"{self.name}.json"
