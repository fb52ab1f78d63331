"""Embeddings of pictures that are in no pool: evaluation sets, or what a pool is to be like."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from vlmpipe import shards
from vlmpipe.errors import UserError
from vlmpipe.images import NotAnImage, decode_rgb
from vlmpipe.progress import progress


def embed(pictures: Path, scorer: str, out: Path, batch: int = 64) -> int:
    """Write `out`, parquet with uid and image_embedding (float16, unit length) of every picture; return how many.

    Args:
        pictures: a shard directory, or a folder of image files (searched as a whole).
        scorer: what `annotate` scores with: a model directory or a hub id.

    Raises:
        UserError: there is no picture, or one does not decode.
    """
    from vlmpipe.models.scorer import load_scorer

    model = load_scorer(scorer, batch_size=batch)
    uids, parts = [], []
    for rows in shards.batched(progress(_pictures(Path(pictures)), None, f"embed {pictures}"), batch):
        uids += [uid for uid, _ in rows]
        images = [_decoded(uid, data) for uid, data in rows]
        parts.append(np.asarray(model.encode_images(images), np.float32).astype(np.float16))
    if not uids:
        raise UserError(f"found no picture in {pictures}; expected a shard directory or a folder of images")
    vectors_NE = np.concatenate(parts)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors_NE.reshape(-1)), vectors_NE.shape[1])
    shards.write_table(Path(out), pa.table({"uid": uids, "image_embedding": column}))
    return len(uids)


def _pictures(where: Path) -> Iterator[tuple[str, bytes]]:
    if (where / shards.MANIFEST).exists():
        for shard in shards.read_manifest(where)["shards"]:
            yield from shards.iter_images(where, shard["name"])
        return
    for path in sorted(where.rglob("*")):
        if path.suffix.lower() in shards.IMAGE_SUFFIXES:
            yield path.relative_to(where).as_posix(), path.read_bytes()


def _decoded(uid: str, data: bytes):
    try:
        return decode_rgb(data)
    except NotAnImage as error:
        raise UserError(f"found picture {uid} broken ({error}); expected a picture; restore it") from None
