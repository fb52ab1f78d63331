"""The rules of selection: each a small config that says which rows it drops, and by which number.

A rule gets all rows and the positions that earlier rules left, and returns the positions that it drops.
Legend: N all rows of all pools, A rows still alive, D dropped ones.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlmpipe.curate.duplicates import Looks, Near, greedy_twins, nearest
from vlmpipe.errors import UserError


@dataclass
class Rows:
    """All rows in order, as columns.

    `pool` holds positions in `pool_names`. `numbers` are float64 [N] with NaN where a row has none; `texts` are
    arrow strings [N]. `looks` are those of annotated rows only, and `annotated` each row's position there, or -1.
    `priority` ranks rows for who of several twins stays, 0 first. `evaluation` are the pictures that must not
    be trained on, `evaluation_uids` their names.
    """

    uid: pa.Array
    pool: np.ndarray
    pool_names: list[str]
    numbers: dict[str, np.ndarray]
    texts: dict[str, pa.Array]
    looks: Looks
    annotated: np.ndarray
    priority: np.ndarray
    evaluation: Looks
    evaluation_uids: pa.Array

    def __len__(self) -> int:
        return len(self.pool)

    def text(self, name: str, index: np.ndarray) -> pa.Array:
        return self.texts[name].take(pa.array(index))

    def looks_of(self, index: np.ndarray) -> Looks:
        return self.looks.take(self.annotated[index])

    @cached_property
    def names(self) -> pa.Array:
        """What `Drops.other` points into: the rows' uids, then the evaluation pictures'."""
        return pa.concat_arrays([self.uid, self.evaluation_uids])


@dataclass
class Drops:
    """Positions [D] and, for each, the measured value, the limit that it missed (NaN: not applicable), the position in
    `Rows.names` of the twin (-1: none) and a reason (None: the rule's name)."""

    index: np.ndarray
    value: np.ndarray | None = None
    threshold: np.ndarray | float | None = None
    other: np.ndarray | None = None
    reasons: pa.Array | None = None
    facts: dict[str, float] = field(default_factory=dict)


class Rule(Protocol):
    def drops(self, rows: Rows, alive: np.ndarray) -> Drops: ...


# --- what there is to judge --------------------------------------------------------------------------------

@dataclass(frozen=True)
class Downloaded:
    """Drops what is no picture here; the reason is the download's, as `download:http_404`."""

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        failed = alive[_false(pc.equal(rows.text("status", alive), "downloaded"))]
        why = pc.coalesce(rows.text("reason", failed), rows.text("status", failed), "unknown")
        return Drops(failed, reasons=pc.binary_join_element_wise("download", why, ":"))


@dataclass(frozen=True)
class Decoded:
    """Drops what could not be annotated; the reason is the annotation's, as `decode:broken_image`."""

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        failed = alive[~_false(pc.is_valid(rows.text("error", alive)))]
        return Drops(failed, reasons=pc.binary_join_element_wise("decode", rows.text("error", failed), ":"))


def _false(mask: pa.Array) -> np.ndarray:
    """Where an arrow boolean is false or null."""
    return ~pc.fill_null(mask, False).to_numpy(zero_copy_only=False)


# --- numbers -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Small:
    """Drops pictures whose shorter side is under `min_side` pixels, as they were on the web."""

    min_side: int = 200

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        sides = np.minimum(rows.numbers["original_width"], rows.numbers["original_height"])
        return _outside(sides, alive, self.min_side, None)


@dataclass(frozen=True)
class Elongated:
    """Drops pictures whose long side is more than `max_aspect` times the short one."""

    max_aspect: float = 3.0

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        width, height = rows.numbers["original_width"], rows.numbers["original_height"]
        return _outside(np.maximum(width, height) / np.minimum(width, height), alive, None, self.max_aspect)


@dataclass(frozen=True)
class CaptionWords:
    """Drops captions with fewer than `min` or more than `max` words, as `str.split` counts."""

    min: int = 3
    max: int | None = None

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        return _outside(rows.numbers["caption_words"], alive, self.min, self.max)


@dataclass(frozen=True)
class CaptionChars:
    """Drops captions with fewer than `min` or more than `max` characters."""

    min: int = 6
    max: int | None = None

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        return _outside(rows.numbers["caption_chars"], alive, self.min, self.max)


def _outside(values: np.ndarray, alive: np.ndarray, low: float | None, high: float | None) -> Drops:
    """Drop what is below `low`, above `high` or not a number."""
    values = values[alive]
    low, high = -np.inf if low is None else low, np.inf if high is None else high
    inside = (values >= low) & (values <= high)
    missed = np.where(values > high, high, low)[~inside]
    return Drops(alive[~inside], values[~inside], np.where(np.isfinite(missed), missed, np.nan))


@dataclass(frozen=True)
class Language:
    """Keeps captions whose most likely language is in `allowed`, with confidence of at least `min_confidence`.

    A verdict for another language with confidence below `believed_from` is not believed, and the row stays: short
    captions are often taken for a foreign language with little confidence. The defaults are DataComp's rule.
    """

    allowed: tuple[str, ...] = ("en",)
    min_confidence: float = 0.0
    believed_from: float = 0.0

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        confidence = np.nan_to_num(rows.numbers["language_score"][alive])
        foreign = _false(pc.is_in(rows.text("language", alive), value_set=pa.array(self.allowed, pa.string())))
        limit = np.where(foreign, self.believed_from, self.min_confidence)
        bad = np.where(foreign, confidence >= limit, confidence < limit)
        return Drops(alive[bad], confidence[bad], limit[bad])


@dataclass(frozen=True)
class Clip:
    """Keeps pairs with a raw cosine of at least `min`, and the best `top_fraction`; both where both are given.

    `formula`: `safe` keeps the best ceil(n * f) rows and their ties; `published` is DataComp's
    `sorted_descending[int(n * f)]`, which keeps one row more. `among`: the fraction is taken of the rows that are
    `remaining` at this step, or of `all` scored rows, as DataComp does. Rows without a score, NaN included, never
    count and are dropped.
    """

    min: float | None = None
    top_fraction: float | None = None
    formula: Literal["safe", "published"] = "safe"
    among: Literal["remaining", "all"] = "remaining"

    def __post_init__(self):
        if self.top_fraction is not None and not 0 < self.top_fraction <= 1:
            raise UserError(f"found top_fraction {self.top_fraction}; expected more than 0 and at most 1")
        if self.top_fraction == 1 and self.formula == "published":
            raise UserError("found top_fraction 1 with formula 'published', which is undefined there; use 'safe'")

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        scores = np.where(np.isfinite(rows.numbers["clip_score"]), rows.numbers["clip_score"], np.nan)
        limits = [-np.inf if self.min is None else self.min]
        if self.top_fraction is not None:
            cut = {"safe": safe_cut, "published": published_cut}[self.formula]
            limits.append(cut(scores[alive] if self.among == "remaining" else scores, self.top_fraction))
        limit = max(limits)
        dropped = _outside(scores, alive, limit, None)
        return Drops(dropped.index, dropped.value, dropped.threshold, facts=_finite(threshold=limit))


def _finite(**facts: float) -> dict[str, float]:
    return {name: float(value) for name, value in facts.items() if np.isfinite(value)}


def published_cut(scores: np.ndarray, fraction: float) -> float:
    """DataComp's threshold for its top fraction, over finite scores; rows at or above it are kept."""
    best_first = -np.sort(-scores[np.isfinite(scores)])
    return best_first[int(len(best_first) * fraction)] if len(best_first) else np.inf


def safe_cut(scores: np.ndarray, fraction: float) -> float:
    """The score of the ceil(n * fraction)-th best of n finite scores; rows at or above it are kept."""
    best_first = -np.sort(-scores[np.isfinite(scores)])
    if not len(best_first):
        return np.inf
    # 0.3 * 100 is 30.000000000000004 in some products: a hair is not a row.
    return best_first[max(int(np.ceil(len(best_first) * fraction - 1e-9)), 1) - 1]


# --- look-alikes -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class ExactDuplicate:
    """Of rows with the same bytes (sha256), across pools, keeps the one of best priority. Value: 0 bits."""

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        code = rows.text("sha256", alive).dictionary_encode().indices.to_numpy(zero_copy_only=False)
        alive, code = alive[np.isfinite(code)], code[np.isfinite(code)].astype(np.int64)
        order = np.lexsort((rows.priority[alive], code))
        first = np.flatnonzero(np.diff(code[order], prepend=-1))
        winner = np.repeat(order[first], np.diff(first, append=len(order)))
        lost = np.sort(order[winner != order])
        keeper = np.empty(len(alive), np.int64)
        keeper[order] = winner
        return Drops(alive[lost], np.zeros(len(lost)), 0.0, alive[keeper[lost]])


@dataclass(frozen=True)
class NearDuplicate(Near):
    """Of pictures that are near (see `duplicates.Near`), across pools, keeps the one of best priority. Value: bits."""

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        keeper, distance = greedy_twins(rows.looks_of(alive), rows.priority[alive], self)
        lost = np.flatnonzero(keeper != np.arange(len(alive)))
        return Drops(alive[lost], distance[lost], float(self.radius), alive[keeper[lost]])


@dataclass(frozen=True)
class EvaluationOverlap(Near):
    """Drops pictures near one of the evaluation splits: what is tested on must not be trained on. Value: bits."""

    radius: int = 10
    splits: tuple[str, ...] = ("test",)

    def __post_init__(self):
        super().__post_init__()
        if not self.splits:
            raise UserError("found no splits; expected at least one, or the rule left out of order")

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        which, distance = nearest(rows.looks_of(alive), rows.evaluation, self)
        hit = which >= 0
        return Drops(alive[hit], distance[hit], float(self.radius), which[hit] + len(rows))


def twin_priority(prefer: str, rows: int, numbers: dict[str, np.ndarray]) -> np.ndarray:
    """Ranks [N]: by `prefer` (`clip_score` or `pixels`, more is better, nothing known is worst), then in list order."""
    if prefer == "first":
        return np.arange(rows)
    values = numbers["clip_score"] if prefer == "clip_score" else numbers["original_width"] * numbers["original_height"]
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")
    rank = np.empty(rows, np.int64)
    rank[order] = np.arange(rows)
    return rank


def check_order(order: Iterable[str], known: Iterable[str]) -> str | None:
    """What is wrong with an order of rules, or None."""
    from vlmpipe.config import nearest as hint

    order, known = list(order), list(known)
    for name in order:
        if name not in known:
            return f"found unknown rule '{name}'{hint(name, known)}; expected some of {', '.join(known)}"
        if order.count(name) > 1:
            return f"found rule '{name}' twice; expected it once"
    if order[:2] != ["downloaded", "decoded"]:
        return f"found {order[:2]} first; expected downloaded, decoded: the other rules judge pictures that are there"
    return None
