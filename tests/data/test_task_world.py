"""The world's tasks: what was drawn is what is read, from the official files that stand between."""

import io
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from vlmpipe.data.masks import Rle
from vlmpipe.data.readers.clevr import read_clevr_scenes
from vlmpipe.data.scenes import COLORS, SHAPES
from vlmpipe.data.task_world import LOOKS, TASKS, Part, read_task, write_tasks
from vlmpipe.data.tasks import layouts
from vlmpipe.data.tasks.programs import run
from vlmpipe.data.tasks.statements import PAIRS
from vlmpipe.errors import UserError

COUNT, SIDE = 48, 64


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tasks")
    write_tasks(directory, COUNT, 0, SIDE)
    return directory


@pytest.fixture(scope="module")
def part():
    return Part("train", COUNT, 0, SIDE)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def nearest_color(found: np.ndarray) -> str:
    return min(COLORS, key=lambda name: np.abs(np.array(COLORS[name]) - found).sum())


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_task_has_its_pictures(world, name, split):
    records, images = read_task(world, name, split)
    assert len({record.id for record in records}) == len(records) >= 8
    wanted = {image for record in records for image in getattr(record, "images", None) or (record.image,)}
    assert all(image in images for image in wanted)
    assert len(wanted) == len(images)
    assert all(pixels(images[image]).shape == (SIDE, SIDE, 3) for image in list(wanted)[:5])


def test_the_same_world_is_the_same_bytes(world, tmp_path):
    write_tasks(tmp_path, COUNT, 0, SIDE, ("clips", "detection"))
    files = [path.relative_to(tmp_path) for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert len(files) == 2 * 2 * 4
    assert all((world / name).read_bytes() == (tmp_path / name).read_bytes() for name in files)
    write_tasks(tmp_path, COUNT, 1, SIDE, ("clips",))
    assert (world / "clips/train/train_qa.json").read_bytes() != (tmp_path / "clips/train/train_qa.json").read_bytes()


def test_no_picture_is_in_both_splits(world):
    seen = {split: set() for split in ("train", "test")}
    for name in TASKS:
        for split, found in seen.items():
            found |= set(read_task(world, name, split)[1].values())
    assert not seen["train"] & seen["test"]


def test_captions(world, part):
    records, images = read_task(world, "captions", "train")
    rng = part.rng("captions")
    for record, scene in zip(records, part.scenes, strict=True):
        assert record.captions == layouts.captions(scene, rng)
        shown, drawn = pixels(images[record.images[0]]), np.asarray(scene.draw(SIDE)).astype(int)
        assert np.abs(shown - drawn).mean() < 7


def test_detection(world, part):
    records, images = read_task(world, "detection", "train")
    crowds = 0
    for record, scene in zip(records, part.scenes, strict=True):
        assert record.labels[:len(scene.items)] == tuple(f"{item.color} {item.shape}" for item in scene.items)
        known = [layouts.box((item,), SIDE) for item in scene.items]
        assert np.allclose(record.boxes[:len(scene.items)], known, atol=0.011)
        shown = pixels(images[record.image])
        for box, label, crowd, mask in zip(record.boxes, record.labels, record.crowd, record.masks):
            inside = mask.pixels()
            rows, columns = np.nonzero(inside)
            assert box[0] - 1 <= columns.min() and columns.max() <= box[2]
            assert box[1] - 1 <= rows.min() and rows.max() <= box[3]
            assert isinstance(mask, Rle) == bool(crowd)
            if not crowd:
                assert nearest_color(np.median(shown[inside], 0)) == label.split()[0]
            crowds += bool(crowd)
    assert crowds == COUNT // 6


def test_coco_s_own_tools_read_the_same(world):
    """What COCO's code makes of the written file is what our reader makes of it: boxes, names, crowds and masks."""
    from faster_coco_eval import COCO

    theirs = COCO(str(world / "detection/train/instances_train.json"))
    records, _ = read_task(world, "detection", "train")
    for record in records:
        found = theirs.loadAnns(theirs.getAnnIds(imgIds=[int(record.id)]))
        assert [theirs.cats[one["category_id"]]["name"] for one in found] == list(record.labels)
        assert [bool(one["iscrowd"]) for one in found] == record.crowd.tolist()
        corners = [(x, y, x + w, y + h) for x, y, w, h in (one["bbox"] for one in found)]
        assert np.allclose(corners, record.boxes, atol=1e-4)
        for one, mask in zip(found, record.masks, strict=True):
            assert (theirs.annToMask(one).astype(bool) == mask.pixels()).all()
            assert one["area"] == mask.area


def test_regions(world, part):
    records, images = read_task(world, "regions", "train")
    items = [item for scene in part.scenes for item in scene.items]
    for record, item in zip(records, items, strict=True):
        assert record.label == f"{item.color} {item.shape}"
        assert np.allclose(record.box, layouts.box((item,), SIDE), atol=0.011)
        assert nearest_color(np.median(pixels(images[record.image])[record.mask.pixels()], 0)) == item.color
        for expression in record.expressions:
            words = expression.partition(" of ")[0].partition(" above")[0].partition(" below")[0].split()
            assert set(words) & set(COLORS) <= {item.color} and set(words) & set(SHAPES) <= {item.shape}


def test_clevr(world, part):
    records, _ = read_task(world, "clevr", "train")
    scenes = read_clevr_scenes(world / "clevr/train")
    for known, scene in zip(scenes, part.scenes, strict=True):
        assert [(o.color, o.shape, o.size) for o in known.objects] == [(i.color, i.shape, i.size) for i in scene.items]
        for how, related in known.relationships.items():
            for i, others in enumerate(related):
                assert all(layouts.stands(scene.items[j], how, scene.items[i]) for j in others)
    drawn = dict(zip((known.image for known in scenes), part.scenes))
    assert all(record.answers == (run(record.program, drawn[record.images[0]]),) for record in records)
    assert len(records) == 3 * COUNT and len({record.slices["kind"] for record in records}) == 5


def test_questions(world):
    records, images = read_task(world, "questions", "train")
    assert len(records) == 3 * COUNT and all(record.answers == (record.answers[0],) * 10 for record in records)
    assert all(record.images[0] in images for record in records)


def test_statements(world):
    records, _ = read_task(world, "statements", "train")
    groups = defaultdict(list)
    for record in records:
        groups[record.group].append(record)
    assert all(len(group) == PAIRS and sum(record.label for record in group) == 2 for group in groups.values())
    assert all(len({record.sentence for record in group}) == 1 for group in groups.values())
    assert all(len(record.images) == 2 for record in records)


def test_words_are_read_where_they_stand(world, part):
    for task in ("text_questions", "text_captions"):
        records, _ = read_task(world, task, "train")
        texts = {record.images[0]: record.texts for record in records}
        for found, street in zip(texts.values(), part.streets, strict=True):
            assert [text.word for text in found] == [sign.word for sign in street.signs]
            assert np.allclose([text.box for text in found], [text.box for text in street.texts(SIDE)])
    assert all(len(record.captions) == 5 for record in records)


def test_unanswerable(world):
    records, _ = read_task(world, "unanswerable", "train")
    for record in records:
        common = Counter(record.answers).most_common(1)[0][0]
        assert record.answerable == (common != "unanswerable") == (record.slices["answer_type"] != "unanswerable")
    assert {record.answerable for record in records} == {True, False}


def test_clips(world):
    records, images = read_task(world, "clips", "train")
    assert all(len(record.images) == 4 and record.images == tuple(sorted(record.images)) for record in records)
    for record in records:
        frames = [pixels(images[name]) for name in record.images]
        assert all(np.abs(after - before).max() > 60 for before, after in pairwise(frames))


def test_classes(world):
    records, images = read_task(world, "classes", "train")
    assert len(records) == COUNT and {record.label for record in records} <= set(LOOKS)
    for record in records:
        shown = pixels(images[record.image])
        strong = np.ptp(shown, 2) > 90
        assert nearest_color(np.median(shown[strong], 0)) == record.label.split()[0]


@pytest.mark.parametrize(("arguments", "said"), [
    ((4, 0, 64), "found count 4"), ((8, -1, 64), "seed -1"), ((8, 0, 32), "size 32"),
    ((8, 0, 64, ("caption",)), r"found task 'caption'.*captions.*expected one of captions, detection"),
])
def test_what_cannot_be_built_is_said(tmp_path, arguments, said):
    with pytest.raises(UserError, match=said):
        write_tasks(tmp_path, *arguments)
