"""What layouts say of a picture (boxes, outlines, captions, expressions) is true of its pixels."""

from itertools import pairwise

import numpy as np
import pytest

from vlmpipe.data.masks import fill
from vlmpipe.data.scenes import COLORS, SHAPES, Scene
from vlmpipe.data.tasks.layouts import (
    RELATIONS,
    arrangement,
    box,
    captions,
    crowd,
    expressions,
    is_held_out,
    polygon,
    relation,
    sample_layout,
    stands,
)

SIDE = 64


def sample(count: int, held_out: bool = False, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_layout(rng, held_out) for _ in range(count)]


def inside(item) -> np.ndarray:
    return fill(np.reshape(polygon(item, SIDE), (-1, 2)), SIDE, SIDE)


def test_outlines_are_where_the_shapes_are():
    """Inside an outline the picture is of the item's colour; away from all of them it is the bare background."""
    for scene in sample(40):
        drawn = np.asarray(scene.draw(SIDE)).astype(int)
        bare = np.asarray(Scene((), scene.background).draw(SIDE)).astype(int)
        changed = np.abs(drawn - bare).max(-1) > 40
        covered = np.zeros((SIDE, SIDE), bool)
        for item in scene.items:
            mask = inside(item)
            assert (changed & mask).sum() > 0.9 * mask.sum()
            median = np.median(drawn[mask], 0)
            assert min(COLORS, key=lambda name: np.abs(np.array(COLORS[name]) - median).sum()) == item.color
            left, top, right, bottom = (round(edge) for edge in box((item,), SIDE))
            covered[max(0, top - 2):bottom + 3, max(0, left - 2):right + 3] = True
        assert not (changed & ~covered).any()


def test_boxes_hold_their_outlines_and_no_other():
    for scene in sample(100):
        boxes = [box((item,), SIDE) for item in scene.items]
        for item, (left, top, right, bottom) in zip(scene.items, boxes):
            assert 0 <= left < right <= SIDE and 0 <= top < bottom <= SIDE
            rows, columns = np.nonzero(inside(item))
            assert left - 1 <= columns.min() and columns.max() <= right
            assert top - 1 <= rows.min() and rows.max() <= bottom
        for i, a in enumerate(boxes):
            assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[i + 1:])


def test_no_test_scene_shows_what_a_training_scene_shows():
    training, tests = ({arrangement(scene) for scene in sample(800, held)} for held in (False, True))
    assert not training & tests and len(tests) > 400
    assert all(map(is_held_out, tests)) and not any(map(is_held_out, training))


def test_captions_differ_and_are_true():
    rng = np.random.default_rng(1)
    for scene in sample(150):
        said = captions(scene, rng)
        assert len(set(said)) == 5
        for text in said:
            words = text.replace(",", "").split()
            named = {(color, shape) for color, shape in pairwise(words) if color in COLORS and shape in SHAPES}
            looks = {(item.color, item.shape) for item in scene.items}
            how = next((how for how, said in RELATIONS.items() if f" {said} " in text), None)
            assert named <= looks and (how or words[0] == "the" or named == looks), text
            assert all(item.place in text for item in scene.items) or " at the " not in text
            if how:
                first, second = ((word, after) for word, after in pairwise(words) if word in COLORS)
                found = {(item.color, item.shape): item for item in scene.items}
                assert stands(found[first], how, found[second]), text


def fits(expression: str, item, scene: Scene) -> bool:
    """Whether an expression is true of an item, read here apart from the code that made it."""
    text = expression
    for how, words in RELATIONS.items():
        _, found, anchor = text.partition(f" {words} the ")
        if found:
            color, shape = anchor.split()
            other, = (i for i in scene.items if (i.color, i.shape) == (color, shape))
            return item is not other and stands(item, how, other)
    place = next((p for p in ("top left", "top right", "bottom left", "bottom right") if p in text), None)
    if place and item.place != place:
        return False
    words = text.split()
    return all(getattr(item, name) == word for word in words for name, values in (
        ("color", COLORS), ("shape", SHAPES), ("size", ("small", "large"))) if word in values)


def test_expressions_name_one_thing():
    rng = np.random.default_rng(2)
    for scene in sample(150):
        for item in scene.items:
            said = expressions(scene, item, rng)
            assert 2 <= len(said) <= 3 and len(set(said)) == len(said)
            for expression in said:
                assert [other for other in scene.items if fits(expression, other, scene)] == [item], expression


def test_relations_are_seen_at_a_glance():
    for scene in sample(60):
        for first in scene.items:
            for second in scene.items:
                if first is not second:
                    how = relation(first, second)
                    assert how is None or stands(first, how, second)
                    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
                    assert all(stands(first, how, second) == stands(second, opposite[how], first) for how in RELATIONS)


def test_a_crowd_fills_a_free_quarter():
    rng = np.random.default_rng(3)
    for scene in sample(50):
        items = crowd(rng, scene)
        assert len(items) == 6 and len({(item.color, item.shape) for item in items}) == 1
        assert items[0].place not in {item.place for item in scene.items}
        left, top, right, bottom = box(items, SIDE)
        assert min(left, top) >= 0 and max(right, bottom) <= SIDE
        assert all(not (inside(tiny) & inside(item)).any() for tiny in items for item in scene.items)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_as_many_shapes_as_asked_for(count):
    rng = np.random.default_rng(4)
    assert {len(sample_layout(rng, False, count).items) for _ in range(20)} == {count}
