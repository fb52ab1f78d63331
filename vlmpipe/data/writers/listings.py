"""Lists of captions and addresses: Conceptual Captions, LAION, PMD."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from vlmpipe.data.records import CaptionRecord
from vlmpipe.data.writers.files import dump_lines
from vlmpipe.shards import write_bytes_atomic, write_table


def write_conceptual(path: Path, records: Sequence[CaptionRecord]) -> None:
    """A tsv of caption and address without a header, as CC3M is."""
    rows = (f"{caption}\t{record.images[0]}\n" for record in records for caption in record.captions)
    write_bytes_atomic(path, "".join(rows).encode())


def write_laion(path: Path, records: Sequence[CaptionRecord]) -> None:
    """A parquet of URL and TEXT."""
    rows = [(record.images[0], caption) for record in records for caption in record.captions]
    write_table(path, pa.table({"URL": [url for url, _ in rows], "TEXT": [text for _, text in rows]}))


def write_pmd(path: Path, records: Sequence[CaptionRecord]) -> None:
    """Json lines of image_url, texts, source and meta: all captions of a picture in one row."""
    dump_lines(path, [
        {"image_url": record.images[0], "texts": list(record.captions), "source": "scenes", "meta": "{}"}
        for record in records
    ])
