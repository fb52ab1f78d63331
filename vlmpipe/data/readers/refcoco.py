"""RefCOCO, RefCOCO+ and RefCOCOg: expressions that each name one thing in a COCO picture.

Format: https://github.com/lichengunc/refer: instances.json in COCO's layout, and the expressions as a list of objects.
That list is published as a pickle, refs(unc).p. A pickle is a program, so it is never unpickled here: `plain_pickle`
reads one that only builds lists, dicts, numbers and text, as the published ones do, and refuses any other. The list as
json or parquet, with the same field names, is read too. In RefCOCO+ and RefCOCOg all is alike.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vlmpipe.data.fields import Entry, filled, find, found_files, listed, load, unique
from vlmpipe.data.readers.coco import box_of, mask_of, size_of
from vlmpipe.data.readers.plain_pickle import read_plain_pickle
from vlmpipe.data.records import RegionRecord
from vlmpipe.errors import UserError

REFS = ("refs*.json", "refs*.parquet", "refs*.p")


def read_refcoco(directory: Path, split: str | None = None, refs: Path | None = None) -> list[RegionRecord]:
    """One record a thing with all its expressions; boxes and masks from instances.json.

    `split`: only that one ("train", "val", "testA", ...). `refs`: the file of expressions where there are several.

    Raises:
        UserError: a file or field is missing or wrong, a ref points nowhere, no ref is of the split, or the pickle
            does more than build data.
    """
    file, instances = _refs_file(refs or directory), find(directory, "instances.json")
    content = load(instances)
    images = {entry.name("id"): entry for entry in listed(content, instances, "images")}
    annotations = {entry.name("id"): entry for entry in listed(content, instances, "annotations")}
    names = {entry.name("id"): entry.field("name", str) for entry in listed(content, instances, "categories")}
    seen: set[str] = set()
    found = [entry for entry in _refs(file) if split is None or entry.field("split", str) == split]
    records = [_region(entry, seen, images, annotations, names) for entry in found]
    return filled(records, file, f"expressions of split '{split}'" if split else "expressions")


def _refs_file(path: Path) -> Path:
    """What was converted goes before what it was converted from."""
    return find(path, next((pattern for pattern in REFS if found_files(path, pattern)), REFS[0]))


def _refs(file: Path) -> Iterator[Entry]:
    if file.suffix == ".parquet":
        try:
            return listed(pq.read_table(file).to_pylist(), file)
        except (pa.ArrowInvalid, OSError) as error:
            why = str(error).splitlines()[0]
            raise UserError(f"{file}: found damaged parquet ({why}); expected refs; restore the file") from None
    return listed(read_plain_pickle(file) if file.suffix == ".p" else load(file), file)


def _region(
    entry: Entry, seen: set[str], images: Mapping[str, Entry], annotations: Mapping[str, Entry],
    names: Mapping[str, str],
) -> RegionRecord:
    """The ref's own `file_name` ends in the annotation's number and is no file's name; instances.json has that."""
    annotation = _pointed(entry, "ann_id", annotations)
    image = _pointed(annotation, "image_id", images)
    if entry.name("image_id") != image.name("id"):
        raise entry.wrong("image_id", f"{image.name('id')}, the picture of its annotation")
    size = size_of(image)
    return RegionRecord(
        unique(entry, seen, "ref_id"), image.field("file_name", str), size,
        tuple(sentence.field("sent", str) for sentence in entry.objects("sentences")),
        box_of(annotation), mask_of(annotation, size), names.get(annotation.name("category_id"), ""),
    )


def _pointed(entry: Entry, name: str, known: Mapping[str, Entry]) -> Entry:
    if entry.name(name) not in known:
        raise entry.wrong(name, f"one of {len(known)} in instances.json")
    return known[entry.name(name)]
