"""The embedded world's tasks: for each, a folder with `train/` and `test/` in a public dataset's own file format.

What a test shows (which shapes, colours, sizes and places together) no training picture of any task shows.
"""

import io
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from vlmpipe.config import nearest
from vlmpipe.data.groups import write_groups
from vlmpipe.data.masks import Polygons
from vlmpipe.data.pictures import Pictures, pictures
from vlmpipe.data.planting import jpeg, stream
from vlmpipe.data.questions import ask
from vlmpipe.data.readers import READERS
from vlmpipe.data.readers.clevr import ClevrObject, ClevrScene
from vlmpipe.data.records import (
    CaptionRecord,
    ClassRecord,
    ContrastRecord,
    DetectionRecord,
    QuestionRecord,
    Record,
    RegionRecord,
    StatementRecord,
)
from vlmpipe.data.scenes import Item, Scene
from vlmpipe.data.tasks import clips, layouts, programs, signs
from vlmpipe.data.tasks.polls import poll
from vlmpipe.data.tasks.spoiled import take_photo
from vlmpipe.data.tasks.statements import sample_set
from vlmpipe.data.tasks.swaps import Swap, sample_swap
from vlmpipe.data.vqa import VqaExample, answer_type, write_vqa
from vlmpipe.data.writers.clevr import write_clevr
from vlmpipe.data.writers.coco import write_coco_captions, write_coco_instances, write_refcoco
from vlmpipe.data.writers.contrast import write_sugarcrepe, write_winoground
from vlmpipe.data.writers.folders import write_folders
from vlmpipe.data.writers.nlvr import write_nlvr2
from vlmpipe.data.writers.pope import write_pope
from vlmpipe.data.writers.textvqa import write_textcaps, write_textvqa
from vlmpipe.data.writers.videos import frame_name, write_video_questions
from vlmpipe.data.writers.vizwiz import write_vizwiz
from vlmpipe.errors import UserError

SPLITS = ("train", "test")
TEST_SHARE = 5  # one test scene for so many of training
SMALLEST = 8  # scenes of a split
TEST_IDS = 100_000  # ids of test pictures start above it
CROWDED = 6  # one of so many detection pictures has a crowd
PER_SCENE = 3  # questions
LOOKS = tuple(f"{color} {shape}" for color, shape in layouts.LOOKS)
SIGN_MIX = {"word": 5, "place": 3, "color": 1, "count": 1}
CLIP_MIX = {"way": 4, "mover shape": 2, "mover color": 2, "count": 1}


@dataclass(frozen=True)
class Part:
    """One split: how many scenes a task has there, the seed, and the pictures' side in pixels.

    Scenes that several tasks ask about are sampled and drawn once.
    """

    split: str
    count: int
    seed: int
    side: int

    @property
    def held_out(self) -> bool:
        return self.split == "test"

    @property
    def size(self) -> tuple[int, int]:
        return self.side, self.side

    @property
    def ids(self) -> range:
        first = 1 + TEST_IDS * self.held_out
        return range(first, first + self.count)

    def rng(self, *names: str) -> np.random.Generator:
        return stream(self.seed, "tasks", self.split, *names)

    @cached_property
    def scenes(self) -> list[Scene]:
        rng = self.rng("scenes")
        return [layouts.sample_layout(rng, self.held_out) for _ in self.ids]

    @cached_property
    def drawn(self) -> list[Image.Image]:
        return [scene.draw(self.side) for scene in self.scenes]

    @cached_property
    def encoded(self) -> list[bytes]:
        return [jpeg(image) for image in self.drawn]

    @cached_property
    def streets(self) -> list[signs.Street]:
        rng = self.rng("streets")
        return [signs.sample_street(rng, self.held_out) for _ in self.ids]

    @cached_property
    def encoded_streets(self) -> list[bytes]:
        return [jpeg(street.draw(self.side)) for street in self.streets]


@dataclass(frozen=True)
class Task:
    """How a task's folder is written, the reader of its format, and where its pictures lie."""

    write: Callable[[Path, Part], None]
    reader: str
    images: str = "images"


def write_tasks(directory: Path, count: int, seed: int, size: int = 64, tasks: Sequence[str] = ()) -> None:
    """Write `directory/<task>/{train,test}/` for every task, or those named; the same arguments give the same bytes.

    `count`: training scenes of each task, with a fifth as many for tests (pictures, but for clips four frames count as
    one, and statements have half as many pairs). `size`: the pictures' side in pixels.

    Raises:
        UserError: too few scenes, too small a side, or an unknown task.
    """
    if count < SMALLEST or size < 48 or seed < 0:
        raise UserError(f"found count {count}, seed {seed}, size {size}; expected at least {SMALLEST} scenes, a seed "
                        f"from 0, and 48 pixels")
    chosen = {name: _task(name) for name in tasks or TASKS}
    for split, scenes in zip(SPLITS, (count, max(SMALLEST, count // TEST_SHARE))):
        part = Part(split, scenes, seed, size)
        for name, task in chosen.items():
            shutil.rmtree(Path(directory) / name / split, ignore_errors=True)
            task.write(Path(directory) / name / split, part)


def read_task(directory: Path, name: str, split: str) -> tuple[Sequence[Record], Pictures]:
    """The records of a task's split, and its pictures.

    Raises:
        UserError: an unknown task, or what its reader says.
    """
    task, where = _task(name), Path(directory) / name / split
    return READERS[task.reader](where), pictures(where / task.images)


def _task(name: str) -> Task:
    if name not in TASKS:
        raise UserError(f"found task '{name}'{nearest(name, TASKS)}; expected one of {', '.join(TASKS)}")
    return TASKS[name]


# --- shapes ------------------------------------------------------------------------------------------------

def _captions(directory: Path, part: Part) -> None:
    rng = part.rng("captions")
    records = [
        CaptionRecord(str(image_id), (_coco_name(image_id),), layouts.captions(scene, rng))
        for image_id, scene in zip(part.ids, part.scenes)
    ]
    write_coco_captions(directory, records, zip(map(_coco_name, part.ids), part.encoded), part.size, part.split)


def _detection(directory: Path, part: Part) -> None:
    """The shared scenes; some have a crowd beside, and are drawn anew."""
    rng = part.rng("crowds")
    records, encoded = [], []
    for number, (image_id, scene, data) in enumerate(zip(part.ids, part.scenes, part.encoded)):
        crowd = layouts.crowd(rng, scene) if number % CROWDED == 0 else ()
        records.append(_detected(image_id, scene, crowd, part.side))
        encoded.append(jpeg(Scene(scene.items + crowd, scene.background).draw(part.side)) if crowd else data)
    write_coco_instances(directory, records, zip(map(_coco_name, part.ids), encoded), LOOKS, part.split)


def _detected(image_id: int, scene: Scene, crowd: tuple[Item, ...], side: int) -> DetectionRecord:
    things = [(item,) for item in scene.items] + ([crowd] if crowd else [])
    masks = [Polygons(side, side, tuple(layouts.polygon(item, side) for item in items)) for items in things]
    return DetectionRecord(
        str(image_id), _coco_name(image_id), (side, side),
        np.array([layouts.box(items, side) for items in things], np.float32),
        tuple(f"{items[0].color} {items[0].shape}" for items in things),
        np.array([len(items) > 1 for items in things]),
        tuple(mask.rle() if len(items) > 1 else mask for mask, items in zip(masks, things)),
    )


def _objects(directory: Path, part: Part) -> None:
    """The shared scenes: what is in them, and questions about it."""
    records = [_detected(image_id, scene, (), part.side) for image_id, scene in zip(part.ids, part.scenes)]
    write_coco_instances(directory, records, zip(map(_coco_name, part.ids), part.encoded), LOOKS, part.split)
    write_pope(directory, poll(records), "scenes")


def _regions(directory: Path, part: Part) -> None:
    rng, side = part.rng("regions"), part.side
    things = [(i, scene, item) for i, scene in zip(part.ids, part.scenes) for item in scene.items]
    records = [
        RegionRecord(
            str(number), _coco_name(image_id), part.size, layouts.expressions(scene, item, rng),
            layouts.box((item,), side), Polygons(side, side, (layouts.polygon(item, side),)),
            f"{item.color} {item.shape}",
        )
        for number, (image_id, scene, item) in enumerate(things, part.ids.start)
    ]
    write_refcoco(directory, records, zip(map(_coco_name, part.ids), part.encoded), LOOKS, part.split)


def _questions(directory: Path, part: Part) -> None:
    asked = ask(part.scenes, PER_SCENE, part.rng("questions"))
    examples = [
        VqaExample(image_id * 10 + i, image_id, q.text, (q.answer,), answer_type(q.answer), q.kind)
        for image_id, questions in zip(part.ids, asked) for i, q in enumerate(questions)
    ]
    write_vqa(directory, examples, zip(part.ids, part.encoded), part.split)


def _clevr(directory: Path, part: Part) -> None:
    _write_clevr(directory, part, part.scenes, part.drawn, "clevr")


def _combinations(directory: Path, part: Part) -> None:
    """As CLEVR's CoGenT: no training scene has one of the looks that are left out, half of the test's have."""
    rng = part.rng("combinations")
    scenes = [
        layouts.sample_combination(rng, part.held_out, part.held_out and number % 2 == 0) for number in part.ids
    ]
    _write_clevr(directory, part, scenes, [scene.draw(part.side) for scene in scenes], "combined")


def _write_clevr(
    directory: Path, part: Part, shown: Sequence[Scene], drawn: Sequence[Image.Image], asking: str
) -> None:
    """Questions of every family on the scenes; `asking` names the stream of chance."""
    names = [f"CLEVR_{part.split}_{image_id:06d}.png" for image_id in part.ids]
    mix = {str(family): 1 for family in range(len(programs.FAMILIES))}
    asked = ask(shown, PER_SCENE, part.rng(asking), mix, programs.candidates)
    records = [
        QuestionRecord(
            str(image_id * 10 + i), (name,), q.text, (q.answer,), slices={"family": q.kind}, program=q.program,
        )
        for image_id, name, questions in zip(part.ids, names, asked) for i, q in enumerate(questions)
    ]
    scenes = [_clevr_scene(*known, part.side) for known in zip(part.ids, names, shown)]
    write_clevr(directory, records, scenes, zip(names, map(png, drawn)), part.split)


def _clevr_scene(image_id: int, name: str, scene: Scene, side: int) -> ClevrScene:
    objects = tuple(
        ClevrObject(item.color, item.shape, item.size, "rubber", (round(item.x * side), round(item.y * side)))
        for item in scene.items
    )
    relations = {
        how: tuple(
            tuple(i for i, other in enumerate(scene.items) if layouts.stands(other, how, item)) for item in scene.items
        )
        for how in layouts.RELATIONS
    }
    return ClevrScene(str(image_id), name, objects, relations)


def _classes(directory: Path, part: Part) -> None:
    rng = part.rng("classes")
    scenes = [(i, layouts.sample_layout(rng, part.held_out, count=1)) for i in part.ids]
    labelled = [(_classified(i, f"{s.items[0].color} {s.items[0].shape}"), s) for i, s in scenes]
    write_folders(directory, ((record, jpeg(scene.draw(part.side))) for record, scene in labelled))
    write_groups(directory, {
        record.image: {"size": scene.items[0].size, "place": scene.items[0].place} for record, scene in labelled
    })


def _classified(image_id: int, label: str) -> ClassRecord:
    name = f"{label.replace(' ', '_')}/{image_id:06d}.jpg"
    return ClassRecord(name, name, label)


# --- swaps -------------------------------------------------------------------------------------------------

def _swaps(directory: Path, part: Part) -> None:
    rng = part.rng("swaps")
    found = [sample_swap(rng, part.held_out) for _ in part.ids]
    names = [_coco_name(image_id) for image_id in part.ids]
    records = [_contrast(str(image_id), name, swap, 0) for image_id, name, swap in zip(part.ids, names, found)]
    write_sugarcrepe(directory, records, zip(names, (jpeg(swap.scenes[0].draw(part.side)) for swap in found)))


def _pairs(directory: Path, part: Part) -> None:
    """Half as many pairs as scenes, both pictures of each."""
    rng = part.rng("pairs")
    records, images = [], []
    for number in part.ids[: part.count // 2]:
        swap = sample_swap(rng, part.held_out)
        for k, scene in enumerate(swap.scenes):
            name = f"ex_{number}_img_{k}"
            records.append(_contrast(str(number), name, swap, k))
            images.append((f"{name}.png", png(scene.draw(part.side))))
    write_winoground(directory, records, images)


def _contrast(group: str, name: str, swap: Swap, k: int) -> ContrastRecord:
    return ContrastRecord(f"{group}-{k}", name, swap.said[k], (swap.said[1 - k],), group, {"swap": swap.kind})


# --- pairs, words, photos and clips ------------------------------------------------------------------------

def _statements(directory: Path, part: Part) -> None:
    rng = part.rng("statements")
    records, images = [], []
    for number in range(part.ids.start, part.ids.start + max(2, part.count // 8)):
        found = sample_set(rng, part.held_out)
        for i, (pair, label) in enumerate(zip(found.pairs, found.labels)):
            stem = f"{part.split}-{number}-{i}"
            names = tuple(f"{stem}-img{side}.png" for side in (0, 1))
            slices = {"split": part.split, "synset": found.kind}
            group = f"{part.split}-{number}-0"
            records.append(StatementRecord(f"{stem}-0", names, found.sentence, label, group, slices))
            images += [(name, png(scene.draw(part.side))) for name, scene in zip(names, pair)]
    write_nlvr2(directory, records, images, part.split)


def _text_questions(directory: Path, part: Part) -> None:
    asked = ask(part.streets, 2, part.rng("text questions"), SIGN_MIX, lambda s, kind, rng: signs.questions(s, kind))
    records = [
        QuestionRecord(
            str(image_id * 10 + i), (_text_name(image_id),), q.text, (q.answer,), texts=street.texts(part.side),
        )
        for image_id, street, questions in zip(part.ids, part.streets, asked) for i, q in enumerate(questions)
    ]
    write_textvqa(directory, records, zip(map(_text_name, part.ids), part.encoded_streets), part.size, part.split)


def _text_captions(directory: Path, part: Part) -> None:
    rng = part.rng("text captions")
    records = [
        CaptionRecord(_text_id(image_id), (_text_name(image_id),), signs.captions(street, rng), street.texts(part.side))
        for image_id, street in zip(part.ids, part.streets)
    ]
    write_textcaps(directory, records, zip(map(_text_name, part.ids), part.encoded_streets), part.size, part.split)


def _unanswerable(directory: Path, part: Part) -> None:
    rng = part.rng("photos")
    photos = [take_photo(layouts.sample_layout(rng, part.held_out), rng) for _ in part.ids]
    names = [f"VizWiz_{part.split}_{image_id:08d}.jpg" for image_id in part.ids]
    records = [
        QuestionRecord(
            name.removesuffix(".jpg"), (name,), photo.question, photo.answers, photo.way is None,
            {"answer_type": photo.answer_type}, photo.confidences,
        )
        for name, photo in zip(names, photos)
    ]
    write_vizwiz(directory, records, zip(names, (jpeg(photo.draw(part.side)) for photo in photos)), part.split)


def _clips(directory: Path, part: Part) -> None:
    rng, ids = part.rng("clips"), part.ids[: max(SMALLEST, part.count // clips.FRAMES)]
    drawn = [clips.sample_clip(rng, part.held_out) for _ in ids]
    asked = ask(drawn, 2, part.rng("clip questions"), CLIP_MIX, lambda clip, kind, rng: clips.questions(clip, kind))
    records = [
        QuestionRecord(
            str(video_id * 10 + i), tuple(frame_name(video_id, n) for n in range(clips.FRAMES)), q.text, (q.answer,),
        )
        for video_id, questions in zip(ids, asked) for i, q in enumerate(questions)
    ]
    frames = (
        (frame_name(video_id, n), jpeg(frame))
        for video_id, clip in zip(ids, drawn) for n, frame in enumerate(clip.draw(part.side))
    )
    write_video_questions(directory, records, frames, part.split)


# --- names and bytes ---------------------------------------------------------------------------------------

def _coco_name(image_id: int) -> str:
    return f"{image_id:012d}.jpg"


def _text_id(image_id: int) -> str:
    return f"{image_id:016x}"


def _text_name(image_id: int) -> str:
    return f"{_text_id(image_id)}.jpg"


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


TASKS = {
    "captions": Task(_captions, "coco_captions"),
    "detection": Task(_detection, "coco_instances"),
    "regions": Task(_regions, "refcoco"),
    "questions": Task(_questions, "vqav2"),
    "clevr": Task(_clevr, "clevr"),
    "classes": Task(_classes, "folders", images="."),
    "statements": Task(_statements, "nlvr2"),
    "text_questions": Task(_text_questions, "textvqa"),
    "text_captions": Task(_text_captions, "textcaps"),
    "unanswerable": Task(_unanswerable, "vizwiz"),
    "clips": Task(_clips, "video_qa"),
    "swaps": Task(_swaps, "sugarcrepe"),
    "pairs": Task(_pairs, "winoground"),
    "objects": Task(_objects, "pope"),
    "combinations": Task(_combinations, "clevr"),
}
