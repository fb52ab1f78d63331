"""The embedded world: drawn scenes of one or two coloured shapes, known to the last coordinate.

A `Scene` is a value: what stands where, and the seed of its background. Drawing, captions (`captions.py`) and
questions (`questions.py`) are all functions of it, so whatever they say is true of the picture by construction.

Coordinates are shares of the picture's side, origin at the top left, so a scene can be drawn at any size.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SHAPES = ("circle", "square", "triangle", "star")
COLORS = {
    "red": (214, 40, 46),
    "green": (38, 150, 66),
    "blue": (36, 84, 200),
    "yellow": (247, 208, 30),
    "purple": (132, 50, 160),
    "orange": (240, 128, 24),
}
# A look of each colour, for where combinations are left out of training; each colour and each shape has others.
LEFT_OUT = frozenset((color, SHAPES[number % len(SHAPES)]) for number, color in enumerate(COLORS))
# Large enough to tell the forms apart in a 64-pixel copy.
DIAMETERS = {"small": 0.2, "large": 0.4}
PLACES = ("left", "right", "top", "bottom", "middle")
# Where one or two shapes stand. Along one axis the order is clear at a glance: that keeps "left of" true.
ROWS = {
    1: (("left",), ("right",), ("top",), ("bottom",), ("middle",)),
    2: (("left", "right"), ("top", "bottom")),
}
SPOTS = {"left": (0.25, 0.5), "right": (0.75, 0.5), "top": (0.5, 0.25), "bottom": (0.5, 0.75), "middle": (0.5, 0.5)}
# Share of scenes where a further shape repeats the colour or the form of the first: what counting needs.
REPEAT = 0.4
SUPERSAMPLE = 4
DIM = [value * 2 // 5 for value in range(256)]  # how dark a shadow is


@dataclass(frozen=True)
class Item:
    """One shape: what it is, the word for its place, its centre (x, y), diameter and angle in degrees."""

    shape: str
    color: str
    size: str
    place: str
    x: float
    y: float
    diameter: float
    angle: float

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of the outline as shares of the side."""
        points = outline(self.shape, self.angle)
        half = self.diameter / 2
        xs, ys = self.x + half * points[:, 0], self.y + half * points[:, 1]
        return float(xs.min()), float(ys.min()), float(xs.max()), float(ys.max())


@dataclass(frozen=True)
class Scene:
    """One or two items in order from left to right or top to bottom, and the seed of the background."""

    items: tuple[Item, ...]
    background: int

    @classmethod
    def sample(cls, rng: np.random.Generator, without: frozenset[tuple[str, str]] = frozenset()) -> "Scene":
        """A random scene. All (colour, shape) pairs in it differ, so "the red circle" names one item; none is one of
        those that it is `without`."""
        row = pick(rng, ROWS[int(rng.integers(1, 1 + len(ROWS)))])
        looks = different_looks(rng, len(row))
        while not without.isdisjoint(looks):
            looks = different_looks(rng, len(row))
        # The repeated colour or form is not always at the front.
        order = rng.permutation(len(row))
        items = tuple(_item(rng, *looks[i], place) for i, place in zip(order, row))
        return cls(items, int(rng.integers(2**31)))

    @property
    def vertical(self) -> bool:
        """Whether several items stand in a column rather than in a row."""
        return len(self.items) > 1 and self.items[0].place == "top"

    def draw(self, size: int = 224) -> Image.Image:
        """The scene as an RGB picture of `size` x `size` pixels; the same scene gives the same pixels."""
        image = background(self.background, size)
        for item in self.items:
            _draw_item(image, item, size)
        return image


def pick(rng: np.random.Generator, choices):
    return choices[int(rng.integers(len(choices)))]


def different_looks(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """`count` different (colour, shape) pairs, among which colours and shapes repeat."""
    looks: list[tuple[str, str]] = []
    while len(looks) < count:
        look = _look(rng, looks)
        if look not in looks:
            looks.append(look)
    return looks


def _look(rng: np.random.Generator, before: list[tuple[str, str]]) -> tuple[str, str]:
    color, shape = pick(rng, tuple(COLORS)), pick(rng, SHAPES)
    if before and rng.random() < REPEAT:
        return (before[0][0], shape) if rng.random() < 0.5 else (color, before[0][1])
    return color, shape


def _item(rng: np.random.Generator, color: str, shape: str, place: str) -> Item:
    size = pick(rng, tuple(DIAMETERS))
    x, y = SPOTS[place]
    # Little room along the axis that names the place, so that two large shapes never touch; more across it.
    along, across = rng.uniform(-0.01, 0.01), rng.uniform(-0.1, 0.1)
    if place in ("top", "bottom"):
        dx, dy = across, along
    elif place == "middle":
        dx, dy = along, along * rng.choice((-1, 1))
    else:
        dx, dy = along, across
    diameter = DIAMETERS[size] * rng.uniform(0.96, 1.04)
    return Item(shape, color, size, place, x + dx, y + dy, diameter, rng.uniform(-12, 12))


# --- drawing -----------------------------------------------------------------------------------------------

def outline(shape: str, angle: float) -> np.ndarray:
    """The outline's corners, float [P, 2] inside the unit circle, y downwards, turned by `angle` degrees."""
    corners = np.array(_unit_outline(shape))
    turn = math.radians(angle)
    return corners @ np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])


@functools.cache
def _unit_outline(shape: str) -> tuple[tuple[float, float], ...]:
    counts = {"circle": 64, "square": 4, "triangle": 3, "star": 10}
    steps = counts[shape]
    start = -math.pi / 4 if shape == "square" else -math.pi / 2
    radii = [1.0 if shape != "star" or i % 2 == 0 else 0.45 for i in range(steps)]
    # A circle fills its disc best; without this the others look smaller at the same diameter.
    scale = {"circle": 0.9, "square": 1.06, "triangle": 1.08, "star": 1.12}[shape]
    lift = 0.12 if shape == "triangle" else 0.0
    angles = [start + 2 * math.pi * i / steps for i in range(steps)]
    return tuple((scale * r * math.cos(a), scale * r * math.sin(a) + lift) for r, a in zip(radii, angles))


def _draw_item(image: Image.Image, item: Item, size: int) -> None:
    side = max(8, round(item.diameter * size * 1.5))
    left, top = round(item.x * size - side / 2), round(item.y * size - side / 2)
    # The patch snaps to whole pixels; what is left over goes into the outline, so geometry stays exact.
    offset = np.array([item.x * size - left, item.y * size - top])
    points = outline(item.shape, item.angle) * item.diameter * size / 2 + offset
    mask = _mask(points, side)
    shadow = ImageChops.offset(mask, max(1, side // 32)).filter(ImageFilter.GaussianBlur(side / 24))
    image.paste((30, 30, 40), (left, top), shadow.point(DIM))
    image.paste(_edge_color(item.color), (left, top), mask)
    inner = _mask((points - offset) * 0.9 + offset, side)
    image.paste(_shaded(item.color, side), (left, top), inner)


def _mask(points: np.ndarray, side: int) -> Image.Image:
    big = Image.new("L", (side * SUPERSAMPLE, side * SUPERSAMPLE))
    ImageDraw.Draw(big).polygon([(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in points.tolist()], fill=255)
    return big.resize((side, side), Image.Resampling.BOX)


def _edge_color(color: str) -> tuple[int, int, int]:
    return tuple(int(channel * 0.72) for channel in COLORS[color])


@functools.lru_cache(maxsize=256)
def _shaded(color: str, side: int) -> Image.Image:
    """A patch of the colour, lit from the top left."""
    ramp = np.linspace(1.12, 0.9, side)
    light = (ramp[:, None] + ramp[None, :]) / 2
    pixels = np.array(COLORS[color])[None, None] * light[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def background(seed: int, size: int) -> Image.Image:
    """Soft washes of two pale tones on grained paper.

    The washes vary at the few coarse frequencies that perceptual hashes look at: two scenes with the same
    shapes in the same places stay two pictures to a deduplicator.
    """
    rng = np.random.default_rng(seed)
    light, dark = _tones(rng)
    wash = Image.fromarray(rng.uniform(0, 1, (7, 7)).astype(np.float32))
    mix = np.array(wash.resize((size, size), Image.Resampling.BICUBIC))
    gradient = np.linspace(-0.25, 0.25, size, dtype=np.float32)
    turn = rng.uniform(0, 2 * math.pi)
    mix += math.cos(turn) * gradient[None, :] + math.sin(turn) * gradient[:, None]
    mix += np.roll(_grain(size), rng.integers(size, size=2), (0, 1))
    mask = Image.fromarray((np.clip(mix, 0, 1) * 255).astype(np.uint8))
    return Image.composite(Image.new("RGB", (size, size), dark), Image.new("RGB", (size, size), light), mask)


@functools.lru_cache(maxsize=4)
def _grain(size: int) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.02, (size, size)).astype(np.float32)


def _tones(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two pale RGB tones: never as strong as a shape's colour."""
    hue = rng.uniform(0, 2 * math.pi)
    phases = np.array([0, 2 * math.pi / 3, 4 * math.pi / 3])
    light = rng.uniform(222, 244) + rng.uniform(2, 14) * np.cos(hue + phases)
    dark = rng.uniform(150, 176) + rng.uniform(4, 22) * np.cos(hue + rng.uniform(-1.2, 1.2) + phases)
    return tuple(int(v) for v in light), tuple(int(v) for v in dark)
