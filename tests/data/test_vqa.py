"""The official VQA files, written here and published by others."""

import json
import os
from pathlib import Path

import pytest

from vlmpipe.data.vqa import VqaExample, read_vqa, vqa_images, write_vqa
from vlmpipe.errors import UserError

SHARED = Path(__file__).parents[3] / "shared/data/vqa-annotations"
EXAMPLES = [
    VqaExample(10, 1, "How many shapes are there?", ("2",) * 10, "number", "count"),
    VqaExample(11, 2, "Is there a red star?", ("yes",) * 10, "yes/no", "presence"),
]


@pytest.fixture
def directory(tmp_path):
    write_vqa(tmp_path, EXAMPLES, [(1, b"one"), (2, b"two")], "train")
    return tmp_path


def test_what_is_written_is_read(directory):
    assert read_vqa(directory) == EXAMPLES
    images = vqa_images(directory)
    assert (images[1], images["2"], len(images)) == (b"one", b"two", 2)


def test_the_files_have_the_official_fields(directory):
    annotation = json.loads((directory / "annotations.json").read_text())["annotations"][0]
    assert annotation["multiple_choice_answer"] == "2" and annotation["answer_type"] == "number"
    assert [answer["answer_id"] for answer in annotation["answers"]] == list(range(1, 11))
    assert {"answer", "answer_confidence", "answer_id"} == set(annotation["answers"][0])
    questions = json.loads((directory / "questions.json").read_text())
    assert questions["task_type"] == "Open-Ended"
    assert questions["questions"][0] == {"image_id": 1, "question": "How many shapes are there?", "question_id": 10}


def test_one_answer_stands_for_ten_equal_ones(tmp_path):
    write_vqa(tmp_path, [VqaExample(1, 1, "What?", ("star",), "other", "")], [(1, b"one")], "test")
    assert read_vqa(tmp_path)[0].answers == ("star",) * 10


def test_same_examples_same_bytes(directory, tmp_path_factory):
    again = tmp_path_factory.mktemp("again")
    write_vqa(again, EXAMPLES, [(1, b"one"), (2, b"two")], "train")
    files = [path.relative_to(directory) for path in sorted(directory.rglob("*")) if path.is_file()]
    assert len(files) == 5
    assert all((again / name).read_bytes() == (directory / name).read_bytes() for name in files)


def test_a_plain_folder_finds_coco_numbers_and_names(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "COCO_val2014_000000262148.jpg").write_bytes(b"coco")
    (folder / "VizWiz_val_00000000.jpg").write_bytes(b"vizwiz")
    images = vqa_images(tmp_path)
    assert images[262148] == b"coco"
    assert images["VizWiz_val_00000000.jpg"] == images[0] == b"vizwiz"


@pytest.mark.parametrize(("kind", "edit", "said"), [
    ("questions", lambda q: q[1].pop("question"), r"questions\[1\]\.question: found nothing"),
    ("questions", lambda q: q[0].update(question_id="10"), r"question_id: found str '10'; expected int"),
    ("questions", lambda q: q.clear(), "found 0 questions"),
    ("annotations", lambda a: a.pop(), "no annotation for question_id 11"),
    ("annotations", lambda a: a[0].update(image_id=7), r"annotations\[0\]\.image_id: found int 7; expected 1"),
    ("annotations", lambda a: a[0]["answers"][3].pop("answer"), r"answers\[3\]\.answer: found nothing"),
    ("annotations", lambda a: a.append(a[0]), "question_id: found 10 a second time"),
    ("annotations", lambda a: a[1].update(answers=[]), r"annotations\[1\]\.answers: found no answers"),
])
def test_bad_files_are_named_with_the_field(directory, kind, edit, said):
    file = directory / f"{kind}.json"
    content = json.loads(file.read_text())
    edit(content[kind])
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        read_vqa(directory)


def test_another_layout_is_named(directory):
    (directory / "questions.json").write_text("[]")
    with pytest.raises(UserError, match=r"questions\.json: found no list 'questions'"):
        read_vqa(directory)


def test_two_splits_in_one_directory_are_refused(directory):
    (directory / "v2_OpenEnded_questions.json").write_text("{}")
    with pytest.raises(UserError, match="found 2 files"):
        read_vqa(directory)


def test_missing_and_damaged_pictures_are_named(directory):
    with pytest.raises(UserError, match="no picture for '3'"):
        vqa_images(directory)[3]
    (directory / "images/00000.tar").write_bytes(b"damaged")
    with pytest.raises(UserError, match="corrupt shard"):
        vqa_images(directory)
    with pytest.raises(UserError, match="no folder"):
        vqa_images(directory / "nowhere")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the published VizWiz annotations in {os.path.relpath(SHARED)}")
def test_vizwiz_as_published():
    examples = read_vqa(SHARED)
    assert len(examples) == 4319
    assert all(len(example.answers) == 10 for example in examples)
    assert examples[0].image_id == "VizWiz_val_00000000.jpg"
    assert examples[0].question_type == examples[0].answer == "unanswerable"
    assert {example.answer_type for example in examples} == {"yes/no", "number", "other"}
