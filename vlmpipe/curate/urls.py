"""URL lists: any of the usual files, read as a stream, into pairs."""

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from vlmpipe.curate.sources.flavours import Chosen, Columns, choose, headerless
from vlmpipe.curate.sources.pairs import Pair, as_text, each_text, with_uids
from vlmpipe.errors import UserError
from vlmpipe.shards import is_there, reaching

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".csv.gz", ".tsv.gz", ".jsonl.gz")
csv.field_size_limit(1 << 24)  # captions scraped from pages can be long


class Reading:
    """What a list's columns mean: settled by its first file, and the others are held to it.

    `meaning` is `flavours.choose`, or another that picks the columns out of those that were found.
    """

    def __init__(self, columns: Columns, meaning: Callable[[Sequence[str], Columns, str], Chosen] = choose):
        self.columns, self.meaning = columns, meaning
        self.chosen: Chosen | None = None

    def settle(self, found: Sequence[str], where: str) -> list[str]:
        """The columns to read of a file that has `found`."""
        if self.chosen is None:
            self.chosen = self.meaning(found, self.columns, where)
        missing = [name for name in self.chosen.wanted if name not in found]
        if missing:
            said = Columns(self.chosen.url, self.chosen.caption, self.chosen.uid)
            self.meaning(found, said, where)
            raise UserError(f"{where}: found no column '{missing[0]}'; expected the columns of the files before it; "
                            f"mend the list, or name columns.extra")
        return self.chosen.wanted

    def pairs(self, row: dict[str, Any]) -> Iterator[Pair]:
        """A pair for each caption of the row."""
        chosen = self.chosen
        assert chosen is not None
        extra = {kept: row[name] for kept, name in chosen.extra}
        texts = each_text(row[chosen.caption])
        for number, caption in enumerate(texts):
            uid = None if chosen.uid is None else str(row[chosen.uid])
            own = f"{uid}_{number}" if uid and len(texts) > 1 else uid
            yield Pair(as_text(row[chosen.url]), caption, extra, own)


def read_list(source: str | Path, columns: Columns) -> Iterator[dict[str, Any]]:
    """Stream rows {uid, url, caption, *extra, place: null} of a list: a file, a directory of files, or an fsspec URL.

    Raises:
        UserError: no such list, a missing column, a damaged file, a uid that is not unique or not usable as a name.
    """
    return with_uids(read_pairs(source, columns), source)


def read_pairs(source: str | Path, columns: Columns) -> Iterator[Pair]:
    """Stream the pairs of a list, as `read_list` does."""
    reading = Reading(columns)
    for file in list_files(str(source)):
        for row in read_file(file, reading):
            yield from reading.pairs(row)


def list_files(source: str) -> list[str]:
    """The files of a list, in order."""
    if not is_there(source):
        raise UserError(f"found no URL list {source}; expected a file or directory of {', '.join(SUFFIXES[:4])}; "
                        f"set the pool's `urls`")
    filesystem, path = fsspec.core.url_to_fs(source)
    if not filesystem.isdir(path):
        if not path.endswith(SUFFIXES):
            raise UserError(f"{source}: found an unknown kind of file; expected one of {', '.join(SUFFIXES)}")
        return [filesystem.unstrip_protocol(path)]
    files = [filesystem.unstrip_protocol(name) for name in sorted(filesystem.find(path)) if name.endswith(SUFFIXES)]
    if not files:
        raise UserError(f"{source}: found no list in this directory; expected files of {', '.join(SUFFIXES)}")
    return files


def read_file(file: str, reading: Reading) -> Iterator[dict[str, Any]]:
    """Stream the rows of one file, as mappings of the columns that `reading` settles on."""
    kind = next(suffix for suffix in SUFFIXES if file.endswith(suffix)).removesuffix(".gz")
    with reaching(file):
        try:
            yield from _READERS[kind](file, reading)
        except (csv.Error, json.JSONDecodeError, UnicodeDecodeError, pa.ArrowInvalid, EOFError) as error:
            why = str(error).splitlines()[0]
            raise UserError(f"{file}: found damaged {kind[1:]} ({why}); expected a readable list; mend it") from None


def _parquet(file: str, reading: Reading) -> Iterator[dict[str, Any]]:
    with fsspec.open(file, "rb") as stream:
        table = pq.ParquetFile(stream)
        wanted = reading.settle(table.schema_arrow.names, file)
        for batch in table.iter_batches(columns=wanted, batch_size=8192):
            yield from batch.to_pylist()


def _separated(delimiter: str, file: str, reading: Reading) -> Iterator[dict[str, Any]]:
    with _text(file) as stream:
        first = stream.readline()
        names = headerless(first.rstrip("\r\n").split("\t")) if delimiter == "\t" else None
        lines = itertools.chain([first], stream)
        # Files without a header have no quotes either: one that begins a caption would swallow the rows below it.
        quoting = csv.QUOTE_NONE if names else csv.QUOTE_MINIMAL
        rows = csv.DictReader(lines, names, delimiter=delimiter, quoting=quoting)
        wanted = reading.settle(rows.fieldnames or [], file)
        for row in rows:
            yield {name: row[name] for name in wanted}


def _json_lines(file: str, reading: Reading) -> Iterator[dict[str, Any]]:
    wanted: list[str] = []
    for number, row in json_objects(file):
        if not wanted or reading.chosen.url not in row:  # a caption or extra may be left out of later lines
            wanted = reading.settle(list(row), f"{file}, line {number}")
        yield {name: row.get(name) for name in wanted}


def json_objects(file: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Stream (line number, object) of a file of json lines.

    Raises:
        UserError: a line is something else.
    """
    with _text(file) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict):
                raise UserError(f"{file}, line {number}: found {type(row).__name__}; expected an object per line")
            yield number, row


@contextmanager
def _text(file: str) -> Iterator[IO[str]]:
    with fsspec.open(file, "rb", compression="infer") as stream:
        yield io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")


_READERS = {
    ".parquet": _parquet,
    ".csv": lambda file, reading: _separated(",", file, reading),
    ".tsv": lambda file, reading: _separated("\t", file, reading),
    ".jsonl": _json_lines,
}
