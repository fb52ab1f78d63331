"""COCO captions, COCO instances, and RefCOCO, whose things are COCO's."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vlmpipe.data.masks import Mask, Polygons
from vlmpipe.data.pictures import write_pictures
from vlmpipe.data.records import Box, CaptionRecord, DetectionRecord, RegionRecord
from vlmpipe.data.writers.files import dump

Named = Iterable[tuple[str, bytes]]
HEAD = {"info": {"description": "vlmpipe", "version": "1.0"}, "licenses": []}


def write_coco_captions(
    directory: Path, records: Sequence[CaptionRecord], images: Named, size: tuple[int, int], split: str
) -> None:
    """Records with whole-number ids; `size`: (width, height) of all pictures."""
    said = [(record, caption) for record in records for caption in record.captions]
    annotations = [
        {"id": number, "image_id": int(record.id), "caption": caption}
        for number, (record, caption) in enumerate(said, 1)
    ]
    listed = [_image(record.id, record.images[0], size) for record in records]
    dump(Path(directory) / f"captions_{split}.json", HEAD | {"images": listed, "annotations": annotations})
    write_pictures(Path(directory) / "images", images)


def write_coco_instances(
    directory: Path, records: Sequence[DetectionRecord], images: Named, categories: Sequence[str], split: str
) -> None:
    """Records with whole-number ids; crowds must have run lengths, as in the published files."""
    numbers = {name: number for number, name in enumerate(categories, 1)}
    things = [
        (record, box, label, crowd, mask) for record in records
        for box, label, crowd, mask in zip(record.boxes.tolist(), record.labels, record.crowd, record.masks)
    ]
    annotations = [
        _annotation(number, record.id, tuple(box), numbers[label], mask) | {"iscrowd": int(crowd)}
        for number, (record, box, label, crowd, mask) in enumerate(things, 1)
    ]
    listed = [_image(record.id, record.image, record.size) for record in records]
    dump(Path(directory) / f"instances_{split}.json", _instances(listed, annotations, numbers))
    write_pictures(Path(directory) / "images", images)


def write_refcoco(
    directory: Path, records: Sequence[RegionRecord], images: Named, categories: Sequence[str], split: str
) -> None:
    """Expressions as json, things as instances.json. Pictures are numbered in the order in which they come."""
    numbers = {name: number for number, name in enumerate(categories, 1)}
    image_ids = {name: number for number, name in enumerate(dict.fromkeys(record.image for record in records), 1)}
    sizes = {record.image: record.size for record in records}
    annotations = [
        _annotation(number, str(image_ids[record.image]), record.box, numbers[record.label], record.mask)
        | {"iscrowd": 0} for number, record in enumerate(records, 1)
    ]
    listed = [_image(str(number), name, sizes[name]) for name, number in image_ids.items()]
    dump(Path(directory) / "instances.json", _instances(listed, annotations, numbers))
    dump(Path(directory) / f"refs({split}).json", _refs(records, annotations, split))
    write_pictures(Path(directory) / "images", images)


def _refs(records: Sequence[RegionRecord], annotations: Sequence[dict], split: str) -> list[dict]:
    refs, sent_id = [], 0
    for record, annotation in zip(records, annotations):
        sentences = [
            {"sent_id": sent_id + i, "sent": said, "raw": said, "tokens": said.split()}
            for i, said in enumerate(record.expressions)
        ]
        sent_id += len(sentences)
        stem, _, suffix = record.image.rpartition(".")
        refs.append({
            "ref_id": int(record.id), "ann_id": annotation["id"], "image_id": annotation["image_id"],
            "category_id": annotation["category_id"], "split": split, "sentences": sentences,
            "sent_ids": [sentence["sent_id"] for sentence in sentences],
            "file_name": f"{stem}_{annotation['id']}.{suffix}",  # as published: not the picture's own name
        })
    return refs


def _image(image_id: str, name: str, size: tuple[int, int]) -> dict:
    return {"id": int(image_id), "file_name": name, "width": size[0], "height": size[1], "license": 0}


def _instances(images: list[dict], annotations: list[dict], numbers: Mapping[str, int]) -> dict:
    categories = [
        {"id": number, "name": name, "supercategory": name.split()[-1]} for name, number in numbers.items()
    ]
    return HEAD | {"images": images, "annotations": annotations, "categories": categories}


def _annotation(number: int, image_id: str, box: Box, category: int, mask: Mask | None) -> dict:
    left, top, right, bottom = box
    return {
        "id": number, "image_id": int(image_id), "category_id": category, "area": mask.area if mask else 0,
        "bbox": [round(value, 2) for value in (left, top, right - left, bottom - top)],
        "segmentation": _segmentation(mask),
    }


def _segmentation(mask: Mask | None) -> list | dict:
    if mask is None:
        return []
    if isinstance(mask, Polygons):
        return [list(outline) for outline in mask.outlines]
    return {"size": [mask.height, mask.width], "counts": mask.runs.tolist()}
