"""The pictures that questions are asked about: nothing to train on may show one."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from vlmpipe.curate.duplicates import Looks, Near, look, nearest
from vlmpipe.data.vqa import vqa_images
from vlmpipe.errors import UserError
from vlmpipe.images import NotAnImage, decode_rgb
from vlmpipe.progress import progress
from vlmpipe.shards import batched


@dataclass(frozen=True)
class EvaluationImages:
    """N pictures: their names, the sha256 of their bytes in hex, and how they look."""

    uids: pa.Array
    digests: pa.Array
    looks: Looks

    def __len__(self) -> int:
        return len(self.uids)


def evaluation_images(questions: Path, splits: Sequence[str], chunk: int = 64) -> EvaluationImages:
    """Identify every picture of the question splits, `chunk` of them in memory at a time.

    Raises:
        UserError: a split has no pictures, or one that does not decode: nothing could be told from it.
    """
    uids, digests, looks = [], [], [look([])]
    for split in splits:
        pictures = vqa_images(questions / split)
        found = progress(pictures.items(), len(pictures), f"evaluation pictures ({split})")
        for batch in batched(found, chunk):
            uids += [uid for uid, _ in batch]
            digests += [hashlib.sha256(data).hexdigest() for _, data in batch]
            looks.append(_look(questions / split, batch))
    return EvaluationImages(pa.array(uids, pa.string()), pa.array(digests, pa.string()), _joined(looks))


def twins(asked: Mapping[str, bytes], trained: Mapping[str, bytes], near: Near, where: Path) -> dict[str, str]:
    """The asked pictures that are near one of those trained on, each with the nearest.

    Raises:
        UserError: a picture does not decode.
    """
    names, looks = zip(*(_looks(pictures, where) for pictures in (asked, trained)), strict=True)
    which, _ = nearest(*looks, near)
    return {names[0][place]: names[1][twin] for place, twin in enumerate(which.tolist()) if twin >= 0}


def _looks(pictures: Mapping[str, bytes], where: Path, chunk: int = 64) -> tuple[list[str], Looks]:
    found = progress(pictures.items(), len(pictures), f"pictures of {where.name}")
    names, looks = [], [look([])]
    for batch in batched(found, chunk):
        names += [name for name, _ in batch]
        looks.append(_look(where, batch))
    return names, _joined(looks)


def _look(where: Path, batch: Sequence[tuple[str, bytes]]) -> Looks:
    return look([_decoded(where, uid, data) for uid, data in batch])


def _joined(looks: Sequence[Looks]) -> Looks:
    return Looks(*(np.concatenate([getattr(part, name) for part in looks]) for name in ("hashes", "thumbnails")))


def _decoded(directory: Path, uid: str, data: bytes) -> Image.Image:
    try:
        return decode_rgb(data)
    except NotAnImage as error:
        raise UserError(f"{directory}: found picture {uid} broken ({error}); expected a picture; restore it") from None
