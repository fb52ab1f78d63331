"""The shard directory: what stages exchange.

A shard directory holds WebDataset tars, one parquet beside each tar and a `manifest.json` that is written
last and atomically. A directory without a manifest is incomplete: a stage resumes it, nobody reads it.
All writes are deterministic: the same samples give the same bytes.
"""

import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from vlmpipe.errors import UserError, disk_full

MANIFEST = "manifest.json"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
Item = TypeVar("Item")


# --- files -------------------------------------------------------------------------------------------------

def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write `path` so that a reader sees the old file, the new one, or none: never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` atomically with sorted keys, so that equal values are equal bytes. NaN is refused."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_bytes_atomic(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a json file.

    Raises:
        UserError: the file is missing or is not json.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"found no file {path}; expected json written by an earlier stage; run that stage") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not json ({error}); delete it and rerun the stage that writes it") from None


def sha256_file(path: Path | str) -> str:
    """Hex sha256 of a local file or fsspec URL."""
    digest = hashlib.sha256()
    with fsspec.open(str(path), "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_directory(directory: Path | str) -> str:
    """Hex sha256 of the names and bytes of all files in a local directory: names a model."""
    directory = Path(directory)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    facts = [(path.relative_to(directory).as_posix(), sha256_file(path)) for path in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def write_table(path: Path, table: pa.Table) -> None:
    """Write a parquet file atomically."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_bytes_atomic(path, buffer.getvalue())


def write_tables(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write one parquet file atomically from tables that follow each other, one in memory at a time."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> str:
    """Write a tar of (name, bytes) atomically and without times or owners; return its sha256."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        digest = sha256_file(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return digest


def write_shard(directory: Path, name: str, table: pa.Table, members: Iterable[tuple[str, bytes]]) -> dict:
    """Write one shard's parquet and tar; return its entry for the manifest."""
    tar, parquet = Path(directory) / f"{name}.tar", Path(directory) / f"{name}.parquet"
    files = {tar.name: write_tar(tar, members)}
    write_table(parquet, table)
    files[parquet.name] = sha256_file(parquet)
    return {"name": name, "rows": table.num_rows, "files": files}


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter: how rows become shards."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


# --- the manifest ------------------------------------------------------------------------------------------

def write_manifest(directory: Path, kind: str, shards: Sequence[dict], **facts: Any) -> None:
    """Declare `directory` complete: `shards` lists `{name, rows, files: {file name: sha256}}`."""
    shards = list(shards)
    rows = sum(shard["rows"] for shard in shards)
    write_json(Path(directory) / MANIFEST, {"kind": kind, "version": 1, "rows": rows, "shards": shards, **facts})


def read_manifest(directory: Path, kind: str | None = None) -> dict:
    """Read a directory's manifest.

    Raises:
        UserError: there is none (the directory is incomplete), or it is of another kind.
    """
    path = Path(directory) / MANIFEST
    if not path.exists():
        raise UserError(
            f"{directory} has no {MANIFEST}: it is missing or incomplete; expected a finished directory; "
            f"rerun the stage that writes it (`dvc repro`)"
        )
    manifest = read_json(path)
    if kind is not None and manifest.get("kind") != kind:
        raise UserError(f"{path}: found kind '{manifest.get('kind')}'; expected '{kind}'; check the path")
    return manifest


def read_rows(directory: Path, columns: Sequence[str] | None = None, shards: Sequence[str] | None = None) -> pa.Table:
    """All rows of a shard directory in order, or of the named shards, as one table."""
    manifest = read_manifest(directory)
    names = [shard["name"] for shard in manifest["shards"] if shards is None or shard["name"] in shards]
    tables = [read_shard_rows(directory, name, columns) for name in names]
    if not tables:
        raise UserError(f"{directory} holds no shards; expected at least one; rerun the stage that writes it")
    return pa.concat_tables(tables, promote_options="default")


def read_shard_rows(directory: Path, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of one shard.

    Raises:
        UserError: the parquet file can't be read, or its bytes are not the ones that the manifest lists.
    """
    check_file(directory, f"{name}.parquet")
    path = Path(directory) / f"{name}.parquet"
    try:
        return pq.read_table(path, columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowInvalid) as error:
        raise corrupt(path, str(error).splitlines()[0]) from None


def check_file(directory: Path, file: str) -> None:
    """Refuse a file whose bytes are not the manifest's: parquet has no checksums, and reads many flipped bits as data.

    Without a manifest there is nothing to hold it to: then only the stage that writes the directory reads it.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(directory) / file
    if not (Path(directory) / MANIFEST).exists() or not path.exists():
        return
    expected = next((shard["files"][file] for shard in _entries(directory) if file in shard["files"]), None)
    found = sha256_file(path)
    if expected not in (None, found):
        raise corrupt(path, _other_bytes(found, expected))


def _entries(directory: Path) -> list[dict]:
    path = (Path(directory) / MANIFEST).absolute()
    if not path.exists():
        read_manifest(directory)  # says so
    facts = path.stat()
    return _parsed(path, facts.st_mtime_ns, facts.st_size, facts.st_ino)


@lru_cache(maxsize=16)
def _parsed(path: Path, *_stamp: int) -> list[dict]:
    """Parsed once: every shard asks, and a large pool's manifest is long."""
    return read_json(path)["shards"]


def _other_bytes(found: str, expected: str) -> str:
    return f"its sha256 is {found[:12]}…, the manifest lists {expected[:12]}…"


def iter_images(directory: Path, name: str) -> Iterator[tuple[str, bytes]]:
    """Yield (uid, encoded image) of one shard, after checking its tar against the manifest.

    Raises:
        UserError: the tar is missing, or its bytes are not the ones the manifest lists.
    """
    for member, data in iter_members(directory, name):
        uid, suffix = os.path.splitext(member)
        if suffix in IMAGE_SUFFIXES:
            yield uid, data


def iter_members(directory: Path, name: str) -> Iterator[tuple[str, bytes]]:
    """Yield (member name, bytes) of one shard's tar; checks as in `iter_images`."""
    shard = next((shard for shard in _entries(directory) if shard["name"] == name), None)
    if shard is None:
        raise UserError(f"{directory} lists no shard '{name}' in its manifest; rerun the stage that writes it")
    # A pool whose `store` is an object storage keeps only the tar's address here.
    path = shard.get("tar") or str(Path(directory) / f"{name}.tar")
    expected = shard["files"][f"{name}.tar"]
    with local_copy(path) as here:
        if here is None:
            raise corrupt(path, "the file is missing")
        if (found := sha256_file(here)) != expected:
            raise corrupt(path, _other_bytes(found, expected))
        with tarfile.open(here, "r:") as tar:
            for member in tar:
                if member.isfile():
                    yield member.name, tar.extractfile(member).read()


# --- object storage ----------------------------------------------------------------------------------------

@contextmanager
def reaching(address: Path | str) -> Iterator[None]:
    """Name the storage when it fails: each kind has exceptions of its own, and none of them says what to do.

    Raises:
        UserError: the storage does not answer, or does not let us in. A file that is not there stays FileNotFoundError.
    """
    try:
        yield
    except Exception as error:
        if "://" not in str(address) or disk_full(error) or isinstance(error, (UserError, FileNotFoundError)):
            raise
        said = " ".join(str(error).split()) or "no reason given"
        raise UserError(f"can't use {address} ({type(error).__name__}: {said}); expected storage that answers and "
                        f"lets us in; check address, credentials and endpoint (AWS_ENDPOINT_URL for S3)") from error


@contextmanager
def local_copy(address: Path | str) -> Iterator[Path | None]:
    """A file as a local one, None where it does not exist: what is read twice is fetched once."""
    filesystem, path = fsspec.core.url_to_fs(str(address))
    if isinstance(filesystem, LocalFileSystem):
        yield Path(path) if Path(path).exists() else None
        return
    with tempfile.TemporaryDirectory(prefix="vlmpipe-") as folder:
        here: Path | None = Path(folder) / "file"
        try:
            with reaching(address):
                filesystem.get_file(path, str(here))
        except FileNotFoundError:
            here = None
        yield here


def is_there(address: Path | str) -> bool:
    """Whether a file or fsspec URL exists."""
    with reaching(address):
        filesystem, path = fsspec.core.url_to_fs(str(address))
        return filesystem.exists(path)


def put(file: Path, address: str) -> None:
    """Copy a local file to an fsspec URL."""
    with reaching(address):
        filesystem, path = fsspec.core.url_to_fs(address)
        if isinstance(filesystem, LocalFileSystem):  # an object storage has no folders, and s3fs would make a bucket
            filesystem.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            filesystem.put_file(str(file), path)
        except FileNotFoundError as error:
            raise UserError(f"found no place for {address} ({error}); expected a bucket or folder that exists; "
                            f"make it, or change the pool's `store`") from None


def corrupt(path: Path | str, why: str) -> UserError:
    """The one message for a damaged shard."""
    return UserError(
        f"corrupt shard {path}: {why}; expected the bytes that its stage wrote; "
        f"delete the file, then rerun that stage, or `dvc checkout` to have it back from the cache"
    )


def remove_stale(directory: Path, keep: Iterable[str]) -> list[str]:
    """Delete every file of `directory` that is not in `keep`; for stages whose out persists between runs."""
    keep = set(keep)
    stale = [path for path in sorted(Path(directory).iterdir()) if path.is_file() and path.name not in keep]
    for path in stale:
        path.unlink()
    return [path.name for path in stale]


# --- progress ----------------------------------------------------------------------------------------------
