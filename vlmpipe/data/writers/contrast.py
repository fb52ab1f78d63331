"""SugarCrepe: a file a kind of swap. Winoground: a line a pair of pictures."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from vlmpipe.data.pictures import write_pictures
from vlmpipe.data.records import ContrastRecord
from vlmpipe.data.writers.coco import Named
from vlmpipe.data.writers.files import dump, dump_lines


def write_sugarcrepe(directory: Path, records: Sequence[ContrastRecord], images: Named) -> None:
    """Records with a `swap` slice and one false sentence each, numbered within their kind of swap."""
    files: dict[str, dict[str, dict]] = defaultdict(dict)
    for record in records:
        entries = files[record.slices["swap"]]
        entries[str(len(entries))] = {
            "filename": record.image, "caption": record.caption, "negative_caption": record.false[0],
        }
    for swap, entries in files.items():
        dump(Path(directory) / f"{swap}.json", entries)
    write_pictures(Path(directory) / "images", images)


def write_winoground(directory: Path, records: Sequence[ContrastRecord], images: Named) -> None:
    """Records that come two a group, with whole numbers as groups and a `swap` slice."""
    pairs = list(zip(records[::2], records[1::2], strict=True))
    assert all(first.group == second.group for first, second in pairs), "the two of a group stand together"
    lines = [
        {
            "id": int(first.group), "image_0": first.image, "image_1": second.image, "caption_0": first.caption,
            "caption_1": second.caption, "tag": first.slices["swap"], "secondary_tag": "", "num_main_preds": 1,
            "collapsed_tag": first.slices["swap"],
        }
        for first, second in pairs
    ]
    dump_lines(Path(directory) / "examples.jsonl", lines)
    write_pictures(Path(directory) / "images", images)
