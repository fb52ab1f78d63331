"""What is wrong with the embedded world's pairs, and how much of it: the faults that curation has to find.

Every pair starts sound (`Draft`): a scene and a true sentence. A fault is a function that spoils one draft and says
what it did, so that what was planted is known row by row. A row carries at most one fault.
"""

import dataclasses
import io
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from PIL import Image, ImageEnhance

from vlmpipe.data.captions import LANGUAGES, PAINTERS, TOO_SHORT, caption
from vlmpipe.data.scenes import Scene, background
from vlmpipe.data.web import Page
from vlmpipe.errors import UserError

QUALITY = 90
SLOW_S = 0.4
PRIVATE = ("http://169.254.169.254/latest/meta-data/", "http://127.0.0.1:1/picture.jpg", "file:///etc/hostname")
ERROR_PAGE = b"<!doctype html><html><head><title>Not here</title></head><body><h1>Not here</h1></body></html>"


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """Random numbers of their own for everything with a name: one part of the world does not move another."""
    return np.random.default_rng([seed, *(zlib.crc32(str(name).encode()) for name in names)])


def jpeg(image: Image.Image, quality: int = QUALITY) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@dataclass(frozen=True)
class Draft:
    """A sound pair: `caption` is true of `scene`, and `painter` is a phrase of `group`."""

    pool: str
    number: int
    scene: Scene
    group: str
    painter: str
    caption: str

    def url(self, host: str = "images") -> str:
        return f"http://{host}.scenes.test/{self.pool}/{self.number:05d}.jpg"


@dataclass(frozen=True)
class Row:
    """One pair of the pool's list, what its URL answers, and the truth about it.

    `fault` is null for a sound pair. `recovers` marks faults that a patient downloader gets over: such a row is
    right when it is kept. `true_caption` is null where no picture comes.
    """

    url: str
    caption: str
    page: Page
    fault: str | None = None
    recovers: bool = False
    group: str | None = None
    language: str = "en"
    true_caption: str | None = None
    twin_url: str | None = None
    evaluation_image: int | None = None


@dataclass
class Material:
    """What faults are made of: random numbers of this row, picture side in pixels, twins and evaluation scenes, and
    looks that nothing has."""

    rng: np.random.Generator
    size: int
    twins: Iterator[Draft]
    evaluation: Iterator[tuple[int, Scene]]
    without: frozenset[tuple[str, str]]


def sound(draft: Draft, size: int) -> Row:
    return _row(draft, jpeg(draft.scene.draw(size)))


def _row(draft: Draft, body: bytes, host: str = "images", said: str | None = None, **page) -> Row:
    """A row whose picture, if it comes, is still the draft's; `page` as in `Page`."""
    url = draft.url(host)
    return Row(
        url, draft.caption if said is None else said, Page(url, body, **page),
        group=draft.group, true_caption=draft.caption,
    )


def _lost(draft: Draft, host: str = "images", body: bytes = b"", **page) -> Row:
    """A row behind which there is no picture."""
    return dataclasses.replace(_row(draft, body, host, **page), true_caption=None)


# --- faults of the web -------------------------------------------------------------------------------------

def dead_404(draft: Draft, material: Material) -> Row:
    return _lost(draft, body=b"not found", status=404, content_type="text/plain")


def dead_410(draft: Draft, material: Material) -> Row:
    return _lost(draft, body=b"gone", status=410, content_type="text/plain")


def dead_host(draft: Draft, material: Material) -> Row:
    return _lost(draft, "closed-down", listens=False)


def busy(draft: Draft, material: Material) -> Row:
    return _row(draft, _picture(draft, material), "busy", first_status=429)


def busy_forever(draft: Draft, material: Material) -> Row:
    return _lost(draft, "overrun", status=429)


def unavailable(draft: Draft, material: Material) -> Row:
    return _row(draft, _picture(draft, material), first_status=503)


def slow(draft: Draft, material: Material) -> Row:
    return _row(draft, _picture(draft, material), "slow", delay=SLOW_S * float(material.rng.uniform(0.5, 1.5)))


def endless(draft: Draft, material: Material) -> Row:
    return _lost(draft, "slow", body=_picture(draft, material)[:1000], endless=True)


def truncated(draft: Draft, material: Material) -> Row:
    body = _picture(draft, material)
    return _lost(draft, body=body[: int(len(body) * material.rng.uniform(0.2, 0.8))], claimed=len(body))


def not_an_image(draft: Draft, material: Material) -> Row:
    kind = "text/html" if material.rng.random() < 0.5 else "image/jpeg"
    return _lost(draft, body=ERROR_PAGE, content_type=kind)


def broken_image(draft: Draft, material: Material) -> Row:
    """All bytes arrive, and they do not decode: the end is missing, or the header is damaged."""
    body = _picture(draft, material)
    if material.rng.random() < 0.5:
        return _lost(draft, body=body[: len(body) // 2])
    return _lost(draft, body=body[:20] + material.rng.bytes(600) + body[620:])


def private_redirect(draft: Draft, material: Material) -> Row:
    return _lost(draft, status=302, location=PRIVATE[int(material.rng.integers(len(PRIVATE)))])


def opt_out(draft: Draft, material: Material) -> Row:
    return _row(draft, _picture(draft, material), robots="noai")


# --- faults of the pair ------------------------------------------------------------------------------------

def exact_duplicate(draft: Draft, material: Material) -> Row:
    """The same bytes at another address, every other time with another true caption."""
    twin = next(material.twins)
    said = twin.caption if material.rng.random() < 0.5 else _paraphrase(twin, material)
    return _twin_row(draft, twin, jpeg(twin.scene.draw(material.size)), said)


def near_duplicate(draft: Draft, material: Material) -> Row:
    """The same picture once more: compressed, resized, brightened or cropped by a pixel."""
    twin = next(material.twins)
    image = twin.scene.draw(material.size)
    variant = VARIANTS[int(material.rng.integers(len(VARIANTS)))](image)
    return _twin_row(draft, twin, jpeg(variant, int(material.rng.integers(60, 86))), _paraphrase(twin, material))


def swapped(draft: Draft, material: Material) -> Row:
    """The caption of another picture."""
    other = Scene.sample(material.rng, material.without)
    while _looks(other) == _looks(draft.scene):
        other = Scene.sample(material.rng, material.without)
    return _row(draft, _picture(draft, material), said=caption(other, draft.painter, material.rng))


def tiny(draft: Draft, material: Material) -> Row:
    return _row(draft, jpeg(draft.scene.draw(int(material.rng.integers(20, 41)))))


def wide(draft: Draft, material: Material) -> Row:
    """A banner five to seven times as wide as high."""
    height = max(8, material.size * 2 // 3)
    width = int(height * material.rng.uniform(5, 7))
    banner = background(draft.scene.background, height).resize((width, height))
    banner.paste(draft.scene.draw(height), (int(material.rng.integers(width - height)), 0))
    return _row(draft, jpeg(banner))


def foreign(draft: Draft, material: Material) -> Row:
    code = tuple(LANGUAGES)[int(material.rng.integers(len(LANGUAGES)))]
    said = LANGUAGES[code].sentence(draft.scene, draft.group)
    return dataclasses.replace(_row(draft, _picture(draft, material), said=said), language=code)


def too_short(draft: Draft, material: Material) -> Row:
    said = TOO_SHORT[int(material.rng.integers(len(TOO_SHORT)))]
    return dataclasses.replace(_row(draft, _picture(draft, material), said=said), group=None)


def in_evaluation(draft: Draft, material: Material) -> Row:
    """A picture of the test questions, compressed once more."""
    image_id, scene = next(material.evaluation)
    said = caption(scene, draft.painter, material.rng)
    row = _row(draft, jpeg(scene.draw(material.size), 75), said=said)
    return dataclasses.replace(row, true_caption=said, evaluation_image=image_id)


def _picture(draft: Draft, material: Material) -> bytes:
    return jpeg(draft.scene.draw(material.size))


def _paraphrase(draft: Draft, material: Material) -> str:
    return caption(draft.scene, draft.painter, material.rng)


def _twin_row(draft: Draft, twin: Draft, body: bytes, said: str) -> Row:
    row = _row(draft, body, "mirror", said=said)
    return dataclasses.replace(row, group=twin.group, true_caption=twin.caption, twin_url=twin.url())


def _looks(scene: Scene) -> set[tuple[str, str, str]]:
    return {(item.size, item.color, item.shape) for item in scene.items}


def _cropped(image: Image.Image) -> Image.Image:
    return image.crop((1, 1, image.width, image.height))


VARIANTS: tuple[Callable[[Image.Image], Image.Image], ...] = (
    lambda image: image,
    lambda image: image.resize((round(image.width * 0.75),) * 2, Image.Resampling.LANCZOS),
    lambda image: image.resize((round(image.width * 1.2),) * 2, Image.Resampling.BICUBIC),
    lambda image: ImageEnhance.Brightness(image).enhance(1.05),
    _cropped,
)

# Share of a pool's rows that each fault takes by default.
FAULTS: Mapping[Callable[[Draft, Material], Row], float] = {
    dead_404: 0.03, dead_410: 0.006, dead_host: 0.01, busy: 0.015, busy_forever: 0.002, unavailable: 0.004,
    slow: 0.01, endless: 0.001, truncated: 0.008, not_an_image: 0.008, broken_image: 0.01, private_redirect: 0.003,
    opt_out: 0.005, exact_duplicate: 0.04, near_duplicate: 0.04, swapped: 0.15, tiny: 0.015, wide: 0.01,
    foreign: 0.05, too_short: 0.015, in_evaluation: 0.015,
}
SHARES = {fault.__name__: share for fault, share in FAULTS.items()}
RECOVERS = {"busy", "unavailable", "slow"}


# --- a pool ------------------------------------------------------------------------------------------------

def plant(
    pool: str, rows: int, seed: int, size: int, women: float, shares: Mapping[str, float],
    evaluation: Sequence[tuple[int, Scene]], without: frozenset[tuple[str, str]] = frozenset(),
) -> Iterator[Row]:
    """The rows of a pool in list order: `shares` of each fault, the others sound.

    `women` is the share of pairs painted by a woman, the planted skew. `evaluation` are the (image id, scene) of
    the test questions, `without` the (colour, shape) pairs that no picture shows, nor may they.
    """
    rng = stream(seed, "plan", pool)
    faults = _assign(rows, shares, rng)
    groups = np.where(rng.permutation(rows) < round(rows * women), "women", "men")
    drafts = [_draft(pool, number, str(groups[number]), seed, without) for number in range(rows)]
    clean = [draft for draft, fault in zip(drafts, faults) if fault is None]
    twins = (clean[i] for i in rng.permutation(len(clean)))
    tested = cycle([evaluation[i] for i in rng.permutation(len(evaluation))])
    by_name = {fault.__name__: fault for fault in FAULTS}
    for draft, fault in zip(drafts, faults):
        if fault is None:
            yield sound(draft, size)
        else:
            material = Material(stream(seed, "fault", pool, draft.number), size, twins, tested, without)
            row = by_name[fault](draft, material)
            yield dataclasses.replace(row, fault=fault, recovers=fault in RECOVERS)


def _assign(rows: int, shares: Mapping[str, float], rng: np.random.Generator) -> list[str | None]:
    """A fault or None for each row; a fault with a share stands at least once."""
    planted = [name for name, share in shares.items() if share for _ in range(max(1, round(share * rows)))]
    twins = sum("duplicate" in name for name in planted)
    if len(planted) + twins > rows:
        raise UserError(f"found a pool of {rows} pairs; expected at least {len(planted) + twins} for its faults and "
                        f"what they are copies of; raise the pool's size or set some `faults` to 0")
    faults: list[str | None] = [*planted, *[None] * (rows - len(planted))]
    return [faults[i] for i in rng.permutation(rows)]


def _draft(pool: str, number: int, group: str, seed: int, without: frozenset[tuple[str, str]]) -> Draft:
    rng = stream(seed, pool, number)
    scene, painters = Scene.sample(rng, without), PAINTERS[group]
    painter = painters[int(rng.integers(len(painters)))]
    return Draft(pool, number, scene, group, painter, caption(scene, painter, rng))
