"""Clips: a few frames of one shape that moves, sometimes past another that stays. One frame doesn't say what moves."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from vlmpipe.data.questions import Question
from vlmpipe.data.scenes import Item, Scene, different_looks, pick
from vlmpipe.data.tasks.layouts import DIAMETERS, is_held_out

FRAMES = 4
NEAR, FAR = 0.24, 0.76
# The step of a whole clip, as (x, y) in shares of the side, y downwards.
WAYS = {"left": (NEAR - FAR, 0.0), "right": (FAR - NEAR, 0.0), "up": (0.0, NEAR - FAR), "down": (0.0, FAR - NEAR)}
QUESTIONS = ("way", "mover shape", "mover color", "count")


@dataclass(frozen=True)
class Clip:
    """What moves, as it stands at first, the word for its way, what stays, and the background of all frames."""

    mover: Item
    way: str
    others: tuple[Item, ...]
    background: int

    def frames(self) -> list[Scene]:
        """FRAMES scenes in order of time; an even pace from the first to the last."""
        dx, dy = WAYS[self.way]
        shares = [number / (FRAMES - 1) for number in range(FRAMES)]
        moved = [replace(self.mover, x=self.mover.x + dx * share, y=self.mover.y + dy * share) for share in shares]
        return [Scene((*self.others, item), self.background) for item in moved]

    def draw(self, size: int) -> list[Image.Image]:
        return [frame.draw(size) for frame in self.frames()]


def sample_clip(rng: np.random.Generator, held_out: bool) -> Clip:
    """A random clip; what it shows (looks, way, lane) is either held out or for training."""
    while True:
        count, way = 1 + int(rng.integers(2)), pick(rng, tuple(WAYS))
        looks, lane = different_looks(rng, count), pick(rng, (NEAR, FAR))
        if is_held_out(f"{looks} {way} {lane}") == held_out:
            mover = _item(rng, looks[0], NEAR if way in ("right", "down") else FAR, lane, way)
            other_lane = FAR if lane == NEAR else NEAR
            others = tuple(_item(rng, look, rng.uniform(0.3, 0.7), other_lane, way) for look in looks[1:])
            return Clip(mover, way, others, int(rng.integers(2**31)))


def _item(rng: np.random.Generator, look: tuple[str, str], along: float, lane: float, way: str) -> Item:
    """`along` the way that is moved, and the `lane` across it."""
    color, shape = look
    size = pick(rng, tuple(DIAMETERS))
    lane += rng.uniform(-0.02, 0.02)
    x, y = (along, lane) if way in ("left", "right") else (lane, along)
    return Item(shape, color, size, "", x, y, DIAMETERS[size], rng.uniform(-12, 12))


def questions(clip: Clip, kind: str) -> list[Question]:
    """Every question of a kind of `QUESTIONS` that the clip answers."""
    asked: Sequence[tuple[str, str]] = {
        "way": [("Which way does the shape move?", clip.way),
                (f"Which way does the {clip.mover.color} {clip.mover.shape} move?", clip.way)],
        "mover shape": [("What shape moves?", clip.mover.shape)],
        "mover color": [("What color is the shape that moves?", clip.mover.color)],
        "count": [("How many shapes stay where they are?", str(len(clip.others)))],
    }[kind]
    return [Question(kind, text, answer) for text, answer in asked]
