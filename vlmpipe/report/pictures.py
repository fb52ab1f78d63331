"""Small pictures for pages, as data addresses: a page is one file that opens from disk."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as ds
from PIL import Image

from vlmpipe.data.task import TaskConfig, read_pictures
from vlmpipe.images import NotAnImage, decode_rgb, to_rgb
from vlmpipe.shards import iter_images, read_manifest, read_shard_rows

THUMBNAIL = 112


def data_address(image: Image.Image, size: int = THUMBNAIL) -> str:
    """A jpeg data address of the picture, at most `size` pixels on a side."""
    small = image.copy()
    small.thumbnail((size, size))
    return "data:image/jpeg;base64," + base64.b64encode(jpeg_bytes(small, 80)).decode()


def jpeg_bytes(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def thumbnails(pool: Path, uids: Iterable[str]) -> dict[str, str]:
    """uid -> data address for those of `uids` that the pool holds; opens only the shards that are needed."""
    wanted, found = set(uids), {}
    for shard in read_manifest(pool)["shards"] if wanted else []:
        here = wanted & set(read_shard_rows(pool, shard["name"], ["uid"])["uid"].to_pylist())
        if here:
            for uid, data in iter_images(pool, shard["name"]):
                if uid in here:
                    found[uid] = data_address(decode_rgb(data))
    return found


@dataclass(frozen=True)
class TaskPictures:
    """Where the pictures of evaluated samples lie: `packed`, the packed dataset; `task`, the task's own files."""

    packed: Path
    task: TaskConfig = field(default_factory=TaskConfig)

    def pictures(self, names: Iterable[str]) -> dict[str, bytes]:
        """name -> encoded picture of those that are there: the task's own, and the packed ones by their uids."""
        wanted, split = set(names), Path(self.task.path) / "test"
        own = read_pictures(split, self.task) if self.task.path and (split / self.task.images).is_dir() else {}
        found = {name: own[name] for name in wanted if name in own}
        return found | _packed(self.packed / "test", wanted - found.keys())

    def thumbnails(self, names: Iterable[str], size: int = THUMBNAIL) -> dict[str, str]:
        """name -> data address of those that are there and decode."""
        return {name: address for name, data in self.pictures(names).items() if (address := _thumbnail(data, size))}


def _packed(split: Path, uids: set[str]) -> dict[str, bytes]:
    if not uids or not split.is_dir():
        return {}
    table = ds.dataset(sorted(map(str, split.glob("*.parquet")))).to_table(
        columns=["uid", "image"], filter=pc.field("uid").isin(sorted(uids))
    )
    return {row["uid"]: row["image"]["bytes"] for row in table.to_pylist()}


def _thumbnail(data: bytes, size: int) -> str | None:
    try:
        return data_address(decode_rgb(data), size)
    except NotAnImage:  # the evaluation would have refused it; these are other files by now
        return None


def overlay(image: Image.Image, weights: np.ndarray, size: int = 160) -> str:
    """The picture with attention over it: `weights` [h, w] >= 0, bright where the model looked."""
    picture = to_rgb(image).resize((size, size))
    heat = np.asarray(weights, np.float32)
    heat = (heat - heat.min()) / max(float(heat.max() - heat.min()), 1e-9)
    mask = Image.fromarray((heat * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    strength = np.asarray(mask, np.float32)[..., None] / 255
    pixels = np.asarray(picture, np.float32)
    mixed = pixels * (0.35 + 0.65 * strength) + np.array([255, 120, 0], np.float32) * 0.25 * strength
    return data_address(Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8)), size)
