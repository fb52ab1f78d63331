"""TextVQA and TextCaps with the words that stand in the pictures."""

import json

import pytest

from vlmpipe.data.readers.textvqa import read_textcaps, read_textvqa
from vlmpipe.data.records import SceneText
from vlmpipe.errors import UserError

BOX = {"width": 0.5, "height": 0.125, "rotation": 0, "roll": 0, "pitch": 0, "yaw": 0, "top_left_x": 0.25,
       "top_left_y": 0.5}
WORDS = {"data": [{"image_id": "003a8ae2ef43b901", "ocr_tokens": ["DAKOTA"],
                   "ocr_info": [{"word": "DAKOTA", "bounding_box": BOX}]}]}
QUESTION = {"question": "what is the brand?", "image_id": "003a8ae2ef43b901", "question_id": 34602, "set_name": "val",
            "answers": ["dakota"] * 9 + ["dakota digital"], "image_width": 1024, "image_height": 664}


def write(folder, name, data):
    (folder / name).write_text(json.dumps(data))


@pytest.fixture
def directory(tmp_path):
    write(tmp_path, "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [QUESTION]})
    write(tmp_path, "TextVQA_Rosetta_OCR_v0.2_val.json", WORDS)
    return tmp_path


def test_questions_with_the_words_beside(directory):
    record, = read_textvqa(directory)
    assert (record.id, record.images) == ("34602", ("003a8ae2ef43b901.jpg",))
    assert record.answers == ("dakota",) * 9 + ("dakota digital",) and record.slices == {"split": "val"}
    assert record.texts == (SceneText("DAKOTA", (0.25, 0.5, 0.75, 0.625)),)
    file = directory / "TextVQA_0.5.1_val.json"
    assert read_textvqa(file)[0].texts == ()
    assert read_textvqa(file, directory / "TextVQA_Rosetta_OCR_v0.2_val.json") == [record]


def test_words_without_boxes_and_questions_without_answers(tmp_path):
    row = {k: v for k, v in QUESTION.items() if k != "answers"} | {"ocr_tokens": ["NOKIA", "8"]}
    write(tmp_path, "TextVQA_0.5.1_test.json", {"data": [row]})
    record, = read_textvqa(tmp_path)
    assert record.answers == () and record.texts == (SceneText("NOKIA"), SceneText("8"))


def caption(text, **more):
    return {"image_id": "a1", "caption_id": 1, "caption_str": text, "reference_strs": ["x", "y"], **more}


def test_rows_of_a_picture_are_one_record(tmp_path):
    rows = [caption("a bus 8"), caption("b", image_id="b2"), caption("red")]
    write(tmp_path, "TextCaps_0.1_train.json", {"data": rows})
    first, second = read_textcaps(tmp_path)
    assert (first.id, first.images, first.captions) == ("a1", ("a1.jpg",), ("a bus 8", "red"))
    assert second.captions == ("b",)


def test_captions_that_a_row_repeats_and_those_of_the_test_split(tmp_path):
    rows = [{"image_id": "a", "reference_strs": ["one", "two"]}, {"image_id": "b"}]
    write(tmp_path, "TextCaps_0.1_test.json", {"data": rows})
    assert [record.captions for record in read_textcaps(tmp_path)] == [("one", "two"), ()]


@pytest.mark.parametrize(("row", "said"), [
    ({"question_id": None}, r"data\[0\]\.question_id: found nothing"),
    ({"answers": ["a", 3]}, r"data\[0\]\.answers\[1\]: found int 3; expected str"),
    ({"answers": "a"}, r"data\[0\]\.answers: found str 'a'; expected list"),
])
def test_bad_questions_are_named(directory, row, said):
    write(directory, "TextVQA_0.5.1_val.json", {"data": [QUESTION | row]})
    with pytest.raises(UserError, match=said):
        read_textvqa(directory)


def test_bad_words_are_named(directory):
    write(directory, "TextVQA_Rosetta_OCR_v0.2_val.json",
          {"data": [{"image_id": "a", "ocr_info": [{"word": "x", "bounding_box": {"width": 1}}]}]})
    with pytest.raises(UserError, match=r"ocr_info\[0\]\.bounding_box\.top_left_x: found nothing"):
        read_textvqa(directory)
