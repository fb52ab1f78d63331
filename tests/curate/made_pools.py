"""Small pools made by hand, shared by the curation tests: shard directories as `download` writes them."""

import hashlib
import io
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from vlmpipe import shards
from vlmpipe.curate import annotate as annotation
from vlmpipe.curate.columns import Rows
from vlmpipe.curate.duplicates import THUMBNAIL, Looks, look
from vlmpipe.curate.evaluation import EvaluationImages
from vlmpipe.dispatch import Cluster

PALETTE = ("red", "green", "blue", "orange", "purple", "black")
COLUMNS = {
    "uid": pa.string(), "url": pa.string(), "caption": pa.string(), "status": pa.string(), "reason": pa.string(),
    "detail": pa.string(), "http_status": pa.int32(), "bytes": pa.int64(), "sha256": pa.string(),
    "original_width": pa.int32(), "original_height": pa.int32(), "width": pa.int32(), "height": pa.int32(),
    "pool": pa.string(),
}


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A picture of its own for each seed: a few random shapes."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(int(v) for v in rng.integers(150, 256, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rng.integers(0, size[0] - 10), rng.integers(0, size[1] - 10)
        w, h = rng.integers(6, size[0] // 2), rng.integers(6, size[1] // 2)
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape([int(x), int(y), int(x + w), int(y + h)], fill=PALETTE[rng.integers(len(PALETTE))])
    return image


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def row(uid: str, data: bytes | None = None, caption: str = "a photo of some shapes", **changes) -> dict:
    """One row of a pool: downloaded when it has data, else refused as a 404."""
    values = dict.fromkeys(COLUMNS) | {"uid": uid, "url": f"http://images.test/{uid}.jpg", "caption": caption}
    if data is None:
        values |= {"status": "refused", "reason": "http_404", "http_status": 404}
    else:
        values |= {"status": "downloaded", "http_status": 200, "bytes": len(data), "data": data}
        values |= {"sha256": hashlib.sha256(data).hexdigest(), "original_width": 64, "original_height": 64}
        values |= {"width": 64, "height": 64}
    return values | changes


def write_pool(directory: Path, *shard_rows: list[dict], extra: dict[str, pa.DataType] | None = None) -> Path:
    """A pool with one shard for each list of rows; `extra` names further columns."""
    entries = []
    columns = COLUMNS | (extra or {})
    for number, rows in enumerate(shard_rows):
        rows = [r | {"pool": directory.name} for r in rows]
        arrays = {key: pa.array([r.get(key) for r in rows], kind) for key, kind in columns.items()}
        members = [(f"{r['uid']}.jpg", r["data"]) for r in rows if r.get("data") is not None]
        entries.append(shards.write_shard(directory, f"{number:05d}", pa.table(arrays), members))
    shards.write_manifest(directory, "pool", entries)
    return directory


class FakeScorer:
    """Pictures embed as their mean colour, texts as the colour that they name: (r, g, b), unit norm."""

    def __init__(self):
        self.pictures = 0

    def encode_images(self, images):
        self.pictures += len(images)
        return self._unit([np.asarray(image, np.float32).mean((0, 1)) for image in images])

    def pixels(self, images):
        return images

    def encode_pixels(self, parts):
        return self.encode_images([image for part in parts for image in part])

    def encode_texts(self, texts):
        return self._unit([[("red" in t) + 0.1, ("green" in t) + 0.1, ("blue" in t) + 0.1] for t in texts])

    def _unit(self, rows):
        rows = np.array(rows, np.float32) + 1e-3
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@dataclass
class MemoryPart:
    """A shard that is a table."""

    table: pa.Table

    @property
    def rows(self) -> int:
        return len(self.table)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.table.column_names)

    def read(self, columns) -> pa.Table:
        return pa.table({c: self.table[c] if c in self.names else pa.nulls(self.rows) for c in columns})


PLAIN = {
    "uid": None, "status": "downloaded", "reason": None, "error": None, "sha256": None, "url": None,
    "caption": "a caption",
    "original_width": 300, "original_height": 300, "caption_chars": 20, "caption_words": 4, "language": "en",
    "language_score": 0.9, "clip_score": 0.3,
}


def made_rows(rows: int, pools: int = 1, looks: Looks | None = None, evaluation: Looks | None = None,
              prefer: str = "clip_score", **columns) -> Rows:
    """Downloaded, decoded rows of plain values in two parts a pool; keyword arguments replace columns or add some."""
    values = {name: [default] * rows for name, default in PLAIN.items()} | {"uid": [f"u{i}" for i in range(rows)]}
    hashes = looks.hashes if looks else np.arange(rows, dtype=np.uint64) << 40
    thumbnails = looks.thumbnails if looks else np.zeros((rows, THUMBNAIL), np.uint8)
    made = {name: pa.array(column) for name, column in (values | columns).items()}
    made |= {"phash": pa.array(hashes), "thumbnail": pa.array([t.tobytes() for t in thumbnails], pa.binary(THUMBNAIL))}
    table, pool = pa.table(made), np.arange(rows) * pools // max(rows, 1)
    edges = sorted({0, rows, *(rows * i // (2 * pools) for i in range(2 * pools))})
    parts = [MemoryPart(table.slice(start, stop - start)) for start, stop in itertools.pairwise(edges)]
    parts = parts or [MemoryPart(table)]
    pictures = evaluation or look([])
    found = EvaluationImages(pa.array([f"e{i}" for i in range(len(pictures))], pa.string()), pa.array([]), pictures)
    return Rows(parts, [f"p{i}" for i in range(pools)], pool.astype(np.int16), prefer, lambda splits: found)


def write_world(tmp_path: Path, monkeypatch) -> tuple[Path, Path, Path, Path]:
    """Two annotated pools: `b` repeats pictures of `a`; one picture of `a` stands in the evaluation set."""
    monkeypatch.setattr("vlmpipe.models.scorer.load_scorer", lambda source, batch_size: FakeScorer())
    annotation._annotators.cache_clear()
    (tmp_path / "scorer").mkdir()
    pools, notes = tmp_path / "pools", tmp_path / "annotations"
    one, two = jpeg(picture(1)), jpeg(picture(2))
    tested = jpeg(picture(3))
    write_pool(pools / "a", [row("a1", one, "red green blue shapes"), row("a2")], [row("a3", tested), row("a4", two)])
    smaller = jpeg(picture(2).resize((48, 48)), 70)
    write_pool(pools / "b", [row("b1", one, "three red red shapes"), row("b2", smaller), row("b3", two[:-300])])
    for name in "ab":
        out, settings = notes / name, annotation.AnnotateConfig()
        annotation.annotate(name, pools / name, tmp_path / "scorer", out, settings, Cluster("inline"))
    again = jpeg(picture(3).resize((80, 80), Image.Resampling.BICUBIC), 60)
    write_pool(tmp_path / "questions" / "test" / "images", [row("77", again)])
    annotation._annotators.cache_clear()
    return pools, notes, tmp_path / "questions", tmp_path / "out"
