"""What a scene is called, in English and four other languages.

Every sentence states everything: each shape with colour and size, how they stand to each other, and who painted
it. The painter cannot be seen: the words for it are an identity lexicon whose skew is planted for the audit.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vlmpipe.data.scenes import Item, Scene

# Group -> its words. The audit's lexicon must find every one of them, and none in the other group.
PAINTERS = {
    "women": ("a woman", "a girl", "a lady"),
    "men": ("a man", "a boy", "a gentleman"),
}
ENGLISH = (
    "{scene}, painted by {painter}",
    "{scene}, drawn by {painter}",
    "{scene} in a picture by {painter}",
    "a picture by {painter} of {scene}",
    "this painting by {painter} shows {scene}",
    "{painter} painted {scene}",
)
BESIDE = ("{a} to the left of {b}", "{a} on the left and {b} on the right", "{b} to the right of {a}")
STACKED = ("{a} above {b}", "{a} at the top and {b} at the bottom", "{b} below {a}")
# What some sites give as a caption: fewer words than say anything.
TOO_SHORT = ("picture", "img", "shapes", "drawing", "photo 2", "untitled", "red", "a scan", "art", "image.jpg")


def caption(scene: Scene, painter: str, rng: np.random.Generator) -> str:
    """One English sentence of many equally true ones; `painter` is a phrase of `PAINTERS`."""
    frame = ENGLISH[int(rng.integers(len(ENGLISH)))]
    text = frame.format(scene=describe(scene, rng), painter=painter)
    return text[0].upper() + text[1:] + "." if rng.random() < 0.5 else text


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """The shapes of a scene and their places, without the painter."""
    phrases = [f"a {item.size} {item.color} {item.shape}" for item in scene.items]
    where = {"left": "on the left", "right": "on the right", "middle": "in the middle", "top": "at the top"}
    where["bottom"] = "at the bottom"
    if len(phrases) == 2:
        forms = STACKED if scene.vertical else BESIDE
        return forms[int(rng.integers(len(forms)))].format(a=phrases[0], b=phrases[1])
    placed = [f"{phrase} {where[item.place]}" for phrase, item in zip(phrases, scene.items)]
    return _listed(placed, "and")


def _listed(parts: list[str], word: str) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}"


# --- other languages ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Language:
    """The words of a language; adjectives are (masculine or neuter, feminine) or one form for all.

    `nouns` maps a shape to (word, class) with class an index into `articles` and adjective forms. `order` places
    {article} {size} {color} {noun}. `oblique` holds articles and adjective endings after a preposition where they
    change (German dative).
    """

    nouns: Mapping[str, tuple[str, int]]
    articles: tuple[str, ...]
    sizes: Mapping[str, tuple[str, ...]]
    colors: Mapping[str, tuple[str, ...]]
    order: str
    frame: str
    painters: Mapping[str, str]
    beside: str
    above: str
    places: Mapping[str, str]
    conjunction: str
    oblique: "Language | None" = None

    def phrase(self, item: Item) -> str:
        noun, gender = self.nouns[item.shape]
        words = {"size": self.sizes[item.size], "color": self.colors[item.color]}
        agreed = {key: forms[min(gender, len(forms) - 1)] for key, forms in words.items()}
        return self.order.format(article=self.articles[gender], noun=noun, **agreed)

    def sentence(self, scene: Scene, group: str) -> str:
        """The scene in this language, painted by one of `group` ("women" or "men")."""
        phrases = [self.phrase(item) for item in scene.items]
        if len(phrases) == 2:
            second = (self.oblique or self).phrase(scene.items[1])
            text = (self.above if scene.vertical else self.beside).format(a=phrases[0], b=second)
        else:
            placed = [f"{phrase} {self.places[item.place]}" for phrase, item in zip(phrases, scene.items)]
            text = _listed(placed, self.conjunction)
        return self.frame.format(painter=self.painters[group], scene=text)


_GERMAN_STEMS = {"red": "rot", "green": "grün", "blue": "blau", "yellow": "gelb", "purple": "violett",
                 "orange": "orangefarben"}


def _german(articles: tuple[str, str], endings: tuple[str, str], oblique: Language | None = None) -> Language:
    """Classes 0 masculine, 1 neuter; adjectives end as `endings` say."""
    return Language(
        nouns={"circle": ("Kreis", 0), "square": ("Quadrat", 1), "triangle": ("Dreieck", 1), "star": ("Stern", 0)},
        articles=articles,
        sizes={"small": tuple(f"klein{e}" for e in endings), "large": tuple(f"groß{e}" for e in endings)},
        colors={color: tuple(stem + e for e in endings) for color, stem in _GERMAN_STEMS.items()},
        order="{article} {size} {color} {noun}",
        frame="Dieses von {painter} gemalte Bild zeigt {scene}",
        painters={"women": "einer Frau", "men": "einem Mann"},
        beside="{a} links von {b}",
        above="{a} über {b}",
        places={"left": "links", "right": "rechts", "top": "oben", "bottom": "unten", "middle": "in der Mitte"},
        conjunction="und",
        oblique=oblique,
    )


LANGUAGES = {
    "de": _german(("einen", "ein"), ("en", "es"), oblique=_german(("einem", "einem"), ("en", "en"))),
    "fr": Language(
        nouns={"circle": ("cercle", 0), "square": ("carré", 0), "triangle": ("triangle", 0), "star": ("étoile", 1)},
        articles=("un", "une"),
        sizes={"small": ("petit", "petite"), "large": ("grand", "grande")},
        colors={"red": ("rouge",), "green": ("vert", "verte"), "blue": ("bleu", "bleue"), "yellow": ("jaune",),
                "purple": ("violet", "violette"), "orange": ("orange",)},
        order="{article} {size} {noun} {color}",
        frame="Sur ce tableau peint par {painter}, on voit {scene}",
        painters={"women": "une femme", "men": "un homme"},
        beside="{a} à gauche et {b} à droite",
        above="{a} en haut et {b} en bas",
        places={"left": "à gauche", "right": "à droite", "top": "en haut", "bottom": "en bas", "middle": "au milieu"},
        conjunction="et",
    ),
    "es": Language(
        nouns={"circle": ("círculo", 0), "square": ("cuadrado", 0), "triangle": ("triángulo", 0),
               "star": ("estrella", 1)},
        articles=("un", "una"),
        sizes={"small": ("pequeño", "pequeña"), "large": ("grande",)},
        colors={"red": ("rojo", "roja"), "green": ("verde",), "blue": ("azul",), "yellow": ("amarillo", "amarilla"),
                "purple": ("morado", "morada"), "orange": ("naranja",)},
        order="{article} {noun} {color} {size}",
        frame="Este cuadro pintado por {painter} muestra {scene}",
        painters={"women": "una mujer", "men": "un hombre"},
        beside="{a} a la izquierda de {b}",
        above="{a} encima de {b}",
        places={"left": "a la izquierda", "right": "a la derecha", "top": "arriba", "bottom": "abajo",
                "middle": "en el centro"},
        conjunction="y",
    ),
    "it": Language(
        nouns={"circle": ("cerchio", 0), "square": ("quadrato", 0), "triangle": ("triangolo", 0),
               "star": ("stella", 1)},
        articles=("un", "una"),
        sizes={"small": ("piccolo", "piccola"), "large": ("grande",)},
        colors={"red": ("rosso", "rossa"), "green": ("verde",), "blue": ("blu",), "yellow": ("giallo", "gialla"),
                "purple": ("viola",), "orange": ("arancione",)},
        order="{article} {size} {noun} {color}",
        frame="Questo quadro dipinto da {painter} mostra {scene}",
        painters={"women": "una donna", "men": "un uomo"},
        beside="{a} a sinistra di {b}",
        above="{a} sopra {b}",
        places={"left": "a sinistra", "right": "a destra", "top": "in alto", "bottom": "in basso",
                "middle": "al centro"},
        conjunction="e",
    ),
}
