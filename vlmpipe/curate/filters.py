"""Which pairs are kept, and why every other one is not. Cheap: all thresholds are here, no picture is scored.

Order of the rows everywhere: pools by name, in each pool the order of its list.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vlmpipe import shards
from vlmpipe.config import nearest, parse
from vlmpipe.curate import rules
from vlmpipe.curate.balance import Balance
from vlmpipe.curate.columns import Rows, load_rows, thumbnails_of
from vlmpipe.curate.duplicates import Looks
from vlmpipe.curate.evaluation import evaluation_images
from vlmpipe.curate.mitigation import FairScore
from vlmpipe.curate.rules import Drops, Rule
from vlmpipe.curate.subset import SUBSET, write_subset
from vlmpipe.curate.twins import EvaluationOverlap, ExactDuplicate, NearDuplicate
from vlmpipe.curate.vectors import EvaluationEmbedding, ImageClusters, SemanticDuplicate
from vlmpipe.errors import UserError

KIND = "selection"
DECISIONS, FUNNEL = "decisions.parquet", "funnel.json"
KEPT = 0  # the code of "no reason"; the others count from 1
FIRST = ("downloaded", "decoded")
ORDER = (
    *FIRST, "small", "elongated", "caption_words", "caption_chars", "language", "evaluation_overlap", "clip",
    "exact_duplicate", "near_duplicate",
)
# Rules without a setting.
PLAIN = {"downloaded": rules.Downloaded(), "decoded": rules.Decoded(), "exact_duplicate": ExactDuplicate()}
# What an entry of `rules` can be.
KINDS: dict[str, type] = {
    "column": rules.Column, "score": rules.Score, "fair_score": FairScore, "small": rules.Small,
    "elongated": rules.Elongated, "caption_words": rules.CaptionWords, "caption_chars": rules.CaptionChars,
    "language": rules.Language, "quota": rules.Quota, "opt_out": rules.OptOut, "exact_duplicate": ExactDuplicate,
    "near_duplicate": NearDuplicate, "semantic_duplicate": SemanticDuplicate, "evaluation_overlap": EvaluationOverlap,
    "evaluation_embedding": EvaluationEmbedding, "image_clusters": ImageClusters, "balance": Balance,
}
SCHEMA = pa.schema([
    ("uid", pa.string()), ("pool", pa.string()), ("kept", pa.bool_()), ("reason", pa.string()),
    ("value", pa.float64()), ("threshold", pa.float64()), ("other_uid", pa.string()),
])


@dataclass(frozen=True)
class SelectConfig:
    """The rules, and in which `order` they are asked; a rule that is not in `order` is off.

    `rules` are further ones: a name and its settings, with a `kind` of KINDS (without one: a condition on a column).
    `pools` are those to select from; empty: every directory there. A pool that was taken out of the config leaves
    its directory behind, so a workspace names them.

    The first rule that drops a row gives its reason. Of duplicates the one that is better by `prefer` stays
    (`clip_score` or any other number of a row, more is better; `pixels`, as it was on the web), then the `first` in
    the order of the rows. A twin that won at one rule may still be dropped by a later one: so rules on duplicates
    stand last by default, and balancing behind them.

    `subset`: write the kept uids as DataComp's subset file too (`subset.npy`).
    """

    pools: tuple[str, ...] = ()
    order: tuple[str, ...] = ORDER
    prefer: str = "clip_score"
    subset: bool = False
    small: rules.Small = field(default_factory=rules.Small)
    elongated: rules.Elongated = field(default_factory=rules.Elongated)
    caption_words: rules.CaptionWords = field(default_factory=rules.CaptionWords)
    caption_chars: rules.CaptionChars = field(default_factory=rules.CaptionChars)
    language: rules.Language = field(default_factory=rules.Language)
    evaluation_overlap: EvaluationOverlap = field(default_factory=EvaluationOverlap)
    clip: rules.Clip = field(default_factory=rules.Clip)
    near_duplicate: NearDuplicate = field(default_factory=NearDuplicate)
    rules: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        known = [*ORDER, *self.rules]
        for name in self.order:
            if name not in known:
                raise UserError(f"order: found unknown rule '{name}'{nearest(name, known)}; expected some of "
                                f"{', '.join(known)}")
            if self.order.count(name) > 1 or known.count(name) > 1:
                raise UserError(f"order: found rule '{name}' twice; expected it once; name the other one differently")
        if self.order[:2] != FIRST:
            raise UserError(f"order: found {list(self.order[:2])} first; expected downloaded, decoded: the other rules "
                            f"judge pictures that are there")
        made = {name: self._made(name) for name in self.rules}
        if late := [name for name in self.order[:-1] if isinstance(made.get(name), Balance)]:
            raise UserError(f"order: found {late[0]} before {self.order[-1]}; expected balancing last: what is dropped "
                            f"behind it would tip the balance again")

    def ordered(self) -> list[tuple[str, Rule]]:
        """(name, rule) in the order in which they are asked."""
        return [(name, self._rule(name)) for name in self.order]

    def _rule(self, name: str) -> Rule:
        return self._made(name) if name in self.rules else PLAIN[name] if name in PLAIN else getattr(self, name)

    def _made(self, name: str) -> Rule:
        settings = self.rules[name]
        if not isinstance(settings, dict):
            raise UserError(f"rules.{name}: found {settings!r}; expected a mapping with a kind and its settings")
        kind = settings.get("kind", "column")
        if kind not in KINDS:
            raise UserError(f"rules.{name}: found kind '{kind}'{nearest(kind, KINDS)}; expected one of "
                            f"{', '.join(KINDS)}")
        return parse(KINDS[kind], {k: v for k, v in settings.items() if k != "kind"}, f"rules.{name}")


def select(pools: Path, annotations: Path, questions: Path, out: Path, config: SelectConfig) -> None:
    """Decide every row of every pool: decisions.parquet (one row each), funnel.json, manifest.json.

    Raises:
        UserError: an input is missing or does not fit the others, or nothing is kept; in the last case decisions
            and funnel are written, the manifest is not.
    """
    out = Path(out)
    (out / shards.MANIFEST).unlink(missing_ok=True)
    names = pool_names(Path(pools), config.pools)
    pictures = partial(evaluation_images, Path(questions))
    rows = load_rows(Path(pools), Path(annotations), names, prefer=config.prefer, evaluation=pictures)
    decided, steps = decide(rows, config.ordered())
    funnel = decided.funnel(steps)
    shards.write_tables(out / DECISIONS, SCHEMA, decided.tables())
    shards.write_json(out / FUNNEL, funnel)
    if not funnel["kept"]:
        raise UserError(_nothing_kept(funnel, out))
    files = [DECISIONS, FUNNEL]
    (out / SUBSET).unlink(missing_ok=True)
    if config.subset:
        write_subset(out / SUBSET, rows.uids(np.flatnonzero(decided.code == KEPT)))
        files.append(SUBSET)
    entry = {"name": "decisions", "rows": len(rows), "files": {name: shards.sha256_file(out / name) for name in files}}
    lineage = {name: shards.sha256_file(Path(pools) / name / shards.MANIFEST) for name in names}
    shards.write_manifest(out, KIND, [entry], kept=funnel["kept"], pools=lineage)


def _nothing_kept(funnel: dict, out: Path) -> str:
    counts = ", ".join(f"{s['reason']} {s['dropped']} of {s['rows_in']}" for s in funnel["steps"] if s["dropped"])
    return (
        f"found no row of {funnel['rows']} kept (dropped by {counts or 'no rule'}); expected at least one; "
        f"loosen the rule that empties it in curation.select; {out / FUNNEL} and {DECISIONS} have the numbers"
    )


# --- deciding ----------------------------------------------------------------------------------------------

class Decisions:
    """One decision per row, filled rule by rule, as columns over all N rows.

    `other` is the position of the row that stayed instead, or -1; below that, -2 - position in `strangers`, the
    names of pictures that are in no pool.
    """

    def __init__(self, rows: Rows):
        self.rows = rows
        self.reasons: list[str] = ["kept"]
        self.code = np.full(len(rows), KEPT, np.int16)
        self.value, self.threshold = np.full(len(rows), np.nan), np.full(len(rows), np.nan)
        self.other = np.full(len(rows), -1, np.int64)
        self.strangers = pa.array([], pa.string())

    def drop(self, name: str, drops: Drops) -> None:
        assert (self.code[drops.index] == KEPT).all(), f"{name} dropped a row that was gone already"
        self.code[drops.index] = self._codes(name, drops)
        for column, found in ((self.value, drops.value), (self.threshold, drops.threshold), (self.other, drops.other)):
            if found is not None:
                column[drops.index] = found
        if drops.names is not None:
            known = drops.names.is_valid().to_numpy(zero_copy_only=False)
            self.other[drops.index[known]] = -2 - len(self.strangers) - np.arange(known.sum())
            self.strangers = pa.concat_arrays([self.strangers, drops.names.filter(pa.array(known))])

    def _codes(self, name: str, drops: Drops) -> np.ndarray:
        start = len(self.reasons)
        if drops.reasons is not None:
            self.reasons += [f"{name}{why}" if why[0] == ":" else why for why in drops.reasons.dictionary.to_pylist()]
            return drops.reasons.indices.to_numpy() + start
        self.reasons += [name, f"{name}:missing"]
        return start + (0 if drops.missing is None else drops.missing.astype(np.int16))

    def tables(self) -> Iterator[pa.Table]:
        """decisions.parquet, shard by shard: uid, pool, kept, reason, value, threshold, other_uid."""
        names, pools = pa.array(self.reasons), pa.array(self.rows.pool_names, pa.string())
        twins = np.unique(self.other[self.other >= 0])
        others = pa.concat_arrays([self.rows.uids(twins), self.strangers])
        for here, table in self.rows.scan(["uid"]):
            code, value, threshold, other = (x[here] for x in (self.code, self.value, self.threshold, self.other))
            place = np.where(other >= 0, np.searchsorted(twins, other), len(twins) - 2 - other)
            yield pa.table({
                "uid": table["uid"].cast(pa.string()),
                "pool": pools.take(pa.array(self.rows.pool[here])),
                "kept": code == KEPT,
                "reason": names.take(pa.array(code, mask=code == KEPT)),
                "value": pa.array(value, mask=np.isnan(value)),
                "threshold": pa.array(threshold, mask=np.isnan(threshold)),
                "other_uid": others.take(pa.array(place, mask=other == -1)),
            }, schema=SCHEMA)

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


class Overlap:
    """How many rows each rule that judges each row alone would drop, and how many of those no other such rule does."""

    def __init__(self, rows: int):
        self._hits = np.zeros(rows, np.uint8)  # rules that drop a row
        self._by_rule: dict[str, np.ndarray] = {}

    def add(self, name: str, index: np.ndarray) -> None:
        dropped = np.zeros(len(self._hits), bool)
        dropped[index] = True
        self._hits += dropped
        self._by_rule[name] = np.packbits(dropped)

    def counts(self, name: str) -> dict[str, int | None]:
        if name not in self._by_rule:
            return {"alone": None, "unique": None}
        dropped = np.unpackbits(self._by_rule[name], count=len(self._hits)).astype(bool)
        return {"alone": int(dropped.sum()), "unique": int((dropped & (self._hits == 1)).sum())}


def decide(rows: Rows, ordered: Sequence[tuple[str, Rule]]) -> tuple[Decisions, list[dict]]:
    """Ask the rules in order; each sees what the earlier ones left. Returns the decisions and a step per rule.

    A step counts `rows_in`, `dropped`, `rows_out`, and for a rule that judges each row alone how many of the decoded
    rows it would drop `alone`, and how many of those are its `unique` ones: no other such rule drops them.
    """
    rows.require([rule.column for _, rule in ordered if hasattr(rule, "column")])
    decisions, overlap, steps = Decisions(rows), Overlap(len(rows)), []
    present = None
    for name, rule in ordered:
        alive = np.flatnonzero(decisions.code == KEPT)
        if name not in FIRST and present is None:
            present = alive
        if rule.alone:
            drops = rule.drops(rows, present)
            overlap.add(name, drops.index)
            drops = drops.take(decisions.code[drops.index] == KEPT)
        else:
            drops = rule.drops(rows, alive)
        decisions.drop(name, drops)
        by_pool = np.bincount(rows.pool[drops.index], minlength=len(rows.pool_names)).tolist()
        steps.append({
            "reason": name, "kind": type(rule).__name__, "rows_in": len(alive), "dropped": len(drops.index),
            "rows_out": len(alive) - len(drops.index), "pools": dict(zip(rows.pool_names, by_pool)),
            "config": _plain(asdict(rule)), **drops.facts,
        })
    return decisions, [step | overlap.counts(step["reason"]) for step in steps]


def _plain(value: Any) -> Any:
    """A rule's settings as json has them."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


# --- what other stages read ---------------------------------------------------------------------------------

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
    return Looks(pc.fill_null(notes["phash"], 0).to_numpy().astype(np.uint64), thumbnails_of(notes["thumbnail"]))
