"""Statements on two pictures, in sets as NLVR2 has them: one sentence, four pairs, of two of which it is true.

So whoever looks at the sentence alone, or at one picture alone and knows the others, is right half of the time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vlmpipe.data.questions import article
from vlmpipe.data.scenes import COLORS, SHAPES, Scene, pick
from vlmpipe.data.tasks.layouts import LOOKS, sample_layout

PAIRS = 4
TRUE = 2
SIDES = ("left", "right")
Pair = tuple[Scene, Scene]
Claim = tuple[str, Callable[[Pair], bool]]


@dataclass(frozen=True)
class PairSet:
    """A sentence with its kind, and for each of its pairs whether it is true there."""

    sentence: str
    kind: str
    pairs: tuple[Pair, ...]
    labels: tuple[bool, ...]


def sample_set(rng: np.random.Generator, held_out: bool) -> PairSet:
    """A random set: claims are tried until one is true of just two of the pairs."""
    pairs = tuple((sample_layout(rng, held_out), sample_layout(rng, held_out)) for _ in range(PAIRS))
    kind = pick(rng, tuple(CLAIMS))
    for attempt in range(1000):
        sentence, holds = CLAIMS[kind](rng)
        labels = tuple(holds(pair) for pair in pairs)
        if sum(labels) == TRUE:
            return PairSet(sentence, kind, pairs, labels)
        if attempt % 40 == 39:  # these pairs don't suit that kind
            kind = pick(rng, tuple(CLAIMS))
    return sample_set(rng, held_out)


def _count(scene: Scene, **look: str) -> int:
    """How many items have all these attributes."""
    return sum(all(getattr(item, name) == value for name, value in look.items()) for item in scene.items)


def _one_side(rng: np.random.Generator) -> Claim:
    side = int(rng.integers(2))
    color, shape = pick(rng, LOOKS)
    if rng.random() < 0.5:
        said = f"there is {article(color)} {color} shape in the {SIDES[side]} picture"
        return said, lambda pair: _count(pair[side], color=color) > 0
    return f"there is a {shape} in the {SIDES[side]} picture", lambda pair: _count(pair[side], shape=shape) > 0


def _both(rng: np.random.Generator) -> Claim:
    if rng.random() < 0.5:
        shape = pick(rng, SHAPES)
        return f"both pictures show a {shape}", lambda pair: all(_count(scene, shape=shape) for scene in pair)
    color = pick(rng, tuple(COLORS))
    said = f"both pictures show something {color}"
    return said, lambda pair: all(_count(scene, color=color) for scene in pair)


def _exactly_one(rng: np.random.Generator) -> Claim:
    shape = pick(rng, SHAPES)
    said = f"exactly one of the pictures shows a {shape}"
    return said, lambda pair: sum(_count(scene, shape=shape) > 0 for scene in pair) == 1


def _total(rng: np.random.Generator) -> Claim:
    number = int(rng.integers(1, 5))
    if rng.random() < 0.5:
        number += 1
        return f"there are {number} shapes in total", lambda pair: sum(_count(scene) for scene in pair) == number
    shape = pick(rng, SHAPES)
    said = f"there are {number} {shape}s in total" if number > 1 else f"there is one {shape} in total"
    return said, lambda pair: sum(_count(scene, shape=shape) for scene in pair) == number


def _more(rng: np.random.Generator) -> Claim:
    side = int(rng.integers(2))
    said = f"the {SIDES[side]} picture shows more shapes than the {SIDES[1 - side]} one"
    return said, lambda pair: _count(pair[side]) > _count(pair[1 - side])


def _shared(rng: np.random.Generator) -> Claim:
    name = pick(rng, ("color", "shape"))
    said = f"some {name} is in both pictures"
    return said, lambda pair: bool(set.intersection(*({getattr(i, name) for i in scene.items} for scene in pair)))


CLAIMS: dict[str, Callable[[np.random.Generator], Claim]] = {
    "one side": _one_side, "both": _both, "exactly one": _exactly_one, "total": _total, "more": _more,
    "shared": _shared,
}
