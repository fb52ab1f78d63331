"""VizWiz in its current list and in the two files of its first release."""

import json
import os
from pathlib import Path

import pytest

from vlmpipe.data.readers.vizwiz import read_vizwiz
from vlmpipe.errors import UserError

SHARED = Path(__file__).parents[4] / "shared/data/vqa-annotations"
ANSWERS = [{"answer": "unanswerable", "answer_confidence": "yes"}, {"answer": "blank", "answer_confidence": "maybe"}]
ROW = {"image": "VizWiz_val_00000000.jpg", "question": "What is this?", "answers": ANSWERS, "answerable": 0,
       "answer_type": "unanswerable"}


def write(folder, rows):
    (folder / "val.json").write_text(json.dumps(rows))
    return folder


def test_answers_confidences_and_what_cannot_be_answered(tmp_path):
    row = ROW | {"image": "VizWiz_val_00000001.jpg", "answerable": 1, "answer_type": "other"}
    first, second = read_vizwiz(write(tmp_path, [ROW, row]))
    assert first.answers == ("unanswerable", "blank") and first.confidences == ("yes", "maybe")
    assert (first.answerable, second.answerable) == (False, True)
    assert (first.id, first.images) == ("VizWiz_val_00000000", ("VizWiz_val_00000000.jpg",))
    assert second.slices == {"answer_type": "other"}


def test_the_test_split_has_no_answers(tmp_path):
    record, = read_vizwiz(write(tmp_path, [{"image": "VizWiz_test_1.jpg", "question": "What?"}]))
    assert (record.answers, record.answerable, record.confidences, record.slices) == ((), None, (), {})


@pytest.mark.parametrize(("rows", "said"), [
    ([ROW, ROW], r"\[1\]\.image: found VizWiz_val_00000000\.jpg a second time"),
    ([ROW | {"answers": [{"answer_confidence": "no"}]}], r"\[0\]\.answers\[0\]\.answer: found nothing"),
    ([ROW | {"answerable": "0"}], r"\[0\]\.answerable: found str '0'; expected int or bool"),
    ({"questions": []}, "found no list of objects"),
])
def test_bad_files_are_named(tmp_path, rows, said):
    with pytest.raises(UserError, match=said):
        read_vizwiz(write(tmp_path, rows))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the published VizWiz annotations in {os.path.relpath(SHARED)}")
def test_vizwiz_as_published():
    records = read_vizwiz(SHARED)
    assert len(records) == 4319
    assert all(len(record.answers) == len(record.confidences) == 10 for record in records)
    assert {sure for record in records for sure in record.confidences} == {"yes", "maybe", "no"}
    assert records[0].answerable is False and records[1].answerable is True
    assert {record.slices["answer_type"] for record in records} == {"unanswerable", "other", "yes/no", "number"}
