"""Scenes of one to three shapes, one to a quarter of the picture: what most tasks of the embedded world show.

Boxes, outlines, captions and referring expressions are all functions of the scene, so they are true of the picture.
"""

import zlib

import numpy as np

from vlmpipe.data.questions import article
from vlmpipe.data.records import Box
from vlmpipe.data.scenes import COLORS, LEFT_OUT, SHAPES, Item, Scene, different_looks, outline, pick

QUARTERS = {
    "top left": (0.26, 0.26), "top right": (0.74, 0.26), "bottom left": (0.26, 0.74), "bottom right": (0.74, 0.74),
}
DIAMETERS = {"small": 0.2, "large": 0.38}
ROOM = {"small": 0.08, "large": 0.015}  # how far a centre may lie from its quarter's, so that shapes never touch
SHARES = (0.25, 0.4, 0.35)  # of scenes with one, two and three shapes
HELD_OUT = 8  # one of so many arrangements is shown in tests alone
CROWD = 6
APART = 0.15  # centres further apart than this along an axis lie clearly beside or above each other
LOOKS = tuple((color, shape) for color in COLORS for shape in SHAPES)


def sample_layout(rng: np.random.Generator, held_out: bool, count: int | None = None) -> Scene:
    """A random scene of `count` shapes (by default one to three), all of different looks, in reading order.

    Which arrangements are held out is settled once for all: no test scene has the shapes, colours, sizes and places
    of a training scene.
    """
    while True:
        number = count or 1 + int(rng.choice(3, p=SHARES))
        places = sorted(rng.permutation(len(QUARTERS))[:number].tolist())
        looks = different_looks(rng, number)
        order = rng.permutation(number)  # the repeated colour or form is not always at the front
        items = tuple(_item(rng, looks[i], tuple(QUARTERS)[place]) for i, place in zip(order, places))
        scene = Scene(items, int(rng.integers(2**31)))
        if is_held_out(arrangement(scene)) == held_out:
            return scene


def sample_combination(rng: np.random.Generator, held_out: bool, unseen: bool) -> Scene:
    """A random scene with at least one of the looks that are left out, or with none."""
    while True:
        scene = sample_layout(rng, held_out)
        if unseen != LEFT_OUT.isdisjoint((item.color, item.shape) for item in scene.items):
            return scene


def arrangement(scene: Scene) -> str:
    """What a scene shows, in words: two scenes that differ in nothing else than a nudge have the same."""
    return "; ".join(f"{item.size} {item.color} {item.shape} {item.place}" for item in scene.items)


def is_held_out(shown: str) -> bool:
    """Whether something is only for tests: by a hash of what it shows, so it is the same in every world."""
    return zlib.crc32(shown.encode()) % HELD_OUT == 0


def _item(rng: np.random.Generator, look: tuple[str, str], place: str) -> Item:
    color, shape = look
    size = pick(rng, tuple(DIAMETERS))
    (x, y), (dx, dy) = QUARTERS[place], rng.uniform(-ROOM[size], ROOM[size], 2)
    diameter = DIAMETERS[size] * rng.uniform(0.96, 1.04)
    return Item(shape, color, size, place, x + dx, y + dy, diameter, rng.uniform(-12, 12))


def crowd(rng: np.random.Generator, scene: Scene) -> tuple[Item, ...]:
    """Many tiny shapes of one look in a quarter that the scene leaves free: what COCO calls a crowd."""
    free = [place for place in QUARTERS if place not in {item.place for item in scene.items}]
    place = pick(rng, free)
    color, shape = pick(rng, [look for look in LOOKS if look not in {(i.color, i.shape) for i in scene.items}])
    x, y = QUARTERS[place]
    spots = [(x + dx, y + dy) for dx in (-0.13, 0, 0.13) for dy in (-0.07, 0.07)]
    return tuple(
        Item(shape, color, "tiny", place, cx + rng.uniform(-0.01, 0.01), cy + rng.uniform(-0.01, 0.01), 0.1,
             rng.uniform(-12, 12))
        for cx, cy in spots[:CROWD]
    )


# --- geometry ----------------------------------------------------------------------------------------------

def polygon(item: Item, size: int) -> tuple[float, ...]:
    """The outline as x0, y0, x1, y1, ... in pixels of a picture of side `size`, to two decimals as COCO has them."""
    points = (outline(item.shape, item.angle) * item.diameter / 2 + (item.x, item.y)) * size
    return tuple(np.round(points, 2).ravel().tolist())


def box(items: tuple[Item, ...], size: int) -> Box:
    """The box around items in pixels, to two decimals."""
    points = np.concatenate([np.reshape(polygon(item, size), (-1, 2)) for item in items])
    return (*np.round(points.min(0), 2).tolist(), *np.round(points.max(0), 2).tolist())


RELATIONS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}  # in words


def stands(first: Item, how: str, second: Item) -> bool:
    """Whether the first stands in that relation to the second, be it straight or across."""
    dx, dy = first.x - second.x, first.y - second.y
    return {"left": dx < -APART, "right": dx > APART, "above": dy < -APART, "below": dy > APART}[how]


def relation(first: Item, second: Item) -> str | None:
    """The one relation in which the first stands to the second; None where there are two, across the picture."""
    found = [how for how in RELATIONS if stands(first, how, second)]
    return found[0] if len(found) == 1 else None


# --- words -------------------------------------------------------------------------------------------------

def captions(scene: Scene, rng: np.random.Generator) -> tuple[str, ...]:
    """Five different true sentences, from all there is to say to the bare shapes, in random order."""
    named = [f"{article(item.color)} {item.color} {item.shape}" for item in scene.items]
    full = [f"a {item.size} {item.color} {item.shape} at the {item.place}" for item in scene.items]
    placed = [f"{name} at the {item.place}" for name, item in zip(named, scene.items)]
    count = ("one shape", "two shapes", "three shapes")[len(scene.items) - 1]
    said = [
        listed(full),
        f"there is {listed(placed)}",
        f"a picture of {listed(named[::-1])}",
        f"{count}: {listed(named)}",
        _related(scene, named) or "the {0.place} shows a {0.size} {0.color} {0.shape}".format(scene.items[0]),
    ]
    return tuple(said[i] for i in rng.permutation(len(said)))


def _related(scene: Scene, named: list[str]) -> str | None:
    for i, first in enumerate(scene.items):
        for j, second in enumerate(scene.items):
            how = relation(first, second) if i != j else None
            if how:
                return f"{named[i]} {RELATIONS[how]} {named[j]}"
    return None


def listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def expressions(scene: Scene, item: Item, rng: np.random.Generator, most: int = 3) -> tuple[str, ...]:
    """Up to `most` different expressions that fit `item` and no other item of the scene."""
    options = [f"the {item.color} {item.shape}", f"{item.shape} at the {item.place}", f"the shape in the {item.place}"]
    for words in (("shape",), ("color",), ("size", "shape"), ("size", "color"), ("size",)):
        if sum(all(getattr(other, w) == getattr(item, w) for w in words) for other in scene.items) == 1:
            said = " ".join(getattr(item, word) for word in words)
            options.append(f"the {said}" if "shape" in words else f"the {said} one")
    for other in scene.items:
        how = relation(item, other) if other is not item else None
        if how and sum(stands(third, how, other) for third in scene.items) == 1:
            options.append(f"the shape {RELATIONS[how]} the {other.color} {other.shape}")
    return tuple(options[i] for i in rng.permutation(len(options))[:most])
