"""CLEVR questions, programs and scenes, as published and as the generator writes them."""

import json

import pytest

from vlmpipe.data.readers.clevr import ClevrObject, read_clevr, read_clevr_scenes
from vlmpipe.data.records import Step
from vlmpipe.errors import UserError

PROGRAM = [{"inputs": [], "function": "scene", "value_inputs": []},
           {"inputs": [0], "function": "filter_size", "value_inputs": ["large"]},
           {"inputs": [1], "function": "count", "value_inputs": []},
           {"inputs": [2, 2], "function": "greater_than", "value_inputs": []}]
QUESTION = {"image_index": 0, "program": PROGRAM, "question_index": 0, "image_filename": "CLEVR_train_000000.png",
            "question_family_index": 2, "split": "train", "answer": "yes",
            "question": "Are there more big green things than large purple shiny cubes?"}
OBJECT = {"color": "green", "size": "large", "rotation": 269.8, "shape": "cylinder", "3d_coords": [-1.4, 2.6, 0.7],
          "material": "rubber", "pixel_coords": [206, 101, 12.6]}
SCENE = {"image_index": 0, "image_filename": "CLEVR_train_000000.png", "split": "train", "objects": [OBJECT, OBJECT],
         "relationships": {"left": [[1], []], "right": [[], [0]]}, "directions": {"left": [-0.6, -0.7, 0]}}


def write(folder, name, **content):
    (folder / name).write_text(json.dumps({"info": {}} | content))
    return folder


def test_questions_with_programs(tmp_path):
    record, = read_clevr(write(tmp_path, "CLEVR_train_questions.json", questions=[QUESTION]))
    assert record.images == ("CLEVR_train_000000.png",) and record.answers == ("yes",)
    assert record.slices == {"family": "2", "kind": "compare numbers"}
    assert record.program[1] == Step("filter_size", (0,), ("large",))
    assert record.program[3] == Step("greater_than", (2, 2))


def test_what_the_generator_writes(tmp_path):
    """`type` for function, older `side_inputs`, booleans and numbers for answers."""
    steps = [{"type": "scene", "inputs": []}, {"type": "filter_color", "inputs": [0], "side_inputs": ["red"]},
             {"type": "exist", "inputs": [1]}]
    rows = [QUESTION | {"program": steps, "answer": True}, QUESTION | {"question_index": 1, "answer": 3}]
    first, second = read_clevr(write(tmp_path, "questions.json", questions=rows))
    assert first.answers == ("yes",) and second.answers == ("3",)
    assert first.program[1] == Step("filter_color", (0,), ("red",)) and first.slices["kind"] == "exist"


def test_the_test_split_has_neither_answers_nor_programs(tmp_path):
    row = {k: QUESTION[k] for k in ("question", "image_filename", "question_index", "image_index", "split")}
    record, = read_clevr(write(tmp_path, "CLEVR_test_questions.json", questions=[row]))
    assert (record.answers, record.program, record.slices) == ((), (), {})


def test_scenes(tmp_path):
    scene, = read_clevr_scenes(write(tmp_path, "CLEVR_train_scenes.json", scenes=[SCENE]))
    assert scene.objects[0] == ClevrObject("green", "cylinder", "large", "rubber", (206.0, 101.0))
    assert scene.relationships == {"left": ((1,), ()), "right": ((), (0,))}


@pytest.mark.parametrize(("program", "said"), [
    ([{"function": "count", "inputs": [0]}], r"program\[0\]\.inputs: .*numbers of earlier steps"),
    ([{"inputs": []}], r"program\[0\]\.type: found nothing"),
    (["scene"], r"program\[0\]: found str; expected an object"),
])
def test_bad_programs_are_named(tmp_path, program, said):
    with pytest.raises(UserError, match=said):
        read_clevr(write(tmp_path, "questions.json", questions=[QUESTION | {"program": program}]))


def test_bad_relations_are_named(tmp_path):
    write(tmp_path, "scenes.json", scenes=[SCENE | {"relationships": {"left": [[2], []]}}])
    with pytest.raises(UserError, match=r"relationships\.left: .*object numbers for each of 2"):
        read_clevr_scenes(tmp_path)
