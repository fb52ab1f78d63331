"""Any source as a list: shards of rows with a uid, on which download works one by one."""

from collections.abc import Iterator
from pathlib import Path

from vlmpipe.curate.sources import folder, tars
from vlmpipe.curate.sources.files import root_and_files
from vlmpipe.curate.sources.flavours import Columns
from vlmpipe.curate.sources.pairs import Pair, with_uids, write_list
from vlmpipe.curate.sources.source import Source
from vlmpipe.curate.urls import read_pairs
from vlmpipe.errors import UserError


def split(
    urls: str, source: Source, columns: Columns, max_bytes: int, rows_per_shard: int, state: Path
) -> list[tuple[str, int]]:
    """Write what lies at `urls` as `<state>/list/<shard>.parquet`; return [(shard, rows)].

    Raises:
        UserError: it can't be read as the kind of source that it is said to be; there is nothing in it.
    """
    rows = with_uids(_pairs(urls, source, columns, max_bytes), urls)
    return write_list(rows, rows_per_shard, state / "list", urls)


def _pairs(urls: str, source: Source, columns: Columns, max_bytes: int) -> Iterator[Pair]:
    if source.kind == "folder":
        if "://" in urls:
            raise UserError(f"found {urls}; expected a local folder; pack a folder on object storage into tars "
                            f"(source.kind webdataset), or list its addresses")
        return folder.pairs(Path(urls), source, columns, max_bytes)
    if source.kind == "webdataset":
        root, names = root_and_files(urls, source.files, (".tar",))
        return tars.pairs(root, names, columns, source.image, max_bytes)
    return read_pairs(urls, columns)

