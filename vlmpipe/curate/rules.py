"""The rules of selection: each a small config that says which rows it drops, and by which number.

A rule gets all rows and the positions that earlier rules left, and returns the positions that it drops. Rules that
compare rows with each other are in `twins`, those on embeddings in `vectors`, MetaCLIP's in `balance`.
Legend: N all rows of all pools, A rows still alive, D dropped ones.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Protocol

import numpy as np
import pyarrow as pa

from vlmpipe.curate.columns import DOMAIN, Rows
from vlmpipe.errors import UserError


@dataclass
class Drops:
    """Positions [D] and, for each, the measured value, the limit that it missed (NaN: not applicable), and why.

    `other` are positions of the rows that stayed instead (-1: none), `names` those of pictures outside the pools.
    `reasons` is dictionary-encoded (None: the rule's name; `:why` is put behind it); rows in `missing` had nothing to
    be judged by.
    """

    index: np.ndarray
    value: np.ndarray | None = None
    threshold: np.ndarray | float | None = None
    other: np.ndarray | None = None
    names: pa.Array | None = None
    reasons: pa.DictionaryArray | None = None
    missing: np.ndarray | None = None
    facts: dict[str, float] = field(default_factory=dict)

    def take(self, which: np.ndarray) -> "Drops":
        """Those where `which` [D] is true."""
        def part(values):
            return values[which] if isinstance(values, np.ndarray) else values

        return Drops(
            self.index[which], part(self.value), part(self.threshold), part(self.other),
            self.names and self.names.filter(pa.array(which)), self.reasons and self.reasons.filter(pa.array(which)),
            part(self.missing), self.facts,
        )


class Rule(Protocol):
    """`alone`: it judges each row by itself, so it can be asked about rows that are gone already."""

    alone: bool

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops: ...


# --- what there is to judge --------------------------------------------------------------------------------

@dataclass(frozen=True)
class Downloaded:
    """Drops what is no picture here; the reason is the download's, as `download:http_404`."""

    alone: ClassVar = False

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        status, statuses = rows.codes("status", alive)
        reason, reasons = rows.codes("reason", alive)
        failed = status != (statuses.index("downloaded") if "downloaded" in statuses else -2)
        # One dictionary: the reasons, then the states for rows without one, then the unknown.
        names = [f"download:{name}" for name in (*reasons, *statuses, "unknown")]
        why = np.where(reason >= 0, reason, np.where(status >= 0, len(reasons) + status, len(names) - 1))
        return Drops(alive[failed], reasons=_encoded(why[failed], names))


@dataclass(frozen=True)
class Decoded:
    """Drops what could not be annotated; the reason is the annotation's, as `decode:broken_image`."""

    alone: ClassVar = False

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        error, errors = rows.codes("error", alive)
        failed = error >= 0
        return Drops(alive[failed], reasons=_encoded(error[failed], [f"decode:{name}" for name in errors]))


def _encoded(codes: np.ndarray, names: list[str]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(names, pa.string()))


# --- numbers -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Column:
    """Keeps rows whose `column` is at least `min`, at most `max`, one of `one_of`, none of `none_of`.

    `null: true` keeps only rows where there is nothing (such as no boilerplate found). Otherwise a row without a
    value, NaN included, is dropped as `<rule>:missing`, or stays with `missing: keep`.
    """

    column: str
    min: float | None = None
    max: float | None = None
    one_of: tuple[str, ...] | None = None
    none_of: tuple[str, ...] | None = None
    null: bool | None = None
    missing: Literal["drop", "keep"] = "drop"
    alone: ClassVar = True

    def __post_init__(self):
        texts, numbers = (self.one_of, self.none_of), (self.min, self.max)
        asked = [any(v is not None for v in texts), any(v is not None for v in numbers), self.null is True]
        if sum(asked) > 1 or not (any(asked) or self.null is False):
            raise UserError(f"found {sum(asked)} kinds of condition on column '{self.column}'; expected one: min and/"
                            f"or max, or one_of and/or none_of, or null: true, or null: false")

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        if self.min is not None or self.max is not None:
            return outside(rows.numbers(self.column, alive), alive, self.min, self.max, self.missing == "keep")
        code, values = rows.codes(self.column, alive)
        known = code >= 0
        if self.null:
            return Drops(alive[known])
        fits = [(self.one_of is None or v in self.one_of) and v not in (self.none_of or ()) for v in values]
        unfit = known & ~np.array([*fits, True], bool)[code]
        absent = ~known if self.missing == "drop" else np.zeros(len(known), bool)
        bad = unfit | absent
        return Drops(alive[bad], missing=absent[bad])


@dataclass(frozen=True)
class Small:
    """Drops pictures whose shorter side is under `min_side` pixels, as they were on the web."""

    min_side: int = 200
    alone: ClassVar = True

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        return outside(np.minimum(*_size(rows, alive)), alive, self.min_side, None)


@dataclass(frozen=True)
class Elongated:
    """Drops pictures whose long side is more than `max_aspect` times the short one."""

    max_aspect: float = 3.0
    alone: ClassVar = True

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        width, height = _size(rows, alive)
        return outside(np.maximum(width, height) / np.minimum(width, height), alive, None, self.max_aspect)


def _size(rows: Rows, alive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows.numbers("original_width", alive), rows.numbers("original_height", alive)


@dataclass(frozen=True)
class CaptionWords:
    """Drops captions with fewer than `min` or more than `max` words, as `str.split` counts."""

    min: int = 3
    max: int | None = None
    alone: ClassVar = True

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        return outside(rows.numbers("caption_words", alive), alive, self.min, self.max)


@dataclass(frozen=True)
class CaptionChars:
    """Drops captions with fewer than `min` or more than `max` characters."""

    min: int = 6
    max: int | None = None
    alone: ClassVar = True

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        return outside(rows.numbers("caption_chars", alive), alive, self.min, self.max)


def outside(
    values: np.ndarray, alive: np.ndarray, low: float | None, high: float | None, keep_missing: bool = False
) -> Drops:
    """Drop what is below `low` or above `high`, and, as missing, what is not a number."""
    low, high = -np.inf if low is None else low, np.inf if high is None else high
    missing = np.isnan(values)
    bad = (values < low) | (values > high) | (missing & (not keep_missing))
    missed = np.where(missing, np.nan, np.where(values > high, high, low))[bad]
    return Drops(
        alive[bad], values[bad], np.where(np.isfinite(missed), missed, np.nan), missing=missing[bad]
    )


@dataclass(frozen=True)
class Language:
    """Keeps captions whose most likely language is in `allowed`, with confidence of at least `min_confidence`.

    A verdict for another language with confidence below `believed_from` is not believed, and the row stays: short
    captions are often taken for a foreign language with little confidence. The defaults are DataComp's rule.
    """

    allowed: tuple[str, ...] = ("en",)
    min_confidence: float = 0.0
    believed_from: float = 0.0
    alone: ClassVar = True

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        confidence = rows.numbers("language_score", alive)
        code, languages = rows.codes("language", alive)
        foreign = np.array([*(name not in self.allowed for name in languages), True])[code]
        missing = (code < 0) | np.isnan(confidence)
        confidence = np.nan_to_num(confidence)
        limit = np.where(foreign, self.believed_from, self.min_confidence)
        bad = missing | np.where(foreign, confidence >= limit, confidence < limit)
        return Drops(alive[bad], confidence[bad], limit[bad], missing=missing[bad])


@dataclass(frozen=True)
class Score:
    """Keeps rows whose `column` is at least `min`, and the best `top_fraction`; both where both are given.

    `formula`: `safe` keeps the best ceil(n * f) rows and their ties; `published` is DataComp's
    `sorted_descending[int(n * f)]`, which keeps one row more. `among`: the fraction is taken of the rows that are
    `remaining` at this step, or of `all` scored rows, as DataComp does. Rows without a score, NaN and infinity
    included, never count and are dropped as missing.
    """

    column: str
    min: float | None = None
    top_fraction: float | None = None
    formula: Literal["safe", "published"] = "safe"
    among: Literal["remaining", "all"] = "remaining"

    def __post_init__(self):
        if self.top_fraction is not None and not 0 < self.top_fraction <= 1:
            raise UserError(f"found top_fraction {self.top_fraction}; expected more than 0 and at most 1")
        if self.top_fraction == 1 and self.formula == "published":
            raise UserError("found top_fraction 1 with formula 'published', which is undefined there; use 'safe'")

    @property
    def alone(self) -> bool:
        return self.top_fraction is None or self.among == "all"

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        everyone = self.top_fraction is not None and self.among == "all"
        scores = rows.numbers(self.column, None if everyone else alive)
        scores[~np.isfinite(scores)] = np.nan
        limit = -np.inf if self.min is None else self.min
        if self.top_fraction is not None:
            cut = {"safe": safe_cut, "published": published_cut}[self.formula]
            limit = max(limit, cut(scores, self.top_fraction))
        dropped = outside(scores[alive] if everyone else scores, alive, limit, None)
        dropped.facts = {"threshold": float(limit)} if np.isfinite(limit) else {}
        return dropped


@dataclass(frozen=True)
class Clip(Score):
    """`Score` on the raw cosine of picture and caption."""

    column: str = "clip_score"


def published_cut(scores: np.ndarray, fraction: float) -> float:
    """DataComp's threshold for its top fraction, over finite scores; rows at or above it are kept.

    Source: mlfoundations/datacomp, baselines/apply_filter.py, get_threshold; there n counts NaN too.
    """
    scores = scores[np.isfinite(scores)]
    return _nth_best(scores, int(len(scores) * fraction)) if len(scores) else np.inf


def safe_cut(scores: np.ndarray, fraction: float) -> float:
    """The score of the ceil(n * fraction)-th best of n finite scores; rows at or above it are kept."""
    scores = scores[np.isfinite(scores)]
    # 0.3 * 100 is 30.000000000000004 in some products: a hair is not a row.
    return _nth_best(scores, max(int(np.ceil(len(scores) * fraction - 1e-9)), 1) - 1) if len(scores) else np.inf


def _nth_best(scores: np.ndarray, n: int) -> float:
    """`sorted_descending[n]`, without sorting."""
    return float(np.partition(scores, len(scores) - 1 - n)[len(scores) - 1 - n])


# --- quotas and lists --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Quota:
    """Keeps at most so many rows of each value of `column` (`domain`: the host of the url).

    `max` names values, `default` is for all others (none: no limit), `share` limits each value to that part of the
    rows that reach the rule. Who stays: by the selection's `prefer`, or by a hash of the uid (`choose: random`).
    Rows without a value are dropped as missing, or stay with `missing: keep`. Value: the row's place among its like.
    """

    column: str
    max: dict[str, int] = field(default_factory=dict)
    default: int | None = None
    share: float | None = None
    choose: Literal["preferred", "random"] = "preferred"
    seed: int = 0
    missing: Literal["drop", "keep"] = "drop"
    alone: ClassVar = False

    def __post_init__(self):
        if not self.max and self.default is None and self.share is None:
            raise UserError("found a quota without a limit; expected `max`, `default` or `share`")
        if self.share is not None and not 0 < self.share <= 1:
            raise UserError(f"found share {self.share}; expected more than 0 and at most 1")
        if (least := min([*self.max.values(), self.default or 0])) < 0:
            raise UserError(f"found a quota of {least} rows; expected 0 or more")

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        code, values = rows.codes(self.column, alive)
        rank = rows.priority(alive) if self.choose == "preferred" else uniform(rows.uids(alive), self.seed)
        order = np.lexsort((rank, code))
        first = np.flatnonzero(np.diff(code[order], prepend=-2))
        place = np.empty(len(alive), np.int64)
        place[order] = np.arange(len(alive)) - np.repeat(first, np.diff(first, append=len(alive))) + 1
        unlimited = np.inf if self.share is None else np.floor(self.share * len(alive))
        limits = [min(self._limit(value), unlimited) for value in values]
        limit = np.array([*limits, np.inf if self.missing == "keep" else 0])[code]
        bad = place > limit
        return Drops(alive[bad], place[bad].astype(float), limit[bad], missing=code[bad] < 0)

    def _limit(self, value: str) -> float:
        limit = self.max.get(value, self.default)
        return np.inf if limit is None else limit


def uniform(uids: pa.Array, seed: int) -> np.ndarray:
    """A number in [0, 1) of each uid, float64 [n]: the same in every run, whatever the other rows are."""
    salt = str(seed).encode()
    digests = b"".join(hashlib.blake2b(uid.encode(), digest_size=8, salt=salt).digest() for uid in uids.to_pylist())
    return np.frombuffer(digests, "<u8").astype(np.float64) / 2**64


@dataclass(frozen=True)
class OptOut:
    """Drops rows that their owners took out: `uids` and `domains` are text files, one a line, `#` begins a remark.

    A domain stands for the hosts below it too. Reasons: `<rule>:uid`, `<rule>:domain`.
    """

    uids: Path | None = None
    domains: Path | None = None
    alone: ClassVar = True

    def __post_init__(self):
        if self.uids is None and self.domains is None:
            raise UserError("found no list; expected `uids` or `domains`, a text file with one a line")

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        bad, by_uid = np.zeros(len(alive), bool), np.zeros(len(alive), bool)
        if self.uids is not None:
            wanted = pa.array(sorted(read_list(self.uids)), pa.string())
            for here, table in rows.scan(["uid"], alive):
                by_uid[here] = pa.compute.is_in(table["uid"].cast(pa.string()), value_set=wanted).to_numpy()
        if self.domains is not None:
            listed = {name.lower().removeprefix("www.") for name in read_list(self.domains)}
            code, hosts = rows.codes(DOMAIN, alive)
            bad = np.array([*(_below(host, listed) for host in hosts), False])[code]
        dropped = bad | by_uid
        return Drops(alive[dropped], reasons=_encoded(by_uid[dropped].astype(np.int32), [":domain", ":uid"]))


def _below(host: str, listed: set[str]) -> bool:
    parts = host.split(".")
    return any(".".join(parts[i:]) in listed for i in range(len(parts)))


def read_list(path: Path) -> list[str]:
    """The lines of a text file without remarks and blank ones.

    Raises:
        UserError: the file can't be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read the list {path} ({error}); expected a text file with one entry a line; "
                        f"write it, or take the rule out of `order`") from None
    return [entry for line in lines if (entry := line.partition("#")[0].strip())]
