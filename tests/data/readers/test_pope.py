"""POPE's files as published."""

import json

import pytest

from vlmpipe.data.readers.pope import read_pope
from vlmpipe.errors import UserError

LINE = {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard in the image?",
        "label": "yes"}


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_strategy_is_in_the_files_name(tmp_path):
    write(tmp_path / "coco_pope_random.json", LINE, LINE | {"question_id": 2, "label": "no"})
    write(tmp_path / "coco_pope_adversarial.json", LINE)
    write(tmp_path / "instances_val.json", {"images": []})
    records = read_pope(tmp_path)
    assert [record.id for record in records] == ["adversarial-1", "random-1", "random-2"]
    assert records[2].answers == ("no",) and records[2].slices == {"strategy": "random"}
    assert records[0].images == ("COCO_val2014_000000310196.jpg",)
    assert len(read_pope(tmp_path / "coco_pope_random.json")) == 2


@pytest.mark.parametrize(("edit", "said"), [
    ({"label": "maybe"}, r"line 1\.label: found str 'maybe'; expected yes or no"),
    ({"text": None}, r"line 1\.text: found nothing"),
    ({"question_id": []}, r"line 1\.question_id: found list"),
])
def test_bad_lines_are_named(tmp_path, edit, said):
    write(tmp_path / "a_pope_random.json", LINE | edit)
    with pytest.raises(UserError, match=said):
        read_pope(tmp_path)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="found 0 questions"):
        read_pope(tmp_path)
