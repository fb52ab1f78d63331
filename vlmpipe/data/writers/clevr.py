"""CLEVR: a file of questions with programs, a file of scenes."""

from collections.abc import Sequence
from pathlib import Path

from vlmpipe.data.pictures import write_pictures
from vlmpipe.data.readers.clevr import ClevrObject, ClevrScene
from vlmpipe.data.records import QuestionRecord
from vlmpipe.data.writers.coco import Named
from vlmpipe.data.writers.files import dump


def write_clevr(
    directory: Path, records: Sequence[QuestionRecord], scenes: Sequence[ClevrScene], images: Named, split: str
) -> None:
    """Records with whole-number ids and a `family` slice, on pictures of `scenes`."""
    head = {"info": {"split": split, "version": "1.0", "license": "", "date": ""}}
    numbers = {scene.image: int(scene.id) for scene in scenes}
    questions = [
        {
            "split": split, "question_index": int(record.id), "question": record.question, "answer": record.answers[0],
            "image_filename": record.images[0], "image_index": numbers[record.images[0]],
            "question_family_index": int(record.slices["family"]),
            "program": [
                {"function": step.function, "inputs": list(step.inputs), "value_inputs": list(step.values)}
                for step in record.program
            ],
        }
        for record in records
    ]
    dump(Path(directory) / f"CLEVR_{split}_questions.json", head | {"questions": questions})
    dump(Path(directory) / f"CLEVR_{split}_scenes.json", head | {"scenes": [_scene(scene, split) for scene in scenes]})
    write_pictures(Path(directory) / "images", images)


def _scene(scene: ClevrScene, split: str) -> dict:
    relations = {name: [list(others) for others in found] for name, found in scene.relationships.items()}
    return {
        "split": split, "image_index": int(scene.id), "image_filename": scene.image, "relationships": relations,
        "objects": [_object(thing) for thing in scene.objects],
    }


def _object(thing: ClevrObject) -> dict:
    x, y = thing.pixel
    return {"color": thing.color, "shape": thing.shape, "size": thing.size, "material": thing.material, "rotation": 0.0,
            "pixel_coords": [x, y, 1.0], "3d_coords": [x, y, 0.0]}
