"""Pictures as blind people may take them, and questions of which some can't be answered from the picture (VizWiz).

A question can't be answered because nothing is to be seen (too dark, out of focus, a finger over the lens) or because
what it asks for isn't there.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from vlmpipe.data.questions import Question, candidates
from vlmpipe.data.scenes import SHAPES, Scene, background, pick
from vlmpipe.data.vqa import answer_type

UNANSWERABLE = "unanswerable"
SHARE = 0.4  # of the questions
WAYS = ("dark", "out of focus", "covered", "absent")
KINDS = ("color", "shape", "count", "presence", "position")
PEOPLE = 10
AGREE = (7, 10)  # of ten people, so many give the common answer
OTHERWISE = ("unsuitable", "unsuitable image", "i don't know")


@dataclass(frozen=True)
class Photo:
    """A scene as photographed, one question on it, its answers and how sure each of ten people was.

    way: how the picture is spoiled (of `WAYS`), None where the question has an answer.
    """

    scene: Scene
    way: str | None
    question: str
    answers: tuple[str, ...]
    confidences: tuple[str, ...]
    answer_type: str
    seed: int

    def draw(self, size: int) -> Image.Image:
        return spoil(self.scene.draw(size), self.way, self.seed)


def take_photo(scene: Scene, rng: np.random.Generator) -> Photo:
    """A random question on a scene, and a picture that answers it or doesn't."""
    way = pick(rng, WAYS) if rng.random() < SHARE else None
    asked = _absent(scene, rng) if way == "absent" else _present(scene, rng)
    common = asked.answer if way is None else UNANSWERABLE
    answers, confidences = _people(common, rng, doubt=UNANSWERABLE if way is None else pick(rng, OTHERWISE))
    kind = answer_type(asked.answer) if way is None else UNANSWERABLE
    return Photo(scene, way, asked.text, answers, confidences, kind, int(rng.integers(2**31)))


def _present(scene: Scene, rng: np.random.Generator) -> Question:
    while True:
        options = candidates(scene, pick(rng, KINDS), rng)
        if options:
            return pick(rng, options)


def _absent(scene: Scene, rng: np.random.Generator) -> Question:
    shape = pick(rng, [shape for shape in SHAPES if shape not in {item.shape for item in scene.items}])
    return Question(UNANSWERABLE, pick(rng, (f"What color is the {shape}?", f"Where is the {shape}?")), UNANSWERABLE)


def _people(common: str, rng: np.random.Generator, doubt: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    agree = int(rng.integers(AGREE[0], AGREE[1] + 1))
    order = rng.permutation(PEOPLE)
    answers = [common] * agree + [doubt] * (PEOPLE - agree)
    sure = ["yes"] * agree + ["maybe"] * (PEOPLE - agree)
    return tuple(answers[i] for i in order), tuple(sure[i] for i in order)


def spoil(image: Image.Image, way: str | None, seed: int) -> Image.Image:
    """The picture as it comes out; where nothing is wrong with the light, as it is."""
    rng = np.random.default_rng(seed)
    if way == "dark":
        pixels = np.asarray(image) * rng.uniform(0.0, 0.04) + rng.normal(8, 3, np.asarray(image).shape)
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if way == "out of focus":
        return image.filter(ImageFilter.GaussianBlur(image.width * rng.uniform(0.3, 0.4)))
    if way == "covered":
        skin = Image.new("RGB", image.size, tuple(int(v) for v in np.array((196, 142, 112)) * rng.uniform(0.5, 1.05)))
        return Image.blend(skin, background(seed, image.width), 0.15)
    return image
