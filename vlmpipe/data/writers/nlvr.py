"""NLVR2: json lines, pictures named by the identifier."""

from collections.abc import Sequence
from pathlib import Path

from vlmpipe.data.pictures import write_pictures
from vlmpipe.data.records import StatementRecord
from vlmpipe.data.writers.coco import Named
from vlmpipe.data.writers.files import dump_lines


def write_nlvr2(directory: Path, records: Sequence[StatementRecord], images: Named, split: str) -> None:
    """Records whose ids and picture names are NLVR2's."""
    lines = [
        {
            "identifier": record.id, "sentence": record.sentence, "label": str(record.label),
            "left_url": _url(record.images[0]), "right_url": _url(record.images[1]),
            "synset": record.slices.get("synset", ""), "query": "", "writer": "0", "validation": [],
        }
        for record in records
    ]
    dump_lines(Path(directory) / f"{split}.json", lines)
    write_pictures(Path(directory) / "images", images)


def _url(name: str) -> str:
    return f"http://images.scenes.test/{name}"
