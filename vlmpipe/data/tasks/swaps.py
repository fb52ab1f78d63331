"""Pairs of scenes that differ by a swap, and for each the sentence that is true of it and false of the other.

Kinds and their names after SugarCrepe (arXiv 2306.14610); a pair is also what Winoground has (arXiv 2204.03162).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlmpipe.data.questions import article
from vlmpipe.data.scenes import Item, Scene, pick
from vlmpipe.data.tasks.layouts import QUARTERS, RELATIONS, arrangement, is_held_out, relation, sample_layout

KINDS = ("swap_att", "swap_obj", "replace_rel")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Swap:
    """kind: `swap_att` (the two shapes exchange their colours), `swap_obj` (they exchange places, in the sentence
    too: the same words in another order) or `replace_rel` (they exchange places, in the sentence by the relation).

    `said[i]` is true of `scenes[i]` and false of the other."""

    kind: str
    scenes: tuple[Scene, Scene]
    said: tuple[str, str]


def sample_swap(rng: np.random.Generator, held_out: bool) -> Swap:
    """A random swap of two shapes of different colour and form, of which one stands straight beside or above the
    other. Both scenes are for tests, or both for training."""
    kind = pick(rng, KINDS)
    while True:
        scene = sample_layout(rng, held_out, count=2)
        order = rng.permutation(2)
        first, second = (scene.items[i] for i in order)
        how = relation(first, second)
        if how is None or first.color == second.color or first.shape == second.shape:
            continue
        items = _recolored(scene.items) if kind == "swap_att" else _moved(scene.items)
        other = Scene(items, int(rng.integers(2**31)))
        if is_held_out(arrangement(other)) == held_out:
            return Swap(kind, (scene, other), (_said(first, how, second), _false(kind, first, how, second)))


def _recolored(items: Sequence[Item]) -> tuple[Item, ...]:
    return tuple(replace(item, color=other.color) for item, other in zip(items, reversed(items)))


def _moved(items: Sequence[Item]) -> tuple[Item, ...]:
    """Each at the other's place, by its own nudge: how far it may lie from there depends on its size. In reading
    order."""
    moved = []
    for item, other in zip(items, reversed(items)):
        (x, y), (to_x, to_y) = QUARTERS[item.place], QUARTERS[other.place]
        moved.append(replace(item, place=other.place, x=item.x - x + to_x, y=item.y - y + to_y))
    return tuple(reversed(moved))


def _said(first: Item, how: str, second: Item) -> str:
    return f"{_named(first)} {RELATIONS[how]} {_named(second)}"


def _false(kind: str, first: Item, how: str, second: Item) -> str:
    if kind == "swap_att":
        return _said(replace(first, color=second.color), how, replace(second, color=first.color))
    return _said(second, how, first) if kind == "swap_obj" else _said(first, OPPOSITE[how], second)


def _named(item: Item) -> str:
    return f"{article(item.color)} {item.color} {item.shape}"
