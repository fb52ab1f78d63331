"""Any source as a list: shards of rows with a uid, on which download works one by one."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmpipe.curate.sources import documents, folder, hub, tables, tars
from vlmpipe.curate.sources.files import root_and_files, root_of
from vlmpipe.curate.sources.flavours import Columns
from vlmpipe.curate.sources.pairs import Pair, with_uids, write_list
from vlmpipe.curate.sources.source import Source
from vlmpipe.curate.urls import read_pairs
from vlmpipe.errors import UserError
from vlmpipe.shards import read_json, write_json

STAGED = "staged"  # what a stream brought and no shard holds yet


def split(
    urls: str, source: Source, columns: Columns, max_bytes: int, rows_per_shard: int, state: Path
) -> list[tuple[str, int]]:
    """Write what lies at `urls` as `<state>/list/<shard>.parquet`; return [(shard, rows)].

    Raises:
        UserError: it can't be read as the kind of source that it is said to be; there is nothing in it.
    """
    if source.hub:
        return _streamed(source, columns, max_bytes, rows_per_shard, state)
    if source.kind == "documents":
        with documents.laid_out(state / documents.FILE) as layouts:
            rows = with_uids(documents.pairs(urls, columns, max_bytes, layouts), urls)
            return write_list(_noted(rows, layouts), rows_per_shard, state / "list", urls)
    rows = with_uids(_pairs(urls, source, columns, max_bytes), urls)
    return write_list(rows, rows_per_shard, state / "list", urls)


def _noted(rows: Iterator[dict[str, Any]], layouts: documents.Layouts) -> Iterator[dict[str, Any]]:
    for row in rows:
        layouts.fill(row)
        yield row


def _pairs(urls: str, source: Source, columns: Columns, max_bytes: int) -> Iterator[Pair]:
    if source.kind == "folder":
        if "://" in urls:
            raise UserError(f"found {urls}; expected a local folder; pack a folder on object storage into tars "
                            f"(source.kind webdataset), or list its addresses")
        return folder.pairs(Path(urls), source, columns, max_bytes)
    if source.kind == "webdataset":
        root, names = root_and_files(urls, source.files, (".tar",))
        return tars.pairs(root, names, columns, source.image, max_bytes)
    if source.kind == "dataset":
        return tables.pairs(urls, source, columns, max_bytes)
    return read_pairs(urls, columns)


def _streamed(source: Source, columns: Columns, max_bytes: int, rows_per_shard: int, state: Path) -> list:
    """A stream is read once: a run that was stopped after it goes on with what it brought."""
    whole = state / STAGED / "whole.json"
    asked = f"{source} {columns} {max_bytes} {rows_per_shard}"
    if whole.exists() and (kept := read_json(whole))["asked"] == asked:
        return [(name, rows) for name, rows in kept["shards"]]
    shutil.rmtree(whole.parent, ignore_errors=True)
    rows = with_uids(hub.pairs(source, columns, max_bytes, whole.parent), source.hub)
    shards = write_list(rows, rows_per_shard, state / "list", source.hub)
    write_json(whole, {"asked": asked, "shards": shards})
    return shards


def places(urls: str, source: Source, state: Path) -> str:
    """What the places of rows are relative to."""
    return str(Path(state).absolute() / STAGED) if source.hub else root_of(urls)


def finished(source: Source, out: Path, state: Path) -> dict[str, Any]:
    """Put the layout of documents beside the shards and drop what waited for them; facts for the manifest."""
    shutil.rmtree(state / STAGED, ignore_errors=True)
    if source.kind != "documents":
        return {}
    partial = out / f".{documents.FILE}.partial"
    shutil.copyfile(state / documents.FILE, partial)
    partial.replace(out / documents.FILE)
    return {"documents": documents.FILE}
