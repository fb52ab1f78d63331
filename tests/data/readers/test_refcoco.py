"""RefCOCO: expressions joined to their things, as json, as parquet, and as a pickle that is never unpickled."""

import copy
import json
import os
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlmpipe.data.masks import Polygons
from vlmpipe.data.readers.refcoco import read_refcoco
from vlmpipe.errors import UserError

INSTANCES = {
    "images": [{"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "width": 64, "height": 48}],
    "annotations": [
        {"id": 1719310, "image_id": 581857, "category_id": 1, "bbox": [1.5, 2, 10, 20], "iscrowd": 0,
         "segmentation": [[2, 2, 11, 2, 11, 21]]},
        {"id": 7, "image_id": 581857, "category_id": 1, "bbox": [0, 0, 1, 1], "segmentation": []},
    ],
    "categories": [{"id": 1, "name": "person", "supercategory": "person"}],
}
REFS = [
    {"sent_ids": [0, 1], "file_name": "COCO_train2014_000000581857_16.jpg", "ann_id": 1719310, "ref_id": 0,
     "image_id": 581857, "split": "train", "category_id": 1, "sentences": [
         {"tokens": ["the", "lady"], "raw": "THE LADY", "sent_id": 0, "sent": "the lady"},
         {"tokens": ["left"], "raw": "left", "sent_id": 1, "sent": "left"}]},
    {"sent_ids": [2], "file_name": "x_7.jpg", "ann_id": 7, "ref_id": 1, "image_id": 581857, "split": "testA",
     "category_id": 1, "sentences": [{"tokens": ["spot"], "raw": "spot", "sent_id": 2, "sent": "spot"}]},
]


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "instances.json").write_text(json.dumps(INSTANCES))
    return tmp_path


def test_expressions_of_a_thing_come_together(directory):
    (directory / "refs(unc).json").write_text(json.dumps(REFS))
    first, second = read_refcoco(directory)
    assert first.image == "COCO_train2014_000000581857.jpg" and first.size == (64, 48)  # not the ref's own file_name
    assert first.expressions == ("the lady", "left") and first.box == (1.5, 2, 11.5, 22) and first.label == "person"
    assert first.mask == Polygons(48, 64, ((2.0, 2.0, 11.0, 2.0, 11.0, 21.0),)) and second.mask is None
    assert [record.id for record in read_refcoco(directory, split="testA")] == ["1"]
    with pytest.raises(UserError, match="found 0 expressions of split 'val'"):
        read_refcoco(directory, split="val")


def test_parquet_and_pickle_say_the_same(directory):
    (directory / "refs(unc).json").write_text(json.dumps(REFS))
    expected = read_refcoco(directory)
    (directory / "refs(unc).json").unlink()
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (directory / "refs(unc).p").write_bytes(pickle.dumps(REFS, protocol))
        assert read_refcoco(directory) == expected, protocol
    pq.write_table(pa.Table.from_pylist(REFS), directory / "refs.parquet")
    assert read_refcoco(directory) == expected  # what was converted goes before what it was converted from
    assert read_refcoco(directory, refs=directory / "refs(unc).p") == expected


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_does_anything_is_refused_and_does_nothing(directory, protocol, monkeypatch):
    monkeypatch.chdir(directory)
    (directory / "refs(unc).p").write_bytes(pickle.dumps([Harmful()], protocol))
    with pytest.raises(UserError, match=r"found the operation \w+ in it; .*convert it to json"):
        read_refcoco(directory)
    assert not (directory / "harm").exists()


@pytest.mark.parametrize("data", [b"", b"garbage", b"]q\x00(K\x01e", b"K\x01a.", b"h\x05.", b"(l}s.", b"."])
def test_a_damaged_pickle_is_one_line(directory, data):
    (directory / "refs(unc).p").write_bytes(data)
    with pytest.raises(UserError, match=r"refs\(unc\)\.p: found ") as caught:
        read_refcoco(directory)
    assert "\n" not in str(caught.value)


def doubled(levels):
    """A list of two references to a list of two references to ...: small in memory, 2 ** levels values to look at."""
    nest = []
    for _ in range(levels):
        nest = [nest, nest]
    return nest


def in_itself():
    nest = []
    nest.append({"a": nest})
    return nest


@pytest.mark.parametrize(("data", "said"), [
    (pickle.dumps([{"ref_id": doubled(45)}]), r"repetitions that make more than \d+ values"),
    (pickle.dumps(doubled(100)), "repetitions that make more than"),
    (pickle.dumps(in_itself()), "a value that holds itself"),
    (b"N" + b"\x85" * 100_000 + b".", "more than 50 levels of nesting"),
    (b"]" * 100_000 + b"a" * 99_999 + b".", "more than 50 levels of nesting"),
    (b"}N" + b"\x85" * 100_000 + b"K\x01s.", "a key that is no text or number"),
    (b"}N" + b"q\x00h\x00\x86" * 60 + b"K\x01s.", "a key that is no text or number"),
], ids=["in a field", "whole", "in itself", "tuples", "lists", "deep key", "wide key"])
def test_a_small_pickle_does_not_become_a_large_one(directory, data, said):
    (directory / "refs(unc).p").write_bytes(data)
    with pytest.raises(UserError, match=rf"refs\(unc\)\.p: found {said}"):
        read_refcoco(directory)


def test_a_pickle_may_repeat_itself(directory):
    sentences = [{"sent": "spot"}]
    refs = [{**REFS[0], "ref_id": number, "sentences": sentences} for number in range(5)]
    (directory / "refs(unc).p").write_bytes(pickle.dumps(refs))
    assert [record.expressions for record in read_refcoco(directory)] == [("spot",)] * 5


def test_what_python_2_wrote(directory):
    """The published files: protocol 0, byte strings, memoised."""
    (directory / "refs(unc).p").write_bytes(
        b"(lp0\n(dp1\nS'ref_id'\np2\nI0\nsS'ann_id'\np3\nI7\nsS'image_id'\np4\nI581857\nsS'split'\np5\nS'val'\np6\ns"
        b"S'sentences'\np7\n(lp8\n(dp9\nS'sent'\np10\nS'spot'\np11\nsasa."
    )
    record, = read_refcoco(directory)
    assert (record.id, record.expressions) == ("0", ("spot",))


@pytest.mark.parametrize(("edit", "said"), [
    (lambda refs: refs[0].update(ann_id=3), r"\[0\]\.ann_id: found int 3; expected one of 2 in instances\.json"),
    (lambda refs: refs[1].update(image_id=3), r"\[1\]\.image_id: found int 3; expected 581857"),
    (lambda refs: refs[1].update(ref_id=0), r"\[1\]\.ref_id: found 0 a second time"),
    (lambda refs: refs[0]["sentences"][1].pop("sent"), r"\[0\]\.sentences\[1\]\.sent: found nothing"),
])
def test_refs_that_point_nowhere_are_named(directory, edit, said):
    refs = copy.deepcopy(REFS)
    edit(refs)
    (directory / "refs.json").write_text(json.dumps(refs))
    with pytest.raises(UserError, match=said):
        read_refcoco(directory)
