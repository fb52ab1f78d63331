"""Reading what is audited: pools, annotations and decisions joined shard by shard, counted once, framed once more.

Only a number or two per row stays in memory, never captions or pictures.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmpipe.config import nearest as nearest_name
from vlmpipe.curate import groups
from vlmpipe.curate.bias import BiasConfig
from vlmpipe.curate.duplicates import THUMBNAIL, Looks, Near, nearest
from vlmpipe.curate.evaluation import EvaluationImages
from vlmpipe.curate.expectations import ExpectationsConfig, suite_name
from vlmpipe.curate.filters import DECISIONS, FUNNEL
from vlmpipe.curate.filters import KIND as SELECTION
from vlmpipe.curate.groups import Members
from vlmpipe.curate.regions import countries, regions
from vlmpipe.errors import UserError
from vlmpipe.progress import progress
from vlmpipe.shards import check_file, corrupt, read_json, read_manifest, read_shard_rows

UNDECIDED = "no_decision"
POOL_COLUMNS = ("uid", "url", "caption", "status", "reason", "sha256")
ANNOTATION_COLUMNS = (
    "uid", "width", "height", "phash", "thumbnail", "caption_chars", "language", "language_score", "clip_score",
)
DECISION_COLUMNS = ("uid", "kept", "reason", "value", "threshold")
FROM_URL = ("url_country", "url_region")  # groups that no table has as a column
MOST_VALUES = 10_000  # of a column, before it is no column of groups


# --- inputs ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Source:
    """One pool, its annotations, and the decisions file of the selection."""

    name: str
    pool: Path
    annotations: Path
    decisions: Path

    def decided(self) -> pa.Table:
        """uid, kept, reason and what is behind it of this pool's rows, in the pool's order."""
        check_file(self.decisions.parent, self.decisions.name)
        try:
            known = pq.read_schema(self.decisions).names
            wanted = [name for name in DECISION_COLUMNS if name in known]
            return pq.read_table(self.decisions, columns=wanted, filters=[("pool", "==", self.name)])
        except (OSError, pa.ArrowInvalid) as error:
            raise corrupt(self.decisions, str(error).splitlines()[0]) from None

    def shards(self) -> list[str]:
        return [shard["name"] for shard in read_manifest(self.pool)["shards"]]


def find_sources(pools: Path, annotations: Path, selection: Path) -> list[Source]:
    """Every pool that the selection decided about, with its annotations; what else lies beside them is left alone.

    Raises:
        UserError: no finished selection, or one of its pools is unfinished or without annotations.
    """
    names = sorted(read_manifest(selection, SELECTION)["pools"])
    for name in names:
        read_manifest(pools / name)
        read_manifest(annotations / name)
    return [Source(name, pools / name, annotations / name, selection / DECISIONS) for name in names]


def _schema(directory: Path, shard: str | None = None) -> list[str]:
    """The columns of a shard, by default of the first; none where there are no shards."""
    names = [entry["name"] for entry in read_manifest(directory)["shards"]]
    if not names:
        return []
    path = directory / f"{shard or names[0]}.parquet"
    try:
        return pq.read_schema(path).names
    except (OSError, pa.ArrowInvalid) as error:
        raise corrupt(path, str(error).splitlines()[0]) from None


def scored_pools(sources: Sequence[Source]) -> list[str]:
    """The pools whose pairs were scored: the annotator can be off."""
    return [source.name for source in sources if "clip_score" in _schema(source.annotations)]


def group_columns(sources: Sequence[Source], wanted: Sequence[str]) -> list[str]:
    """The wanted columns of groups.

    Raises:
        UserError: one is in no pool, in no annotation, and does not come from the URL.
    """
    known = {name for source in sources for name in (*_schema(source.pool), *_schema(source.annotations), *FROM_URL)}
    for name in wanted:
        if name not in known:
            raise UserError(
                f"audit: found no column '{name}' in any pool or annotation{nearest_name(name, known)}; "
                f"expected one of {', '.join(sorted(known))}; mend bias.columns or bias.bins"
            )
    return list(wanted)


# --- one shard, joined -------------------------------------------------------------------------------------

def joined_shards(source: Source, decided: pa.Table, extra: Sequence[str] = ()) -> Iterator[pa.Table]:
    """Each shard's rows with their decision and, where they have one, their annotation.

    Columns of the pool keep their name, those of the annotation get the prefix `a.`, those of the decision `d.`.
    A column that the shard lacks is absent.
    """
    start = 0
    for shard in source.shards():
        rows = _read(source.pool, shard, (*POOL_COLUMNS, *extra))
        notes = _read(source.annotations, shard, (*ANNOTATION_COLUMNS, *extra))
        # The selection lists a pool's rows in their order: its next slice is these rows, unless it is damaged.
        here = decided.slice(start, len(rows))
        here = here if here["uid"].equals(rows["uid"]) else _matched(rows, decided)
        start += len(rows)
        for prefix, table in (("a.", _matched(rows, notes)), ("d.", here)):
            for name in table.column_names:
                rows = rows.append_column(prefix + name, table[name])
        yield rows


def _matched(rows: pa.Table, table: pa.Table) -> pa.Table:
    """The row of `table` with the same uid for each of `rows`; nulls where there is none."""
    return table.take(pc.index_in(rows["uid"], value_set=table["uid"].combine_chunks()))


def _read(directory: Path, shard: str, columns: Sequence[str]) -> pa.Table:
    """The named columns that exist of one shard; no rows where the directory has no such shard."""
    if all(entry["name"] != shard for entry in read_manifest(directory)["shards"]):
        return pa.table({"uid": pa.array([], pa.string())})
    known = _schema(directory, shard)
    if "uid" not in known:
        raise UserError(f"{directory}/{shard}: found no column 'uid'; expected one; rerun the stage that writes it")
    table = read_shard_rows(directory, shard, [name for name in dict.fromkeys(columns) if name in known])
    return table.set_column(table.column_names.index("uid"), "uid", table["uid"].cast(pa.string()))


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column as float32, NaN where it is null or missing."""
    if name not in table.column_names:
        return np.full(len(table), np.nan, np.float32)
    return pc.fill_null(table[name].cast(pa.float32()), np.nan).to_numpy()


def _true(table: pa.Table, name: str) -> np.ndarray:
    return pc.fill_null(table[name], False).to_numpy()


def _downloaded(table: pa.Table) -> np.ndarray:
    if "status" not in table.column_names:
        return np.zeros(len(table), bool)
    return pc.fill_null(pc.equal(table["status"].cast(pa.string()), "downloaded"), False).to_numpy()


# --- first reading: totals and groups ----------------------------------------------------------------------

@dataclass
class Facts:
    """What one reading of all pools leaves: arrays over all rows in order, and totals."""

    outcome: np.ndarray
    reasons: list[str]
    scores: np.ndarray
    overlap: np.ndarray
    identities: dict[str, Members]
    columns: dict[str, Members]
    attributes: Members
    pools: pd.DataFrame
    languages: dict[str, int]
    evaluation_images: int

    @property
    def kept(self) -> np.ndarray:
        return self.outcome == 0


def collect(
    sources: Sequence[Source], columns: Sequence[str], evaluation: EvaluationImages, near: Near, config: BiasConfig
) -> Facts:
    """Read every shard once."""
    reasons = Vocabulary(_rule_order(sources[0].decisions.parent))
    gathered = _Gathered(config, columns)
    pools, languages = [], {}
    for source in sources:
        decided, totals = source.decided(), _Totals(source.name)
        tables = joined_shards(source, decided, columns)
        for table in progress(tables, len(source.shards()), f"audit {source.name}"):
            totals.add(table)
            gathered.add(table, reasons, _overlap(table, evaluation, near))
            for entry in pc.value_counts(_kept_languages(table)).to_pylist():
                languages[entry["values"]] = languages.get(entry["values"], 0) + entry["counts"]
        pools.append(totals.row(decided))
    outcome, used = reasons.compact(np.concatenate(gathered.outcome))
    return Facts(
        outcome, used, np.concatenate(gathered.scores), np.concatenate(gathered.overlap),
        {name: groups.join(parts) for name, parts in gathered.identities.items()},
        {name: groups.join(parts) for name, parts in gathered.columns.items()},
        groups.join(gathered.attributes), pd.DataFrame(pools), languages, len(evaluation),
    )


def _kept_languages(table: pa.Table) -> pa.ChunkedArray:
    column = table["a.language"] if "a.language" in table.column_names else pa.nulls(len(table), pa.string())
    return pc.fill_null(column.filter(pa.array(_true(table, "d.kept"))).cast(pa.string()), "unknown")


class Vocabulary:
    """Codes of the rules that drop rows: 0 is kept, then those given, then others as they come.

    A reason `download:http_404` belongs to the rule `download`: groups are compared by rule.
    """

    def __init__(self, names: Iterable[str]):
        self.codes = {name: code for code, name in enumerate(names, 1)}

    def encode(self, kept: np.ndarray, reasons: pa.ChunkedArray) -> np.ndarray:
        coded = pc.fill_null(reasons.cast(pa.string()), UNDECIDED).combine_chunks().dictionary_encode()
        rules = [reason.partition(":")[0] for reason in coded.dictionary.to_pylist()]
        codes = np.array([self.codes.setdefault(rule, len(self.codes) + 1) for rule in rules], np.int32)
        return np.where(kept, 0, codes[coded.indices.to_numpy()] if rules else 0).astype(np.int32)

    def compact(self, outcome: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """The outcome recoded to the rules that dropped a row, and these in order."""
        used = [(name, code) for name, code in self.codes.items() if (outcome == code).any()]
        recode = np.zeros(len(self.codes) + 1, np.int32)
        for position, (_, code) in enumerate(used, 1):
            recode[code] = position
        return recode[outcome], [name for name, _ in used]


def _rule_order(selection: Path) -> list[str]:
    """The rules in the order in which the selection asked them, by the name that their reasons begin with."""
    steps = [step["reason"] for step in read_json(selection / FUNNEL)["steps"]]
    return [{"downloaded": "download", "decoded": "decode"}.get(step, step) for step in steps]


class _Gathered:
    """Arrays of every shard, and the positions of group members counted over all shards."""

    def __init__(self, config: BiasConfig, columns: Sequence[str]):
        self.config, self.rows = config, 0
        self.outcome, self.scores = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
        self.overlap = [np.zeros(0, bool)]
        self.identities = {name: {group: [] for group in lists} for name, lists in config.lexicons.items()}
        self.attributes = {name: [] for name in config.attributes}
        self.columns: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in columns}

    def add(self, table: pa.Table, reasons: Vocabulary, overlap: np.ndarray) -> None:
        self.outcome.append(reasons.encode(_true(table, "d.kept"), table["d.reason"]))
        self.scores.append(_numbers(table, "a.clip_score"))
        self.overlap.append(overlap)
        captions = table["caption"] if "caption" in table.column_names else pa.nulls(len(table), pa.string())
        languages = _believed_languages(table)
        for name, lists in self.config.lexicons.items():
            self._extend(self.identities[name], groups.mentions(captions, lists, languages))
        self._extend(self.attributes, groups.mentions(captions, self.config.attributes, languages))
        for name, parts in self.columns.items():
            self._extend(parts, self._column_groups(table, name))
            if len(parts) > MOST_VALUES:
                raise UserError(
                    f"audit: found more than {MOST_VALUES} different values in column '{name}'; expected groups; "
                    f"give edges of numbers as bias.bins.{name}, or leave it out"
                )
        self.rows += len(table)

    def _column_groups(self, table: pa.Table, name: str) -> Members:
        found = next((column for column in (name, f"a.{name}") if column in table.column_names), None)
        if found and name in self.config.bins:
            return groups.ranges(table[found], self.config.bins[name])
        if found:
            return groups.values(table[found])
        if name in FROM_URL and "url" in table.column_names:
            urls = table["url"]
            return groups.values(countries(urls) if name == "url_country" else regions(urls, self.config.regions))
        return {}

    def _extend(self, parts: dict[str, list[np.ndarray]], members: Members) -> None:
        for group, positions in members.items():
            parts.setdefault(group, []).append(positions + self.rows)


def _believed_languages(table: pa.Table) -> pa.Array | None:
    if "a.language" not in table.column_names:
        return None
    confidence = table["a.language_score"] if "a.language_score" in table.column_names else None
    return groups.believed(table["a.language"], confidence)


class _Totals:
    """The totals of one pool over its shards."""

    def __init__(self, name: str):
        self.name, self.rows, self.downloaded, self.undecided, self.unannotated = name, 0, 0, 0, 0
        self.uids: list[np.ndarray] = []

    def add(self, table: pa.Table) -> None:
        downloaded = _downloaded(table)
        self.rows += len(table)
        self.downloaded += int(downloaded.sum())
        self.undecided += table["d.uid"].null_count
        self.unannotated += int((downloaded & table["a.uid"].is_null().to_numpy()).sum())
        digests = (hashlib.blake2b(uid.encode(), digest_size=8).digest() for uid in table["uid"].to_pylist())
        self.uids.append(np.frombuffer(b"".join(digests), np.uint64))

    def row(self, decided: pa.Table) -> dict:
        distinct = len(np.unique(np.concatenate(self.uids))) if self.uids else 0
        return {
            "pool": self.name,
            "rows": self.rows,
            "downloaded": self.downloaded,
            "success_rate": self.downloaded / self.rows if self.rows else 0.0,
            "repeated_uids": self.rows - distinct,
            "rows_without_decision": self.undecided,
            "decisions_without_row": len(decided) - (self.rows - self.undecided),
            "downloads_without_annotation": self.unannotated,
        }


def _overlap(table: pa.Table, evaluation: EvaluationImages, near: Near) -> np.ndarray:
    """bool [N]: the kept rows whose picture is an evaluation picture."""
    overlap = np.zeros(len(table), bool)
    kept = table.filter(pa.array(_true(table, "d.kept")))
    same = np.zeros(len(kept), bool)
    if "sha256" in table.column_names:
        same |= pc.is_in(kept["sha256"].cast(pa.string()), value_set=evaluation.digests).to_numpy()
    if "a.phash" in table.column_names:
        known = np.flatnonzero(kept["a.phash"].is_valid())
        position, _ = nearest(*_looks(kept.take(known), evaluation, near))
        same[known[position >= 0]] = True
    overlap[_true(table, "d.kept")] = same
    return overlap


def _looks(table: pa.Table, evaluation: EvaluationImages, near: Near) -> tuple[Looks, Looks, Near]:
    """The arguments of `nearest`; annotations without thumbnails are judged by the hash alone, which finds more."""
    hashes = table["a.phash"].cast(pa.uint64()).to_numpy()
    if "a.thumbnail" not in table.column_names:
        return Looks(hashes, np.zeros((len(table), THUMBNAIL), np.uint8)), evaluation.looks, Near(near.radius, -1.0)
    thumbnails = np.frombuffer(b"".join(table["a.thumbnail"].to_pylist()), np.uint8).reshape(-1, THUMBNAIL)
    return Looks(hashes, thumbnails), evaluation.looks, near


# --- second reading: a few rows as evidence ----------------------------------------------------------------

def samples(sources: Sequence[Source], positions: np.ndarray) -> list[dict]:
    """The rows at some positions of the whole, in order: pool, uid, url, caption, reason, value, threshold, score."""
    found, start, positions = [], 0, np.sort(positions)
    for source in sources:
        last = start + sum(entry["rows"] for entry in read_manifest(source.pool)["shards"])
        if not ((positions >= start) & (positions < last)).any():
            start = last
            continue
        for table in joined_shards(source, source.decided()):
            here = positions[(positions >= start) & (positions < start + len(table))] - start
            found += [_sample(row, source.name) for row in table.take(pa.array(here)).to_pylist()] if len(here) else []
            start += len(table)
    return found


def _sample(row: dict, pool: str) -> dict:
    names = {"uid": "uid", "url": "url", "caption": "caption", "d.reason": "reason", "d.value": "value"}
    names |= {"d.threshold": "threshold", "a.clip_score": "clip_score"}
    plain = {new: row.get(old) for old, new in names.items()}
    finite = {key: None if isinstance(v, float) and not np.isfinite(v) else v for key, v in plain.items()}
    return {"pool": pool} | finite


# --- third reading: frames for the expectations -----------------------------------------------------------

def frames(sources: Sequence[Source], facts: Facts, config: ExpectationsConfig) -> dict[str, Iterable[pd.DataFrame]]:
    """The frames of every suite, by name; the large ones are read when they are asked for."""
    size = config.batch_rows
    kept, found = int(facts.kept.sum()), {}
    selection = {
        "kept": kept,
        "kept_fraction": kept / max(len(facts.outcome), 1),
        "evaluation_images": facts.evaluation_images,
        "evaluation_overlap": int(facts.overlap.sum()) / max(kept, 1),
    }
    selection |= {f"language_{name}": facts.languages.get(name, 0) / max(kept, 1) for name in config.languages}
    found["selection"] = [pd.DataFrame([selection])]
    for number, source in enumerate(sources):
        found[suite_name("pool", source.name)] = [facts.pools.iloc[[number]]]
        found[suite_name("raw", source.name)] = _batches(_raw_tables(source), size)
        found[suite_name("annotated", source.name)] = _batches(_annotated_tables(source), size)
    found["selected"] = _batches(_selected_tables(sources), size)
    found["scores"] = [pd.DataFrame({"clip_score": facts.scores[facts.kept]})]
    return found


def _batches(tables: Iterable[pa.Table], size: int) -> Iterator[pd.DataFrame]:
    """Tables joined to frames of about `size` rows, never more; empty tables give one empty frame with columns."""
    waiting, rows = [], 0
    for table in tables:
        for start in range(0, max(len(table), 1), size):
            part = table.slice(start, size)
            if rows + len(part) > size and rows:
                yield _frame(waiting)
                waiting, rows = [], 0
            waiting.append(part)
            rows += len(part)
    if waiting:
        yield _frame(waiting)


def _frame(tables: Sequence[pa.Table]) -> pd.DataFrame:
    return pa.concat_tables(tables, promote_options="permissive").to_pandas()


def _raw_tables(source: Source) -> Iterator[pa.Table]:
    for shard in source.shards():
        yield _explained(_read(source.pool, shard, ("uid", "url", "status", "reason")))


def _explained(table: pa.Table) -> pa.Table:
    """With a column `explained`: a row is downloaded, or says why not, and never both."""
    if not {"status", "reason"} <= set(table.column_names):
        return table
    fine = pc.fill_null(pc.equal(table["status"].cast(pa.string()), "downloaded"), False)
    return table.append_column("explained", pc.equal(fine, pc.is_null(table["reason"]))).drop_columns(["reason"])


def _annotated_tables(source: Source) -> Iterator[pa.Table]:
    columns = ("uid", "width", "height", "phash", "caption_chars", "language", "clip_score")
    for shard in read_manifest(source.annotations)["shards"]:
        yield _read(source.annotations, shard["name"], columns)


def _selected_tables(sources: Sequence[Source]) -> Iterator[pa.Table]:
    """The kept rows; uids get their pool's name, as two pools may list the same pair."""
    for source in sources:
        for table in joined_shards(source, source.decided()):
            table = table.filter(pa.array(_true(table, "d.kept")))
            names = {"status": "status", "a.width": "width", "a.height": "height", "a.caption_chars": "caption_chars"}
            names |= {"a.clip_score": "clip_score"}
            found = {new: table[old] for old, new in names.items() if old in table.column_names}
            uid = pc.binary_join_element_wise(pa.scalar(source.name), table["uid"].cast(pa.string()), "/")
            yield pa.table({"uid": uid, "explained": pc.is_null(table["d.reason"]), **found})
