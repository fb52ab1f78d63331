"""Karpathy's splits: the published fields, five sentences a picture, one split at a time."""

import json

import pytest

from vlmpipe.data.readers.karpathy import read_karpathy
from vlmpipe.data.records import CaptionRecord
from vlmpipe.errors import UserError


def picture(number, split, sentences=5):
    return {
        "filepath": "val2014", "filename": f"COCO_val2014_{number:012d}.jpg", "imgid": number, "cocoid": number + 100,
        "split": split, "sentids": list(range(sentences)),
        "sentences": [{"tokens": ["a"], "raw": f"A {number} {at}. ", "imgid": number, "sentid": at}
                      for at in range(sentences)],
    }


def write(directory, pictures):
    directory.mkdir()
    (directory / "dataset_coco.json").write_text(json.dumps({"images": pictures, "dataset": "coco"}))
    return directory


def test_a_split_is_read_by_the_directorys_name_with_five_sentences(tmp_path):
    pictures = [picture(0, "test", 7), picture(1, "val"), picture(2, "restval"), picture(3, "train"),
                picture(4, "test")]
    found = read_karpathy(write(tmp_path / "test", pictures))
    assert found == [
        CaptionRecord(str(at), (f"COCO_val2014_{at:012d}.jpg",), tuple(f"A {at} {said}." for said in range(5)))
        for at in (0, 4)
    ]
    file = tmp_path / "test" / "dataset_coco.json"
    assert [record.id for record in read_karpathy(file, "train")] == ["2", "3"]
    assert [record.id for record in read_karpathy(file, "val")] == ["1"]


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="split 'some'; expected one of train, val, test"):
        read_karpathy(write(tmp_path / "some", [picture(0, "test")]))
    with pytest.raises(UserError, match="0 pictures of the split test"):
        read_karpathy(write(tmp_path / "test", [picture(0, "val")]))
    broken = picture(0, "val")
    del broken["sentences"][1]["raw"]
    with pytest.raises(UserError, match=r"images\[0\]\.sentences\[1\]\.raw"):
        read_karpathy(write(tmp_path / "val", [broken]))
