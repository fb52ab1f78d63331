"""Which pairs are kept, and why every other one is not. Cheap: all thresholds are here, no picture is scored.

Order of the rows everywhere: pools by name, in each pool the order of its list.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlmpipe import shards
from vlmpipe.curate import rules
from vlmpipe.curate.duplicates import THUMBNAIL, Looks, look
from vlmpipe.curate.evaluation import evaluation_images
from vlmpipe.curate.rules import Drops, Rows, Rule
from vlmpipe.errors import UserError

KIND = "selection"
DECISIONS, FUNNEL = "decisions.parquet", "funnel.json"
KEPT = 0  # the code of "no reason"; the others count from 1
ORDER = (
    "downloaded", "decoded", "small", "elongated", "caption_words", "caption_chars", "language", "evaluation_overlap",
    "clip", "exact_duplicate", "near_duplicate",
)
# Rules without a setting.
PLAIN = {"downloaded": rules.Downloaded(), "decoded": rules.Decoded(), "exact_duplicate": rules.ExactDuplicate()}
POOL_COLUMNS = ("uid", "status", "reason", "sha256", "original_width", "original_height")
NUMBERS = ("caption_chars", "caption_words", "language_score", "clip_score")
TEXTS = ("language", "error")


@dataclass(frozen=True)
class SelectConfig:
    """The rules, and in which `order` they are asked; a rule that is not in `order` is off.

    `pools` are those to select from; empty: every directory there. A pool that was taken out of the config leaves
    its directory behind, so a workspace names them.

    The first rule that drops a row gives its reason. Of duplicates the one with the higher `clip_score` (or more
    `pixels`, as it was on the web) stays, then the `first` in the order of the rows. A twin that won at one rule
    may still be dropped by a later one: so rules on duplicates stand last by default.
    """

    pools: tuple[str, ...] = ()
    order: tuple[str, ...] = ORDER
    prefer: Literal["clip_score", "pixels", "first"] = "clip_score"
    small: rules.Small = field(default_factory=rules.Small)
    elongated: rules.Elongated = field(default_factory=rules.Elongated)
    caption_words: rules.CaptionWords = field(default_factory=rules.CaptionWords)
    caption_chars: rules.CaptionChars = field(default_factory=rules.CaptionChars)
    language: rules.Language = field(default_factory=rules.Language)
    evaluation_overlap: rules.EvaluationOverlap = field(default_factory=rules.EvaluationOverlap)
    clip: rules.Clip = field(default_factory=rules.Clip)
    near_duplicate: rules.NearDuplicate = field(default_factory=rules.NearDuplicate)

    def __post_init__(self):
        if problem := rules.check_order(self.order, ORDER):
            raise UserError(f"order: {problem}")

    def rules(self) -> list[tuple[str, Rule]]:
        """(name, rule) in the order in which they are asked."""
        return [(name, PLAIN[name] if name in PLAIN else getattr(self, name)) for name in self.order]


def select(pools: Path, annotations: Path, questions: Path, out: Path, config: SelectConfig) -> None:
    """Decide every row of every pool: decisions.parquet (one row each), funnel.json, manifest.json.

    Raises:
        UserError: an input is missing or does not fit the others, or nothing is kept; in the last case decisions
            and funnel are written, the manifest is not.
    """
    out = Path(out)
    (out / shards.MANIFEST).unlink(missing_ok=True)
    rows = load_rows(Path(pools), Path(annotations), Path(questions), config)
    decided, steps = decide(rows, config.rules())
    funnel = decided.funnel(steps)
    shards.write_table(out / DECISIONS, decided.table())
    shards.write_json(out / FUNNEL, funnel)
    if not funnel["kept"]:
        raise UserError(_nothing_kept(funnel, out))
    files = {name: shards.sha256_file(out / name) for name in (DECISIONS, FUNNEL)}
    entry = {"name": "decisions", "rows": len(rows), "files": files}
    shards.write_manifest(out, KIND, [entry], kept=funnel["kept"], pools=_lineage(Path(pools), rows.pool_names))


def _nothing_kept(funnel: dict, out: Path) -> str:
    counts = ", ".join(f"{s['reason']} {s['dropped']} of {s['rows_in']}" for s in funnel["steps"] if s["dropped"])
    return (
        f"found no row of {funnel['rows']} kept (dropped by {counts or 'no rule'}); expected at least one; "
        f"loosen the rule that empties it in curation.select; {out / FUNNEL} and {DECISIONS} have the numbers"
    )


def _lineage(pools: Path, names: Sequence[str]) -> dict[str, str]:
    return {name: shards.sha256_file(pools / name / shards.MANIFEST) for name in names}


# --- deciding ----------------------------------------------------------------------------------------------

class Decisions:
    """One decision per row, filled rule by rule, as columns over all N rows."""

    def __init__(self, rows: Rows):
        self.rows = rows
        self.reasons: list[str] = ["kept"]
        self.code = np.full(len(rows), KEPT, np.int16)
        self.value, self.threshold = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
        self.other = np.full(len(rows), -1, np.int64)

    def drop(self, name: str, drops: Drops) -> None:
        assert (self.code[drops.index] == KEPT).all(), f"{name} dropped a row that was gone already"
        self.code[drops.index] = self._codes(name, drops)
        for column, found in ((self.value, drops.value), (self.threshold, drops.threshold), (self.other, drops.other)):
            if found is not None:
                column[drops.index] = found

    def _codes(self, name: str, drops: Drops) -> np.ndarray | int:
        if drops.reasons is None:
            self.reasons.append(name)
            return len(self.reasons) - 1
        encoded = drops.reasons.dictionary_encode()
        start = len(self.reasons)
        self.reasons += encoded.dictionary.to_pylist()
        return encoded.indices.to_numpy() + start

    def table(self) -> pa.Table:
        """decisions.parquet: uid, pool, kept, reason, value, threshold, other_uid."""
        dropped = self.code != KEPT
        names = pa.array(self.reasons)
        pools = pa.array(self.rows.pool_names, pa.string())
        return pa.table({
            "uid": self.rows.uid,
            "pool": pools.take(pa.array(self.rows.pool)),
            "kept": ~dropped,
            "reason": names.take(pa.array(self.code, mask=~dropped)),
            "value": pa.array(self.value, mask=np.isnan(self.value)),
            "threshold": pa.array(self.threshold, mask=np.isnan(self.threshold)),
            "other_uid": self.rows.names.take(pa.array(self.other, mask=self.other < 0)),
        })

    def funnel(self, steps: list[dict]) -> dict:
        """Counts over everything and per pool, checked: kept and all reasons add up to the pool."""
        per_pool = {
            name: self._counts(self.code[self.rows.pool == number]) for number, name in enumerate(self.rows.pool_names)
        }
        total = self._counts(self.code)
        for counts in (total, *per_pool.values()):
            assert counts["kept"] + sum(counts["reasons"].values()) == counts["rows"], f"rows were lost: {counts}"
        assert sum(step["dropped"] for step in steps) == total["rows"] - total["kept"], "steps and decisions disagree"
        return {**total, "pools": per_pool, "steps": steps}

    def _counts(self, codes: np.ndarray) -> dict:
        counts = np.bincount(codes, minlength=len(self.reasons)).tolist()
        reasons = {name: count for name, count in zip(self.reasons[1:], counts[1:]) if count}
        return {"rows": len(codes), "kept": counts[KEPT], "reasons": reasons}


def decide(rows: Rows, ordered: Sequence[tuple[str, Rule]]) -> tuple[Decisions, list[dict]]:
    """Ask the rules in order; each sees what the earlier ones left. Returns the decisions and a step per rule."""
    decisions, steps = Decisions(rows), []
    for name, rule in ordered:
        alive = np.flatnonzero(decisions.code == KEPT)
        drops = rule.drops(rows, alive)
        decisions.drop(name, drops)
        by_pool = np.bincount(rows.pool[drops.index], minlength=len(rows.pool_names)).tolist()
        steps.append({
            "reason": name, "rows_in": len(alive), "dropped": len(drops.index),
            "rows_out": len(alive) - len(drops.index), "pools": dict(zip(rows.pool_names, by_pool)),
            "config": asdict(rule), **drops.facts,
        })
    return decisions, steps


# --- loading -----------------------------------------------------------------------------------------------

def load_rows(pools: Path, annotations: Path, questions: Path, config: SelectConfig) -> Rows:
    """All rows of all pools, joined with their annotations."""
    names = pool_names(pools, config.pools)
    tables = [shards.read_rows(pools / name, POOL_COLUMNS) for name in names]
    table = pa.concat_tables(tables)
    measured, places, start = [], [], 0
    for name, pool in zip(names, tables):
        found, place = read_annotations(annotations / name, name, pool, ("uid", *NUMBERS, *TEXTS, "phash", "thumbnail"))
        measured.append(found)
        places.append(np.where(place < 0, -1, place + start))
        start += len(found)
    annotated, notes = np.concatenate(places), pa.concat_tables(measured)
    spread = notes.select([*NUMBERS, *TEXTS]).take(pa.array(annotated, mask=annotated < 0))
    numbers = {name: _numbers(spread[name]) for name in NUMBERS}
    numbers |= {name: _numbers(table[name]) for name in ("original_width", "original_height")}
    texts = {name: _text(table[name]) for name in ("status", "reason", "sha256")}
    texts |= {name: _text(spread[name]) for name in TEXTS}
    evaluation, uids = look([]), pa.array([], pa.string())
    if "evaluation_overlap" in config.order:
        found = evaluation_images(questions, config.evaluation_overlap.splits)
        evaluation, uids = found.looks, found.uids
    return Rows(
        uid=_text(table["uid"]),
        pool=np.repeat(np.arange(len(names), dtype=np.int16), [len(pool) for pool in tables]), pool_names=names,
        numbers=numbers, texts=texts, looks=looks_of(notes), annotated=annotated,
        priority=rules.twin_priority(config.prefer, len(table), numbers), evaluation=evaluation, evaluation_uids=uids,
    )


def pool_names(pools: Path, wanted: Sequence[str] = ()) -> list[str]:
    """The wanted pools of a directory, by default all, sorted.

    Raises:
        UserError: there is none, or a wanted one is not there.
    """
    names = sorted(path.name for path in pools.iterdir() if path.is_dir()) if pools.is_dir() else []
    missing = sorted(set(wanted) - set(names))
    if missing or not names:
        expected = ", ".join(missing) or "a directory for each pool"
        raise UserError(f"found {', '.join(names) or 'no pool'} in {pools}; expected {expected}; run `download` first")
    return sorted(wanted) or names


def read_annotations(
    directory: Path, name: str, pool: pa.Table, columns: Sequence[str]
) -> tuple[pa.Table, np.ndarray]:
    """A pool's annotations, and for each of its rows the position there, or -1.

    Raises:
        UserError: they are not those of the pool's downloaded rows.
    """
    notes = shards.read_rows(directory, columns)
    here = pc.fill_null(pc.equal(pool["status"], "downloaded"), False).to_numpy()
    expected = pool["uid"].filter(pa.array(here))
    if not notes["uid"].equals(expected):
        raise UserError(
            f"{directory}: found annotations of {len(notes)} rows that are not the {len(expected)} downloaded rows of "
            f"pool {name}; expected the same uids in the same order; rerun `annotate {name}`"
        )
    return notes, np.where(here, np.cumsum(here) - 1, -1)


def looks_of(notes: pa.Table) -> Looks:
    """The looks in an annotation table; rows without one (they have an error) get zeros."""
    hashes = pc.fill_null(notes["phash"], 0).to_numpy().astype(np.uint64)
    filled = pc.fill_null(notes["thumbnail"], pa.scalar(bytes(THUMBNAIL), pa.binary(THUMBNAIL))).chunks
    parts = [np.frombuffer(c.buffers()[1], np.uint8)[c.offset * THUMBNAIL :][: len(c) * THUMBNAIL] for c in filled]
    return Looks(hashes, np.concatenate([np.zeros(0, np.uint8), *parts]).reshape(-1, THUMBNAIL))


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(column.cast(pa.float64()), np.nan).to_numpy()


def _text(column: pa.ChunkedArray) -> pa.Array:
    combined = column.cast(pa.string()).combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)
