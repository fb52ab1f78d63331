"""Captions with addresses in the place of pictures: Conceptual Captions (tsv), LAION, PMD, DataComp, COYO and the like.

What the columns mean is recognised as curation recognises it (`curate/sources/flavours.py`). Pictures come by the
pipeline's download; those of the pool go by the record's id, since ids are made as the pipeline makes them.
"""

from pathlib import Path

from vlmpipe.curate.sources.flavours import Columns
from vlmpipe.curate.urls import read_list
from vlmpipe.data.fields import filled
from vlmpipe.data.records import CaptionRecord


def read_listing(path: Path) -> list[CaptionRecord]:
    """One record a pair: several captions of an address are several records, as they are several rows of a pool.

    Raises:
        UserError: no such list, a missing column, a damaged file.
    """
    rows = read_list(path, Columns())
    return filled([CaptionRecord(row["uid"], (row["url"],), (row["caption"],)) for row in rows], Path(path), "pairs")
