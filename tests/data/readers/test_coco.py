"""COCO captions and instances in the official layout."""

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest

from vlmpipe.data.masks import Polygons, Rle
from vlmpipe.data.readers import coco
from vlmpipe.data.readers.coco import read_coco_captions, read_coco_instances
from vlmpipe.data.records import CaptionRecord
from vlmpipe.errors import UserError

SHARED = Path(__file__).parents[4] / "shared/data/captions/coco_captions_val2017.json"
IMAGES = [{"id": 9, "file_name": "000000000009.jpg", "width": 6, "height": 4, "license": 3},
          {"id": 25, "file_name": "000000000025.jpg", "width": 5, "height": 5}]
CAPTIONS = {
    "images": IMAGES,
    "annotations": [
        {"id": 1, "image_id": 25, "caption": "A giraffe. "}, {"id": 2, "image_id": 9, "caption": "Two trays"},
        {"id": 3, "image_id": 25, "caption": "A tall animal\n"},
    ],
}
INSTANCES = {
    "images": IMAGES,
    "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person", "supercategory": "person"}],
    "annotations": [
        {"id": 1, "image_id": 9, "category_id": 90, "iscrowd": 0, "area": 4, "bbox": [1, 1, 2.5, 2],
         "segmentation": [[1, 1, 3, 1, 3, 3, 1, 3]]},
        {"id": 2, "image_id": 9, "category_id": 1, "iscrowd": 1, "area": 5, "bbox": [0, 0, 6, 4],
         "segmentation": {"size": [4, 6], "counts": [3, 5, 16]}},
        {"id": 3, "image_id": 9, "category_id": 1, "iscrowd": 0, "area": 5, "bbox": [0, 0, 0, 4],
         "segmentation": {"size": [4, 6], "counts": "35`0"}},
        {"id": 4, "image_id": 9, "category_id": 1, "bbox": [0, 0, 1, 1]},
    ],
}


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content))
    return folder


def test_all_captions_of_a_picture_come_together(tmp_path):
    records = read_coco_captions(write(tmp_path, "captions_val2017.json", CAPTIONS))
    assert records == [
        CaptionRecord("9", ("000000000009.jpg",), ("Two trays",)),
        CaptionRecord("25", ("000000000025.jpg",), ("A giraffe.", "A tall animal")),
    ]
    assert read_coco_captions(tmp_path / "captions_val2017.json") == records


def test_instances(tmp_path):
    first, second = read_coco_instances(write(tmp_path, "instances_val2017.json", INSTANCES))
    assert first.boxes.dtype == np.float32
    assert first.boxes.tolist() == [[1, 1, 3.5, 3], [0, 0, 6, 4], [0, 0, 0, 4], [0, 0, 1, 1]]
    assert first.labels == ("toothbrush", "person", "person", "person") and first.size == (6, 4)
    assert first.crowd.tolist() == [False, True, False, False]
    outline, plain, compressed, nothing = first.masks
    assert outline == Polygons(4, 6, ((1.0, 1.0, 3.0, 1.0, 3.0, 3.0, 1.0, 3.0),)) and outline.area == 4
    assert plain == compressed == Rle.of_runs(4, 6, [3, 5, 16]) and nothing is None
    down_the_columns = np.zeros((4, 6), bool)
    down_the_columns[3, 0] = down_the_columns[:, 1] = True
    assert (plain.pixels() == down_the_columns).all()
    assert second.boxes.shape == (0, 4) and second.labels == () and second.crowd.shape == (0,)


@pytest.mark.parametrize(("edit", "said"), [
    (lambda c: c["annotations"][0].update(image_id=7), r"annotations\[0\]\.image_id: found int 7; expected one of"),
    (lambda c: c["annotations"][1].update(category_id=2), r"annotations\[1\]\.category_id: found int 2"),
    (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"annotations\[0\]\.bbox: found \[1, 2, 3\]; expected 4"),
    (lambda c: c["annotations"][0].update(bbox=[1, 2, -3, 1]), r"bbox: .*negative"),
    (lambda c: c["annotations"][0].update(bbox=[1, 2, float("nan"), 1]), r"bbox: found .*nan"),
    (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4]]), r"segmentation: found \[1, 2, 3, 4\]"),
    (lambda c: c["annotations"][0].update(segmentation=[[1, 1, 1e12, 1, 3, 3]]),
     r"annotations\[0\]\.segmentation: found 1e\+12; expected x from -6 to 12, in or near the picture"),
    (lambda c: c["annotations"][0].update(segmentation=[[1, -4, 3, 1, 3, -5]]), r"found -5; expected y from -4 to 8"),
    (lambda c: c["annotations"][0].update(segmentation=[[1, 1, 10**300, 1, 3, 3]]), r"found 1e\+300; expected x"),
    (lambda c: c["annotations"][0].update(segmentation=[[1, 1, 10**400, 1, 3, 3]]), r"segmentation: found \[1, 1, 10"),
    (lambda c: c["annotations"][1]["segmentation"].update(size=[6, 4]), r"segmentation\.size: .*expected \[4, 6\]"),
    (lambda c: c["annotations"][1]["segmentation"].update(counts=[3, 5]), r"counts: found runs of 8 pixels"),
    (lambda c: c["annotations"][2]["segmentation"].update(counts="35`"), r"segmentation\.counts: found .* break off"),
    (lambda c: c["annotations"][2]["segmentation"].update(counts="é"), r"segmentation\.counts: found characters"),
    (lambda c: c["images"][0].update(width=0), r"images\[0\]\.width: found 0 x 4"),
    (lambda c: c["images"][0].update(width=10**6, height=10**6), r"images\[0\]\.width: .*at most"),
    (lambda c: c["images"].append(c["images"][0]), r"images\[2\]\.id: found 9 a second time"),
    (lambda c: c.pop("categories"), "found no list 'categories'"),
    (lambda c: c["images"].clear() or c["annotations"].clear(), "found 0 pictures"),
])
def test_bad_files_are_named_with_the_field(tmp_path, edit, said):
    content = copy.deepcopy(INSTANCES)
    edit(content)
    with pytest.raises(UserError, match=said):
        read_coco_instances(write(tmp_path, "instances.json", content))


def test_an_outline_may_leave_the_picture_but_not_go_on_for_ever(tmp_path, monkeypatch):
    content = copy.deepcopy(INSTANCES)
    content["annotations"][0]["segmentation"] = [[-6, -4, 12, -4, 12, 8, -6, 8]]  # 18 + 12 + 18 + 12 pixels
    path = write(tmp_path, "instances.json", content)
    assert read_coco_instances(path)[0].masks[0].area == 24
    monkeypatch.setattr(coco, "WALK", 60)
    assert read_coco_instances(path)[0].masks[0].area == 24
    monkeypatch.setattr(coco, "WALK", 59)
    with pytest.raises(UserError, match=r"\[0\]\.segmentation: found one of 60; expected outlines of at most 59"):
        read_coco_instances(path)


def test_which_file_must_be_clear(tmp_path):
    with pytest.raises(UserError, match="found 0 files"):
        read_coco_captions(tmp_path)
    write(write(tmp_path, "captions_val2017.json", CAPTIONS), "captions_train2017.json", CAPTIONS)
    with pytest.raises(UserError, match=r"found 2 files .*captions_train2017\.json, captions_val2017\.json"):
        read_coco_captions(tmp_path)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '["a"]', "\xff"])
def test_what_is_no_annotation_file_is_one_line(tmp_path, text):
    (tmp_path / "captions.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"captions\.json: found ") as caught:
        read_coco_captions(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.skipif(not SHARED.is_file(), reason=f"needs the published COCO captions in {os.path.relpath(SHARED)}")
def test_coco_as_published():
    records = read_coco_captions(SHARED)
    assert len(records) == 5000 and sum(len(record.captions) for record in records) == 25_014
    assert {len(record.captions) for record in records} == {5, 6, 7}
    assert all(caption for record in records for caption in record.captions)
    assert records[0].images == ("000000397133.jpg",) and records[0].id == "397133"
