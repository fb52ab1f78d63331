"""CLEVR's kind of question: a chain of small functions over the scene, put into words; running it gives the answer.

Functions and question families after Johnson et al. 2017 (arXiv 1612.06890, appendix A). There is one picture plane
here, so things stand above and below each other where CLEVR's stand behind and in front.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from vlmpipe.data.questions import Question, article
from vlmpipe.data.records import Step
from vlmpipe.data.scenes import COLORS, SHAPES, Item, Scene, pick
from vlmpipe.data.tasks.layouts import RELATIONS, stands

ATTRIBUTES = ("size", "color", "shape")  # in the order in which English has them
VALUES = {"size": ("small", "large"), "color": tuple(COLORS), "shape": SHAPES}
ASKED = {"size": "What size is {}?", "color": "What color is {}?", "shape": "What shape is {}?"}
Look = dict[str, str]
Said = tuple[str, tuple[Step, ...]]  # a question in words and its program


@dataclass(frozen=True)
class Asked(Question):
    """A question with its program; `kind` is the number of its family."""

    program: tuple[Step, ...]


def run(program: Sequence[Step], scene: Scene) -> str:
    """The answer: what the last step gives, as a word."""
    given: list[Any] = []
    for step in program:
        given.append(_apply(step, [given[i] for i in step.inputs], scene))
    answer = given[-1]
    return {True: "yes", False: "no"}[answer] if isinstance(answer, bool) else str(answer)


def _apply(step: Step, inputs: list, scene: Scene) -> Any:
    verb, _, name = step.function.partition("_")
    if verb == "filter":
        return [item for item in inputs[0] if getattr(item, name) == step.values[0]]
    if verb == "query":
        return getattr(inputs[0], name)
    if verb == "equal":
        return inputs[0] == inputs[1]
    return _PLAIN[step.function](scene, step, *inputs)


def _unique(scene: Scene, step: Step, items: list[Item]) -> Item:
    assert len(items) == 1, "a program asks for the one thing where there are others or none"
    return items[0]


_PLAIN: dict[str, Callable] = {
    "scene": lambda scene, step: list(scene.items),
    "unique": _unique,
    "relate": lambda scene, step, item: [other for other in scene.items if stands(other, step.values[0], item)],
    "count": lambda scene, step, items: len(items),
    "exist": lambda scene, step, items: len(items) > 0,
    "greater_than": lambda scene, step, first, second: first > second,
}


# --- building ----------------------------------------------------------------------------------------------

class _Chain:
    """A program as it grows; every method appends steps and gives the number of the last."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def step(self, function: str, *inputs: int, values: tuple[str, ...] = ()) -> int:
        self.steps.append(Step(function, inputs, values))
        return len(self.steps) - 1

    def filter(self, start: int, look: Look) -> int:
        for name in ATTRIBUTES:
            if name in look:
                start = self.step(f"filter_{name}", start, values=(look[name],))
        return start

    def all(self, look: Look) -> int:
        return self.filter(self.step("scene"), look)

    def the(self, look: Look) -> int:
        return self.step("unique", self.all(look))

    def asked(self, text: str) -> Said:
        return text, tuple(self.steps)


def phrase(look: Look, plural: bool = False) -> str:
    """ "small red circle"; "thing" where the shape isn't said. """
    words = [look[name] for name in ATTRIBUTES if name in look]
    noun = [] if "shape" in look else ["thing"]
    return " ".join(words + noun) + ("s" if plural else "")


def _one(look: Look) -> str:
    words = phrase(look)
    return f"{article(words)} {words}"


def _matching(scene: Scene, look: Look) -> list[Item]:
    return [item for item in scene.items if all(getattr(item, name) == value for name, value in look.items())]


def _names(scene: Scene, item: Item, without: str | None = None) -> list[Look]:
    """The looks that fit this item alone, with no more said than `without` allows."""
    known = [name for name in ATTRIBUTES if name != without]
    subsets = [subset for count in (1, 2) for subset in combinations(known, count)]
    looks = [{name: getattr(item, name) for name in subset} for subset in subsets]
    return [look for look in looks if len(_matching(scene, look)) == 1]


def _some_name(rng: np.random.Generator, scene: Scene, item: Item, without: str | None = None) -> Look | None:
    names = _names(scene, item, without)
    return pick(rng, names) if names else None


def _some_look(rng: np.random.Generator, scene: Scene) -> Look:
    """One or two attributes; half of the time those of something in the scene."""
    names = [name for name in ATTRIBUTES if rng.random() < 0.5] or ["shape"]
    item = pick(rng, scene.items)
    seen = rng.random() < 0.5
    return {name: getattr(item, name) if seen else pick(rng, VALUES[name]) for name in names[:2]}


# --- families ----------------------------------------------------------------------------------------------

def _query(name: str) -> Callable:
    """What color is the large star?"""
    def ask(scene: Scene, rng: np.random.Generator) -> Said | None:
        look = _some_name(rng, scene, pick(rng, scene.items), without=name)
        if look is None:
            return None
        chain = _Chain()
        chain.step(f"query_{name}", chain.the(look))
        return chain.asked(ASKED[name].format(f"the {phrase(look)}"))
    return ask


def _query_related(name: str) -> Callable:
    """What color is the thing left of the large star?"""
    def ask(scene: Scene, rng: np.random.Generator) -> Said | None:
        anchor, how = pick(rng, scene.items), pick(rng, tuple(RELATIONS))
        look = _some_name(rng, scene, anchor)
        if look is None or sum(stands(item, how, anchor) for item in scene.items) != 1:
            return None
        chain = _Chain()
        chain.step(f"query_{name}", chain.step("unique", chain.step("relate", chain.the(look), values=(how,))))
        return chain.asked(ASKED[name].format(f"the thing {RELATIONS[how]} the {phrase(look)}"))
    return ask


def _count(scene: Scene, rng: np.random.Generator) -> Said:
    look, chain = _some_look(rng, scene), _Chain()
    chain.step("count", chain.all(look))
    return chain.asked(f"How many {phrase(look, plural=True)} are there?")


def _exist(scene: Scene, rng: np.random.Generator) -> Said:
    look, chain = _some_look(rng, scene), _Chain()
    chain.step("exist", chain.all(look))
    return chain.asked(f"Is there {_one(look)}?")


def _exist_related(scene: Scene, rng: np.random.Generator) -> Said | None:
    anchor, how = pick(rng, scene.items), pick(rng, tuple(RELATIONS))
    look = _some_name(rng, scene, anchor)
    if look is None:
        return None
    chain = _Chain()
    chain.step("exist", chain.step("relate", chain.the(look), values=(how,)))
    return chain.asked(f"Is there anything {RELATIONS[how]} the {phrase(look)}?")


def _greater(scene: Scene, rng: np.random.Generator) -> Said | None:
    first, second = _some_look(rng, scene), _some_look(rng, scene)
    if first == second:
        return None
    chain = _Chain()
    chain.step("greater_than", chain.step("count", chain.all(first)), chain.step("count", chain.all(second)))
    return chain.asked(f"Are there more {phrase(first, True)} than {phrase(second, True)}?")


def _equal(name: str) -> Callable:
    """Does the circle have the same color as the star?"""
    def ask(scene: Scene, rng: np.random.Generator) -> Said | None:
        if len(scene.items) < 2:
            return None
        first, second = (scene.items[i] for i in rng.permutation(len(scene.items))[:2])
        looks = [_some_name(rng, scene, item, without=name) for item in (first, second)]
        if None in looks:
            return None
        chain = _Chain()
        asked = [chain.step(f"query_{name}", chain.the(look)) for look in looks]
        chain.step(f"equal_{name}", *asked)
        first_said, second_said = (phrase(look) for look in looks)
        return chain.asked(f"Does the {first_said} have the same {name} as the {second_said}?")
    return ask


FAMILIES: tuple[Callable[[Scene, np.random.Generator], Said | None], ...] = (
    *map(_query, ATTRIBUTES), *map(_query_related, ATTRIBUTES), _count, _exist, _exist_related, _greater,
    *map(_equal, ATTRIBUTES),
)


def candidates(scene: Scene, kind: str, rng: np.random.Generator, tries: int = 6) -> list[Asked]:
    """A few different questions of the family of number `kind`; none where the scene has none."""
    said = dict(filter(None, (FAMILIES[int(kind)](scene, rng) for _ in range(tries))))
    return [Asked(kind, text, run(program, scene), program) for text, program in said.items()]
