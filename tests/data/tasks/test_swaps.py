"""Swaps: each sentence is true of its own scene and false of the other."""

from collections import Counter

import numpy as np
import pytest

from vlmpipe.data.scenes import COLORS, SHAPES
from vlmpipe.data.tasks.layouts import QUARTERS, arrangement, is_held_out
from vlmpipe.data.tasks.swaps import KINDS, sample_swap


def holds(sentence: str, scene) -> bool:
    """Judged here from the words and from where things stand, apart from the code that made them."""
    words = sentence.split()
    colors, shapes = ([word for word in words if word in known] for known in (COLORS, SHAPES))
    looks = list(zip(colors, shapes, strict=True))
    found = {(item.color, item.shape): item for item in scene.items}
    if not set(looks) <= set(found):
        return False
    first, second = (found[look] for look in looks)
    dx, dy = first.x - second.x, first.y - second.y
    return {"left": dx < -0.3, "right": dx > 0.3, "above": dy < -0.3, "below": dy > 0.3}[
        next(word for word in words if word in ("left", "right", "above", "below"))
    ]


@pytest.mark.parametrize("held_out", [False, True])
def test_sentences_are_true_of_their_own_scene_alone(held_out):
    rng, kinds = np.random.default_rng(0), Counter()
    for _ in range(60):
        swap = sample_swap(rng, held_out)
        kinds[swap.kind] += 1
        for said, own, other in zip(swap.said, swap.scenes, swap.scenes[::-1], strict=True):
            assert holds(said, own) and not holds(said, other), (swap.kind, said)
            assert is_held_out(arrangement(own)) == held_out
            places = [list(QUARTERS).index(item.place) for item in own.items]
            assert places == sorted(places)
            assert all(0 <= edge <= 1 for item in own.items for edge in item.box)
        if swap.kind == "swap_obj":
            assert sorted(swap.said[0].split()) == sorted(swap.said[1].split())
    assert set(kinds) == set(KINDS)
