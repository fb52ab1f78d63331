"""NLVR2 and Cornell NLVR: pairs, labels, and the groups that consistency counts by."""

import json
import os
from collections import defaultdict
from pathlib import Path

import pytest

from vlmpipe.data.pictures import pictures
from vlmpipe.data.readers.nlvr import read_nlvr, read_nlvr2
from vlmpipe.errors import UserError

SHARED = Path(__file__).parents[4] / "shared/data/nlvr"
LINE = {"validation": {"w": "True"}, "writer": 1, "sentence": "One image shows two dogs.", "label": "True",
        "identifier": "dev-850-0-0", "left_url": "http://a/1.jpg", "right_url": "http://a/2.jpg", "synset": "dog",
        "query": "two dogs3"}


def write(path, *lines):
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


def test_pairs_and_groups(tmp_path):
    path = write(
        tmp_path / "dev.json", LINE, LINE | {"identifier": "dev-850-1-0", "label": "False"},
        LINE | {"identifier": "dev-850-1-1", "sentence": "Another one."}, LINE | {"identifier": "test1-850-0-0"},
    )
    records = read_nlvr2(path)
    assert records[0].images == ("dev-850-0-img0.png", "dev-850-0-img1.png")
    assert [record.label for record in records] == [True, False, True, True]
    assert [record.group for record in records] == ["dev-850-0", "dev-850-0", "dev-850-1", "test1-850-0"]
    assert records[0].slices == {"split": "dev", "synset": "dog"}


def test_a_hidden_split_has_no_labels(tmp_path):
    assert read_nlvr2(write(tmp_path / "test2.json", {k: v for k, v in LINE.items() if k != "label"}))[0].label is None


@pytest.mark.parametrize(("edit", "said"), [
    ({"label": "maybe"}, r"line 1\.label: found str 'maybe'; expected true or false"),
    ({"identifier": "dev-850"}, r"line 1\.identifier: found str 'dev-850'; expected split-set-pair-sentence"),
    ({"sentence": None}, r"line 1\.sentence: found nothing"),
])
def test_bad_lines_are_named(tmp_path, edit, said):
    with pytest.raises(UserError, match=said):
        read_nlvr2(write(tmp_path / "dev.json", LINE | edit))


def test_an_identifier_stands_once(tmp_path):
    with pytest.raises(UserError, match=r"line 2\.identifier: found dev-850-0-0 a second time"):
        read_nlvr2(write(tmp_path / "dev.json", LINE, LINE))


def test_cornell_lines_stand_for_six_pictures(tmp_path):
    line = {"sentence": "There is a tower.", "label": "true", "identifier": "3125-1", "directory": "0"}
    records = read_nlvr(write(tmp_path / "dev.json", line))
    assert [record.images for record in records] == [(f"dev-3125-1-{i}.png",) for i in range(6)]
    assert {record.group for record in records} == {"3125"} and len({record.id for record in records}) == 6


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the Cornell NLVR development set in {os.path.relpath(SHARED)}")
def test_cornell_as_published():
    records, found = read_nlvr(SHARED), pictures(SHARED / "images")
    assert len(records) == len(found) == 989
    assert all(record.images[0] in found for record in records)
    groups = defaultdict(set)
    for record in records:
        groups[record.group].add(record.sentence)
    assert all(len(sentences) == 1 for sentences in groups.values())
    assert 0.4 < sum(bool(record.label) for record in records) / 989 < 0.6
