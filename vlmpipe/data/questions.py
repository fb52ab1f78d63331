"""Questions that only the picture answers: for each wording, every answer is about as frequent.

A model that never looks can do no better than the most frequent answer to each wording (`blind_accuracy`).
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmpipe.data.scenes import COLORS, SHAPES, Item, Scene

# How many questions of each kind in a round of twenty. Two-way questions are few: a coin answers half of them.
MIX = {"color": 5, "shape": 4, "position": 4, "count": 3, "presence": 2, "size": 2}


@dataclass(frozen=True)
class Question:
    """A question of one `kind` of `MIX`, and its one right answer: a word or a digit."""

    kind: str
    text: str
    answer: str


def candidates(scene: Scene, kind: str, rng: np.random.Generator) -> list[Question]:
    """Every question of `kind` whose answer the scene settles."""
    asked = {"color": _colors, "shape": _shapes, "position": _positions, "count": _counts, "size": _sizes}
    if kind == "presence":
        return _presence(scene, rng)
    return [Question(kind, text, answer) for text, answer in asked[kind](scene)]


def ask(
    scenes: Sequence[Any], per_scene: int, rng: np.random.Generator, mix: Mapping[str, int] = MIX,
    options: Callable[[Any, str, np.random.Generator], Sequence[Question]] = candidates,
) -> list[list[Any]]:
    """`per_scene` different questions on each scene, chosen so that a wording's answers stay balanced.

    `mix`: how many questions of each kind in a round; `options`: the questions of a kind on a scene.
    """
    kinds = _rounds(rng, mix)
    counts: dict[str, Counter] = defaultdict(Counter)
    asked = []
    for scene in scenes:
        chosen: list[Question] = []
        while len(chosen) < per_scene:
            open_ = [q for q in options(scene, next(kinds), rng) if q not in chosen]
            if open_:
                chosen.append(_rarest(open_, counts, rng))
        asked.append(chosen)
    return asked


def blind_accuracy(train: Iterable[tuple[str, str]], test: Iterable[tuple[str, str]]) -> float:
    """Accuracy on `test` (question, answer) pairs of the most frequent answer in `train` to the same words."""
    seen: dict[str, Counter] = defaultdict(Counter)
    for text, answer in train:
        seen[text][answer] += 1
    right = [text in seen and seen[text].most_common(1)[0][0] == answer for text, answer in test]
    return float(np.mean(right))


def _rounds(rng: np.random.Generator, mix: Mapping[str, int]):
    round_ = [kind for kind, count in mix.items() for _ in range(count)]
    while True:
        yield from (round_[i] for i in rng.permutation(len(round_)))


def _rarest(options: list[Question], counts: dict[str, Counter], rng: np.random.Generator) -> Question:
    """The option whose answer its wording has had least often; ties at random."""
    def excess(question: Question) -> float:
        had = counts[question.text]
        return had[question.answer] - had.total() / max(1, len(had))

    order = rng.permutation(len(options))
    best = min(order, key=lambda i: (excess(options[i]), counts[options[i].text][options[i].answer]))
    counts[options[best].text][options[best].answer] += 1
    return options[best]


def _unique(scene: Scene, *keys: str) -> list[tuple[tuple[str, ...], Item]]:
    """Items that the attributes `keys` alone tell apart from the others, with those attributes."""
    looks = [tuple(getattr(item, key) for key in keys) for item in scene.items]
    return [(look, item) for look, item in zip(looks, scene.items) if looks.count(look) == 1]


def _colors(scene: Scene) -> list[tuple[str, str]]:
    return [(f"What color is the {shape}?", item.color) for (shape,), item in _unique(scene, "shape")]


def _shapes(scene: Scene) -> list[tuple[str, str]]:
    return [(f"What shape is the {color} object?", item.shape) for (color,), item in _unique(scene, "color")]


def _positions(scene: Scene) -> list[tuple[str, str]]:
    by_shape = [(f"Where is the {shape}?", item.place) for (shape,), item in _unique(scene, "shape")]
    by_color = [(f"Where is the {color} object?", item.place) for (color,), item in _unique(scene, "color")]
    return by_shape + by_color


def _sizes(scene: Scene) -> list[tuple[str, str]]:
    return [(f"Is the {shape} small or large?", item.size) for (shape,), item in _unique(scene, "shape")]


def _counts(scene: Scene) -> list[tuple[str, str]]:
    asked = [("How many shapes are there?", str(len(scene.items)))]
    for key, values, plural in (("color", COLORS, "{} shapes"), ("shape", SHAPES, "{}s")):
        had = Counter(getattr(item, key) for item in scene.items)
        asked += [(f"How many {plural.format(value)} are there?", str(had[value])) for value in values]
    return asked


def _presence(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Yes or no with even odds; half of the absent pairs share a colour or a form with something present."""
    present = [(item.color, item.shape) for item in scene.items]
    absent = [(color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in present]
    if rng.random() < 0.5:
        close = [look for look in absent if any(look[0] == c or look[1] == s for c, s in present)]
        absent = close
    pairs, answer = (present, "yes") if rng.random() < 0.5 else (absent, "no")
    return [Question("presence", f"Is there {article(color)} {color} {shape}?", answer) for color, shape in pairs]


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
