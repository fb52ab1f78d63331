"""Karpathy's splits of COCO, Flickr30k and Flickr8k, by which image-text retrieval is published.

Format: https://cs.stanford.edu/people/karpathy/deepimagesent (dataset_coco.json, dataset_flickr30k.json): one json with
`images`, each with its `split`, `filename` and `sentences`.
"""

from pathlib import Path

from vlmpipe.data.fields import Entry, entries, filled, find, unique
from vlmpipe.data.records import CaptionRecord
from vlmpipe.errors import UserError

# What is trained on has `restval` too, as published models do.
SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
CAPTIONS = 5  # of a picture; the protocol leaves out the few that COCO has beyond


def read_karpathy(path: Path, split: str | None = None) -> list[CaptionRecord]:
    """One record a picture of a split with its first five sentences.

    Args:
        split: train, val or test; None: what the directory is called, into which the one file is put or linked.

    Raises:
        UserError: a file or field is missing or wrong, or no such split.
    """
    chosen = split or Path(path).absolute().name
    if chosen not in SPLITS:
        raise UserError(f"{path}: found the split '{chosen}'; expected one of {', '.join(SPLITS)}; put the file into a "
                        f"directory of that name, or name the split")
    file, seen = find(path, "dataset_*.json"), set()
    records = [
        _record(entry, seen) for entry in entries(file, "images") if entry.field("split", str) in SPLITS[chosen]
    ]
    return filled(records, file, f"pictures of the split {chosen}")


def _record(entry: Entry, seen: set[str]) -> CaptionRecord:
    said = [sentence.field("raw", str).strip() for sentence in entry.objects("sentences")]
    return CaptionRecord(unique(entry, seen, "imgid"), (entry.field("filename", str),), tuple(said[:CAPTIONS]))
