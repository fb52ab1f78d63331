"""Scenes with words in them: coloured signs, alone, above each other, or with a shape (TextVQA, TextCaps)."""

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlmpipe.data.questions import Question, article
from vlmpipe.data.records import Box, SceneText
from vlmpipe.data.scenes import COLORS, SHAPES, SUPERSAMPLE, Item, Scene, pick
from vlmpipe.data.tasks.layouts import DIAMETERS, is_held_out, listed

WORDS = (
    "open", "exit", "stop", "cafe", "taxi", "bus", "sale", "hot", "cold", "east", "west", "zoo", "park", "bank", "shop",
    "gate", "milk", "tea", "fish", "ice", "key", "map", "new", "sun",
)
HEIGHT, WIDTH = 0.36, 0.8  # of a sign, as shares of the picture's side
TEXT = 0.78  # of the sign's width that a word may fill
BANDS = {"top": 0.26, "bottom": 0.74}
LIGHT = ("yellow", "orange")  # these signs have dark letters
QUESTIONS = ("word", "place", "color", "count")


@dataclass(frozen=True)
class Sign:
    """One sign: its word, its colour, and the band it fills."""

    word: str
    color: str
    place: str

    @property
    def box(self) -> Box:
        """Of the board, as shares of the picture's side."""
        y = BANDS[self.place]
        return (1 - WIDTH) / 2, y - HEIGHT / 2, (1 + WIDTH) / 2, y + HEIGHT / 2


@dataclass(frozen=True)
class Street:
    """One or two signs of different colours and words, and at most one shape where a sign leaves room."""

    signs: tuple[Sign, ...]
    items: tuple[Item, ...]
    background: int

    def draw(self, size: int) -> Image.Image:
        """RGB, `size` x `size`."""
        image = Scene(self.items, self.background).draw(size)
        for sign in self.signs:
            _draw(image, sign, size)
        return image

    def texts(self, size: int) -> tuple[SceneText, ...]:
        """The words with the boxes around their letters."""
        return tuple(SceneText(sign.word, _letters(sign, size)[1]) for sign in self.signs)


def sample_street(rng: np.random.Generator, held_out: bool) -> Street:
    """A random street; what it shows (words, colours, places) is either held out or for training."""
    while True:
        count = 1 + int(rng.integers(2))
        places = [tuple(BANDS)[i] for i in sorted(rng.permutation(2)[:count])]
        words, colors = rng.permutation(len(WORDS))[:count], rng.permutation(len(COLORS))
        signs = tuple(Sign(WORDS[w], tuple(COLORS)[c], place) for w, c, place in zip(words, colors, places))
        items = () if count == 2 else _shape(rng, signs[0], tuple(COLORS)[colors[-1]])
        shown = "; ".join(f"{s.word} {s.color} {s.place}" for s in signs) + "".join(f"; {i.shape}" for i in items)
        if is_held_out(shown) == held_out:
            return Street(signs, items, int(rng.integers(2**31)))


def _shape(rng: np.random.Generator, sign: Sign, color: str) -> tuple[Item, ...]:
    place = "bottom" if sign.place == "top" else "top"
    x = rng.uniform(0.3, 0.7)
    return (Item(pick(rng, SHAPES), color, "large", place, x, BANDS[place], DIAMETERS["large"], rng.uniform(-12, 12)),)


# --- drawing -----------------------------------------------------------------------------------------------

def _draw(image: Image.Image, sign: Sign, size: int) -> None:
    left, top, right, bottom = (round(edge * size) for edge in sign.box)
    image.paste(COLORS[sign.color], (left, top), _board(right - left, bottom - top))
    mask, (x, y, _, _) = _letters(sign, size)
    image.paste((25, 25, 30) if sign.color in LIGHT else (250, 250, 250), (round(x * size), round(y * size)), mask)


@functools.lru_cache(maxsize=32)
def _board(width: int, height: int) -> Image.Image:
    big = Image.new("L", (width * SUPERSAMPLE, height * SUPERSAMPLE))
    ImageDraw.Draw(big).rounded_rectangle((0, 0, *(side - 1 for side in big.size)), radius=big.height // 6, fill=255)
    return big.resize((width, height), Image.Resampling.BOX)


def _letters(sign: Sign, size: int) -> tuple[Image.Image, Box]:
    """The word as a mask no larger than its letters, and its box as shares of the picture's side."""
    mask = _word(sign.word, size)
    left, top = round(size / 2 - mask.width / 2), round(BANDS[sign.place] * size - mask.height / 2)
    return mask, tuple(edge / size for edge in (left, top, left + mask.width, top + mask.height))


@functools.lru_cache(maxsize=256)
def _word(word: str, size: int) -> Image.Image:
    """As large as the sign allows, in the font that Pillow carries; all words of one height, by their capitals."""
    text = word.upper()
    for points in range(round(HEIGHT * size), 4, -1):
        font = ImageFont.load_default(points)
        left, top, right, bottom = (round(edge) for edge in font.getbbox(text))
        if right - left <= TEXT * WIDTH * size and bottom - top <= 0.6 * HEIGHT * size:
            break
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), text, fill=255, font=font)
    return mask


# --- words -------------------------------------------------------------------------------------------------

def questions(street: Street, kind: str) -> list[Question]:
    """Every question of a kind of `QUESTIONS` that the street answers."""
    if kind == "count":
        return [Question(kind, "How many signs are there?", str(len(street.signs)))]
    asked = []
    for sign in street.signs:
        asked += {
            "word": [(f"What does the {sign.color} sign say?", sign.word), *_by_shape(street, sign)],
            "place": [(f"Where is the sign that says {sign.word}?", sign.place),
                      (f"What is written at the {sign.place}?", sign.word)],
            "color": [(f"What color is the sign that says {sign.word}?", sign.color)],
        }[kind]
    return [Question(kind, text, answer) for text, answer in asked]


def _by_shape(street: Street, sign: Sign) -> list[tuple[str, str]]:
    how = "above" if sign.place == "top" else "below"
    return [(f"What is written {how} the {item.shape}?", sign.word) for item in street.items]


def captions(street: Street, rng: np.random.Generator) -> tuple[str, ...]:
    """Five different true sentences, each with every word that stands there."""
    named = [f"{article(sign.color)} {sign.color} sign that says {sign.word}" for sign in street.signs]
    words = " and ".join(sign.word for sign in street.signs)
    plural = "sign reads" if len(street.signs) == 1 else "signs read"
    shapes = [f"{article(item.color)} {item.color} {item.shape}" for item in street.items]
    said = [
        listed(named + shapes),
        f"the {plural} {words}",
        listed([f"{sign.word} is written at the {sign.place}" for sign in street.signs]),
        f"a picture of {listed(named)}",
        listed([f"{sign.word} on {sign.color}" for sign in street.signs] + shapes),
    ]
    return tuple(said[i] for i in rng.permutation(len(said)))
