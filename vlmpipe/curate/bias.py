"""Does curation drop some groups more than others, by which rule, and is it more than noise?

Groups come from captions (an identity lexicon: word lists of the config) or from a column. A group's retention
is kept / total; two groups are compared by the ratio of their retentions (the four-fifths rule of 29 CFR 1607.4 D).
Every claim comes with an interval, and every test enters one Benjamini-Hochberg family.

Shape legend: N rows, G groups of one grouping, R reasons. `outcome` [N] is 0 for a kept row, r + 1 for one that
reason r dropped. `members` maps a group to the positions of its rows; a row may stand in several groups.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import stats

from vlmpipe.errors import UserError

Members = dict[str, np.ndarray]
Interval = tuple[np.ndarray, np.ndarray]
# Scripts that put no space between words: a listed word matches anywhere in them.
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


@dataclass(frozen=True)
class BiasConfig:
    """Which groups are compared, and how sure a finding must be.

    lexicons: grouping -> group -> words, matched whole and whatever their case. attributes: attribute -> words, for
    nPMI with the lexicons' groups. columns: pool or annotation columns, each value a group. minimum_group: smaller
    groups are reported and not tested. limit: the impact ratio below which a grouping is in breach.
    """

    lexicons: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    attributes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    columns: tuple[str, ...] = ("language",)
    minimum_group: int = 50
    limit: float = 0.8
    confidence: float = 0.95
    false_discovery_rate: float = 0.05

    def __post_init__(self):
        lists = {f"lexicons.{g}.{name}": words for g, groups in self.lexicons.items() for name, words in groups.items()}
        lists |= {f"attributes.{name}": words for name, words in self.attributes.items()}
        for where, words in lists.items():
            if not words or not all(word.strip() for word in words):
                raise UserError(f"{where}: found {list(words)}; expected words, none of them empty; fill the list")
        twice = sorted(set(self.lexicons) & set(self.columns))
        if twice:
            raise UserError(f"columns: '{twice[0]}' is the name of a lexicon too; rename the lexicon")
        if self.minimum_group < 1:
            raise UserError(f"minimum_group: found {self.minimum_group}; expected at least 1; raise it")
        for name in ("limit", "confidence", "false_discovery_rate"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name}: found {getattr(self, name)}; expected a number between 0 and 1; mend it")


# --- who is in which group ---------------------------------------------------------------------------------

def word_pattern(words: Sequence[str]) -> str:
    """A regular expression (RE2) that finds any of `words` as a whole word, in any case.

    A word ends where a letter, mark, digit or underscore does not follow (RE2's own word boundary knows ASCII only).
    """
    return "(?i)(?:" + "|".join(_whole(unicodedata.normalize("NFC", word.strip())) for word in words) + ")"


def _whole(word: str) -> str:
    escaped = "".join(char if char.isalnum() or ord(char) > 127 else f"\\x{{{ord(char):x}}}" for char in word)
    before = "" if _unspaced(word[0]) else r"(?:^|[^\pL\pM\pN_])"
    after = "" if _unspaced(word[-1]) else r"(?:$|[^\pL\pM\pN_])"
    return before + escaped + after


def _unspaced(char: str) -> bool:
    return unicodedata.name(char, "").startswith(UNSPACED)


def mentions(captions: pa.Array | pa.ChunkedArray, lists: Mapping[str, Sequence[str]]) -> Members:
    """Positions of the captions that mention a word of each list; a null caption mentions nothing."""
    normal = pc.utf8_normalize(pc.fill_null(captions.cast(pa.string()), ""), form="NFC")
    return {
        name: np.flatnonzero(pc.match_substring_regex(normal, word_pattern(words)).to_numpy(zero_copy_only=False))
        for name, words in lists.items()
    }


def values(column: pa.Array | pa.ChunkedArray) -> Members:
    """Positions of the rows with each value of a column, by value; a null is in no group."""
    coded = pa.chunked_array([column]) if isinstance(column, pa.Array) else column
    coded = coded.cast(pa.string()).combine_chunks().dictionary_encode()
    codes = pc.fill_null(coded.indices, -1).to_numpy(zero_copy_only=False)
    order = np.argsort(codes, kind="stable")
    names = coded.dictionary.to_pylist()
    edges = np.searchsorted(codes[order], np.arange(len(names) + 1))
    return dict(sorted((name, order[edges[i] : edges[i + 1]]) for i, name in enumerate(names)))


# --- intervals and tests -----------------------------------------------------------------------------------

def wilson(kept: np.ndarray, total: np.ndarray, z: float) -> Interval:
    """Score interval of a share (Wilson 1927); (0, 1) where total is 0."""
    kept, total = np.asarray(kept, float), np.asarray(total, float)
    n = np.maximum(total, 1)
    share, spread = kept / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = np.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    # The formula gives exactly 0 and 1 at the ends, floats only nearly.
    low = np.where(kept == 0, 0.0, middle - half)
    high = np.where(kept == total, 1.0, middle + half)
    return low, high


def difference_interval(kept_1, total_1, kept_2, total_2, z: float) -> Interval:
    """Interval of share 1 - share 2 from their Wilson limits (Newcombe 1998, method 10)."""
    share_1, share_2 = _share(kept_1, total_1), _share(kept_2, total_2)
    (low_1, high_1), (low_2, high_2) = wilson(kept_1, total_1, z), wilson(kept_2, total_2, z)
    gap = share_1 - share_2
    return gap - np.hypot(share_1 - low_1, high_2 - share_2), gap + np.hypot(high_1 - share_1, share_2 - low_2)


def ratio_interval(kept_1, total_1, kept_2, total_2, z: float) -> Interval:
    """Interval of share 1 / share 2 from their Wilson limits (MOVER-R: Donner and Zou 2012, equation 9).

    The upper limit is infinite where nothing of 2 is kept.
    """
    a, b = _share(kept_1, total_1), _share(kept_2, total_2)
    (low_a, high_a), (low_b, high_b) = wilson(kept_1, total_1, z), wilson(kept_2, total_2, z)
    with np.errstate(divide="ignore", invalid="ignore"):
        root = np.sqrt(np.maximum((a * b) ** 2 - low_a * high_b * (2 * a - low_a) * (2 * b - high_b), 0))
        # The published (ab - root) / (high_b (2b - high_b)), multiplied out: that one is 0 / 0 at high_b = 2b.
        low = np.where(low_a > 0, low_a * (2 * a - low_a) / (a * b + root), 0.0)
        root = np.sqrt(np.maximum((a * b) ** 2 - high_a * low_b * (2 * a - high_a) * (2 * b - low_b), 0))
        high = np.where(low_b > 0, (a * b + root) / (low_b * (2 * b - low_b)), np.inf)
    return low, high


def benjamini_hochberg(p: Sequence[float]) -> np.ndarray:
    """Adjusted p-values: rejecting those <= f keeps the false discovery rate at f (Benjamini, Hochberg 1995)."""
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    q = np.empty(len(p))
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1)
    return q


def _share(part, whole) -> np.ndarray:
    return np.asarray(part, float) / np.maximum(np.asarray(whole, float), 1)


def _normal(confidence: float, comparisons: int = 1) -> float:
    """z of a two-sided interval; Bonferroni over `comparisons` intervals that must hold together."""
    return float(stats.norm.isf((1 - confidence) / 2 / comparisons))


def impact(names: Sequence[str], kept: np.ndarray, total: np.ndarray, config: BiasConfig) -> dict:
    """The impact ratio min/max over groups of at least `minimum_group` rows, with an interval.

    Each pair's ratio gets an interval, all of them holding together with the configured confidence. The true min/max
    is the smallest of the true pair ratios, so it lies below the smallest upper limit and above the smallest lower
    limit. That way picking the two extremes does not make noise look like bias. With fewer than two such groups
    nothing is known, and the interval is all of (0, 1).
    """
    large = np.flatnonzero(total >= config.minimum_group)
    unknown = {"ratio": None, "low": 0.0, "high": 1.0, "worst": None, "best": None, "breach": False}
    share = _share(kept, total)[large]
    if len(large) < 2 or share.max() == 0:
        return {"groups": len(large)} | unknown
    # Of equals the last is best, so that it is never compared with itself.
    worst, best = int(share.argmin()), len(share) - 1 - int(share[::-1].argmax())
    z = _normal(config.confidence, len(large) * (len(large) - 1) // 2)
    k, n = np.asarray(kept)[large], np.asarray(total)[large]
    low, high = ratio_interval(k[:, None], n[:, None], k[None, :], n[None, :], z)
    other = ~np.eye(len(large), dtype=bool)
    upper = np.where(other, high, np.inf)
    pair = np.unravel_index(upper.argmin(), upper.shape)
    high = min(1.0, float(upper.min()))
    if high < 1:  # name the pair that the claim rests on
        worst, best = int(pair[0]), int(pair[1])
    return {
        "groups": len(large), "ratio": float(share.min() / share.max()), "low": min(1.0, float(low[other].min())),
        "high": high, "worst": names[large[worst]], "best": names[large[best]], "breach": high < config.limit,
    }


# --- one grouping ------------------------------------------------------------------------------------------

def compare(
    members: Members, population: np.ndarray, outcome: np.ndarray, reasons: Sequence[str], scores: np.ndarray,
    config: BiasConfig,
) -> dict:
    """All tables of one grouping.

    Args:
        population: bool [N], the rows whose group is known; a group is compared with the rest of them.
        outcome: int [N], 0 kept, r + 1 dropped by `reasons[r]`; the reasons in the order in which rules are applied.
        scores: float [N], NaN where there is none.

    Returns:
        `groups` (a record each), `impact` (over all rules together), `steps` (a record each rule, in order).
    """
    names = list(members)
    width = len(reasons) + 1
    counts_GR = np.array([np.bincount(outcome[rows], minlength=width) for rows in members.values()], np.int64)
    counts_GR = counts_GR.reshape(len(names), width)
    counts_R = np.bincount(outcome[population], minlength=width)
    records = _group_table(names, counts_GR, counts_R, config)
    for record, counts in zip(records, counts_GR):
        record["reasons"] = _reason_table(counts, counts_R, reasons, record["tested"], config)
        record["scores"] = _score_gap(scores, members[record["group"]], population, record["tested"])
    return {
        "rows": int(counts_R.sum()),
        "unknown": int(len(outcome) - counts_R.sum()),
        "groups": records,
        "impact": impact(names, counts_GR[:, 0], counts_GR.sum(1), config),
        "steps": _steps(names, counts_GR, reasons, config),
    }


def _group_table(names: Sequence[str], counts_GR: np.ndarray, counts_R: np.ndarray, config: BiasConfig) -> list[dict]:
    total, kept = counts_GR.sum(1), counts_GR[:, 0]
    rest_total, rest_kept = counts_R.sum() - total, counts_R[0] - kept
    z = _normal(config.confidence)
    low, high = wilson(kept, total, z)
    gap_low, gap_high = difference_interval(kept, total, rest_kept, rest_total, z)
    before = _share(total, counts_R.sum())
    retention, overall = _share(kept, total), counts_R[0] / max(counts_R.sum(), 1)

    def amplification(ratio: np.ndarray) -> np.ndarray:
        # share after / share before = R_g / R_all, and R_all mixes R_g with the rest's: monotone in R_g / R_rest.
        with np.errstate(invalid="ignore"):
            return np.where(np.isinf(ratio), 1 / np.maximum(before, 1e-300), ratio / (before * ratio + 1 - before))

    ratio_low, ratio_high = ratio_interval(kept, total, rest_kept, rest_total, z)
    table = {
        "total": total, "kept": kept, "share_before": before, "share_after": _share(kept, counts_R[0]),
        "retention": retention, "retention_low": low, "retention_high": high,
        "rest_retention": _share(rest_kept, rest_total),
        "gap": retention - _share(rest_kept, rest_total), "gap_low": gap_low, "gap_high": gap_high,
        "amplification": retention / overall if overall else np.full(len(names), np.nan),
        "amplification_low": amplification(ratio_low), "amplification_high": amplification(ratio_high),
    }
    tested = (total >= config.minimum_group) & (rest_total >= config.minimum_group)
    return [
        {"group": name, "tested": bool(tested[g])}
        | {key: _plain(column[g]) for key, column in table.items()}
        | {"p": _fisher(kept[g], total[g], rest_kept[g], rest_total[g]) if tested[g] else None}
        for g, name in enumerate(names)
    ]


def _reason_table(
    counts: np.ndarray, counts_R: np.ndarray, reasons: Sequence[str], tested: bool, config: BiasConfig
) -> list[dict]:
    """How much more of the group than of the rest each rule drops; the excesses add up to minus the retention gap."""
    total, rest_total = counts.sum(), counts_R.sum() - counts.sum()
    dropped, rest = counts[1:], (counts_R - counts)[1:]
    low, high = difference_interval(dropped, total, rest, rest_total, _normal(config.confidence))
    rate, rest_rate = _share(dropped, total), _share(rest, rest_total)
    return [
        {
            "reason": reason, "dropped": int(dropped[r]), "rate": float(rate[r]), "rest_rate": float(rest_rate[r]),
            "excess": float(rate[r] - rest_rate[r]), "excess_low": float(low[r]), "excess_high": float(high[r]),
            "p": _fisher(dropped[r], total, rest[r], rest_total) if tested else None,
        }
        for r, reason in enumerate(reasons)
        if counts_R[r + 1]
    ]


def _score_gap(scores: np.ndarray, rows: np.ndarray, population: np.ndarray, tested: bool) -> dict:
    """Kolmogorov-Smirnov distance between the group's scores and the rest's, before any selection."""
    rest = population.copy()
    rest[rows] = False
    inside, outside = scores[rows], scores[rest]
    inside, outside = inside[np.isfinite(inside)], outside[np.isfinite(outside)]
    found = {"n": len(inside), "ks": None, "p": None, "mean": None, "rest_mean": None}
    if not len(inside) or not len(outside):
        return found
    found |= {"mean": float(inside.mean(dtype=float)), "rest_mean": float(outside.mean(dtype=float))}
    result = stats.ks_2samp(inside, outside, method="asymp")
    return found | {"ks": float(result.statistic), "p": float(result.pvalue) if tested else None}


def _steps(names: Sequence[str], counts_GR: np.ndarray, reasons: Sequence[str], config: BiasConfig) -> list[dict]:
    """Rule by rule in order: the impact ratio among the rows that reached the rule, and of all rules up to it."""
    total, steps = counts_GR.sum(1), []
    entered = total
    for r, reason in enumerate(reasons):
        passed = entered - counts_GR[:, r + 1]
        if counts_GR[:, r + 1].any():
            steps.append({
                "reason": reason,
                "alone": impact(names, passed, entered, config),
                "cumulative": impact(names, passed, total, config),
                "retention": dict(zip(names, _share(passed, total).tolist())),
            })
        entered = passed
    return steps


def _fisher(kept: int, total: int, rest_kept: int, rest_total: int) -> float:
    table = [[int(kept), int(total - kept)], [int(rest_kept), int(rest_total - rest_kept)]]
    return float(stats.fisher_exact(table).pvalue)


def _plain(value: np.generic) -> int | float | None:
    value = value.item()
    return value if isinstance(value, int) or np.isfinite(value) else None


# --- identity and attribute --------------------------------------------------------------------------------

def npmi(both: np.ndarray, left: np.ndarray, right: np.ndarray, total: int) -> np.ndarray:
    """Normalised pointwise mutual information, -1 never together .. 0 independent .. 1 always (Bouma 2009).

    NaN where one of the two never occurs.
    """
    both, left, right = (np.asarray(count, float) for count in (both, left, right))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.log(both * total / (left * right)) / -np.log(both / total)
    value = np.where(both == 0, -1.0, np.where(both == total, 1.0, value))
    return np.where((left == 0) | (right == 0), np.nan, value)


def associations(identities: Mapping[str, Members], attributes: Members, kept: np.ndarray) -> list[dict]:
    """nPMI of every lexicon group with every attribute, over all rows and over the kept ones."""
    records = []
    for attribute, rows in attributes.items():
        has = np.zeros(len(kept), bool)
        has[rows] = True
        for grouping, members in identities.items():
            for group, inside in members.items():
                before = npmi(has[inside].sum(), len(inside), has.sum(), len(kept))
                after = npmi((has & kept)[inside].sum(), kept[inside].sum(), (has & kept).sum(), int(kept.sum()))
                records.append({
                    "grouping": grouping, "group": group, "attribute": attribute,
                    "together_before": int(has[inside].sum()), "together_after": int((has & kept)[inside].sum()),
                    "before": _plain(before), "after": _plain(after),
                })
    return records


# --- everything --------------------------------------------------------------------------------------------

def measure(
    identities: Mapping[str, Members], columns: Mapping[str, Members], attributes: Members, outcome: np.ndarray,
    reasons: Sequence[str], scores: np.ndarray, config: BiasConfig,
) -> dict:
    """Compare every grouping, adjust all p-values together, and list what is left as findings.

    Returns:
        `groupings` (name -> `compare`, plus `kind`), `associations`, `findings` (the tests that hold at the configured
        false discovery rate, largest effect first), `tests` (how many there were).
    """
    everyone = np.ones(len(outcome), bool)
    groupings = {
        name: {"kind": "lexicon"} | compare(members, everyone, outcome, reasons, scores, config)
        for name, members in identities.items()
    }
    for name, members in columns.items():
        known = np.zeros(len(outcome), bool)
        known[np.concatenate([np.zeros(0, int), *members.values()])] = True
        groupings[name] = {"kind": "column"} | compare(members, known, outcome, reasons, scores, config)
    tests = _adjust(groupings)
    return {
        "groupings": groupings,
        "associations": associations(identities, attributes, outcome == 0),
        "findings": _findings(groupings, config),
        "tests": tests,
    }


def _adjust(groupings: Mapping[str, dict]) -> int:
    """Write `q` beside every `p`, in place; one family for everything that was tested."""
    records = [
        record
        for grouping in groupings.values()
        for group in grouping["groups"]
        for record in (group, group["scores"], *group["reasons"])
    ]
    tested = [record for record in records if record["p"] is not None]
    adjusted = benjamini_hochberg([record["p"] for record in tested])
    for record in records:
        record["q"] = None
    for record, q in zip(tested, adjusted):
        record["q"] = float(q)
    return len(tested)


def _findings(groupings: Mapping[str, dict], config: BiasConfig) -> list[dict]:
    found = []
    for name, grouping in groupings.items():
        for group in grouping["groups"]:
            where = {"grouping": name, "group": group["group"]}
            effects = [("retention", None, group["gap"], group["q"])]
            effects += [("scores", None, group["scores"]["ks"], group["scores"]["q"])]
            effects += [("rule", rule["reason"], rule["excess"], rule["q"]) for rule in group["reasons"]]
            found += [
                where | {"kind": kind, "reason": reason, "effect": effect, "q": q}
                for kind, reason, effect, q in effects
                if q is not None and q <= config.false_discovery_rate
            ]
    # `sorted` is stable: equal effects stay in the order of the tables.
    return sorted(found, key=lambda record: -abs(record["effect"]))
