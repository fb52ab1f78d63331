"""DataComp's metadata as a pool that can be selected from with no picture downloaded.

Format: mlfoundations/datacomp: parquet files with uid, url, text, original_width, original_height, sha256 and CLIP
scores, beside each an .npz of the pictures' embeddings (`b32_img`, `l14_img`).
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlmpipe import shards
from vlmpipe.curate.annotators.base import Batch, Tools
from vlmpipe.curate.annotators.caption import Language
from vlmpipe.errors import UserError
from vlmpipe.progress import progress

NEEDED = ("uid", "text")
RENAMED = {"text": "caption"}


def read_metadata(metadata: Path, pool: Path, notes: Path, score: str = "clip_l14_similarity_score") -> int:
    """Write a pool and its annotations from a folder of metadata parquet files, one shard each; return the rows.

    Every column is copied, `text` as `caption`. The annotations are what rules on captions and scores read:
    caption counts, language, `clip_score` (the metadata's `score`) and `image_embedding` where there is an .npz.

    Raises:
        UserError: there is no metadata, or a file lacks a needed column.
    """
    files = sorted(Path(metadata).glob("*.parquet"))
    if not files:
        raise UserError(f"found no .parquet file in {metadata}; expected DataComp's metadata; check the path")
    listed: tuple[list[dict], list[dict]] = ([], [])
    language = Language(Language.Config(), Tools())
    for file in progress(files, len(files), f"read {metadata}"):
        raw = _checked(file, score)
        tables = _pool(raw, Path(pool).name), _notes(raw, score, _embeddings(file, score, len(raw)), language)
        for directory, table, entries in zip((pool, notes), tables, listed):
            path = Path(directory) / file.name
            shards.write_table(path, table)
            entries.append({"name": file.stem, "rows": len(table), "files": {file.name: shards.sha256_file(path)}})
    shards.write_manifest(pool, "pool", listed[0])
    shards.write_manifest(notes, "annotations", listed[1], pool=Path(pool).name)
    return sum(entry["rows"] for entry in listed[0])


def _checked(file: Path, score: str) -> pa.Table:
    table = pq.read_table(file)
    missing = [name for name in (*NEEDED, score) if name not in table.column_names]
    if missing:
        raise UserError(f"{file}: found columns {', '.join(table.column_names)}; expected {', '.join(missing)} too; "
                        f"name the score column with --score")
    return table


def _pool(raw: pa.Table, name: str) -> pa.Table:
    table = raw.rename_columns([RENAMED.get(column, column) for column in raw.column_names])
    facts = {"status": pa.repeat("downloaded", len(raw)), "reason": pa.nulls(len(raw), pa.string()),
             "pool": pa.repeat(name, len(raw))}
    for column in ("original_width", "original_height"):
        facts |= {} if column in raw.column_names else {column: pa.nulls(len(raw), pa.int32())}
    for column, values in facts.items():
        table = table.append_column(column, values)
    return table


def _notes(raw: pa.Table, score: str, embeddings: pa.Array | None, language: Language) -> pa.Table:
    captions = [caption or "" for caption in raw["text"].to_pylist()]
    tongue, confidence = language(Batch([], captions))
    columns = {
        "uid": raw["uid"].cast(pa.string()),
        "caption_chars": pa.array(map(len, captions), pa.int32()),
        "caption_words": pa.array([len(caption.split()) for caption in captions], pa.int32()),
        "language": tongue, "language_score": confidence,
        "clip_score": raw[score].cast(pa.float32()),
        "error": pa.nulls(len(raw), pa.string()),
    }
    return pa.table(columns | ({} if embeddings is None else {"image_embedding": embeddings}))


def _embeddings(file: Path, score: str, rows: int) -> pa.Array | None:
    """The pictures' embeddings by the model of the score."""
    path = file.with_suffix(".npz")
    if not path.exists():
        return None
    with np.load(path) as arrays:
        vectors_NE = arrays["b32_img" if "b32" in score else "l14_img"].astype(np.float16)
    if len(vectors_NE) != rows:
        found = len(vectors_NE)
        raise UserError(f"{path}: found {found} embeddings; expected {rows}, as {file.name}; fetch both again")
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors_NE.reshape(-1)), vectors_NE.shape[1])
