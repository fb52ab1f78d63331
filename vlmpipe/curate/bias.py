"""Does curation drop some groups more than others, by which rule, and is it more than noise?

Groups come from captions (an identity lexicon: word lists of the config), from a column or from the URL. A group's
retention is kept / total; two groups are compared by the ratio of their retentions (the four-fifths rule of
29 CFR 1607.4 D) and each rule by the difference of its drop rates. Every claim comes with an interval, and every test
enters one Benjamini-Hochberg family. What a gate bounds are interval ends that hold together for all groups (and all
rules) of a grouping, so that picking the extremes of many does not make noise look like bias.

Shape legend: N rows, G groups of one grouping, R reasons. `outcome` [N] is 0 for a kept row, r + 1 for one that
reason r dropped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from vlmpipe.curate.groups import Members, Words
from vlmpipe.curate.intervals import (
    benjamini_hochberg,
    difference_interval,
    distance_lower,
    exact,
    fisher,
    normal,
    npmi_of,
    npmi_shift,
    ratio_interval,
    share,
)
from vlmpipe.errors import UserError


@dataclass(frozen=True)
class BiasConfig:
    """Which groups are compared, and how sure a finding must be.

    lexicons: grouping -> group -> words (or language code -> words), matched whole and whatever their case.
    attributes: attribute -> words, for nPMI with the lexicons' groups. columns: pool or annotation columns, each value
    a group; `url_country` and `url_region` come from the URL's host, `regions` adds host endings to their table. bins:
    column -> edges, for columns of numbers. minimum_group: smaller groups are reported and not tested;
    minimum_together: the same for a group and an attribute in one caption. most_groups: of a column with more values
    the largest are compared. limit: the impact ratio below which a grouping or a rule is in breach; gap: the
    difference of drop rates above which a rule is. samples: rows shown for each rule in breach.
    """

    lexicons: dict[str, dict[str, Words]] = field(default_factory=dict)
    attributes: dict[str, Words] = field(default_factory=dict)
    columns: tuple[str, ...] = ("language",)
    bins: dict[str, tuple[float, ...]] = field(default_factory=dict)
    regions: dict[str, str] = field(default_factory=dict)
    minimum_group: int = 50
    minimum_together: int = 20
    most_groups: int = 100
    limit: float = 0.8
    gap: float = 0.1
    confidence: float = 0.95
    false_discovery_rate: float = 0.05
    samples: int = 5

    def __post_init__(self):
        for where, words in _lists(self).items():
            if not words or not all(word.strip() for word in words):
                raise UserError(f"{where}: found {list(words)}; expected words, none of them empty; fill the list")
        names = [*self.lexicons, *self.columns, *self.bins]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            kind = "a lexicon" if twice[0] in self.lexicons else "another column"
            raise UserError(f"columns: '{twice[0]}' is the name of {kind} too; rename one of them")
        for name, edges in self.bins.items():
            if not edges or list(edges) != sorted(set(edges)):
                raise UserError(f"bins.{name}: found {list(edges)}; expected growing numbers, at least one; mend them")
        for name, least in {"minimum_group": 1, "minimum_together": 1, "most_groups": 2, "samples": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name}: found {getattr(self, name)}; expected at least {least}; raise it")
        for name in ("limit", "gap", "confidence", "false_discovery_rate"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name}: found {getattr(self, name)}; expected a number between 0 and 1; mend it")


def _lists(config: BiasConfig) -> dict[str, Sequence[str]]:
    """Every word list of the config by its place."""
    named = {f"lexicons.{g}.{name}": words for g, groups in config.lexicons.items() for name, words in groups.items()}
    named |= {f"attributes.{name}": words for name, words in config.attributes.items()}
    found = {}
    for where, words in named.items():
        by_language = isinstance(words, Mapping) and words
        found |= {f"{where}.{code}": listed for code, listed in words.items()} if by_language else {where: words}
    return found


# --- the extremes of a grouping ----------------------------------------------------------------------------

def impact(
    names: Sequence[str], kept: np.ndarray, total: np.ndarray, config: BiasConfig, comparisons: int = 1
) -> dict:
    """The impact ratio min/max over groups of at least `minimum_group` rows, with an interval.

    Each pair's ratio gets an interval, all of them holding together with the configured confidence (and with those of
    `comparisons` such calls). The true min/max is the smallest of the true pair ratios, so it lies below the smallest
    upper limit and above the smallest lower limit. That way picking the two extremes does not make noise look like
    bias. With fewer than two such groups nothing is known, and the interval is all of (0, 1).
    """
    large = np.flatnonzero(total >= config.minimum_group)
    unknown = {"ratio": None, "low": 0.0, "high": 1.0, "worst": None, "best": None, "breach": False}
    part = share(kept, total)[large]
    if len(large) < 2 or part.max() == 0:
        return {"groups": len(large)} | unknown
    # Of equals the last is best, so that it is never compared with itself.
    worst, best = int(part.argmin()), len(part) - 1 - int(part[::-1].argmax())
    k, n = np.asarray(kept)[large], np.asarray(total)[large]
    z = _all_pairs(len(large), config, comparisons)
    low, high = ratio_interval(k[:, None], n[:, None], k[None, :], n[None, :], z)
    other = ~np.eye(len(large), dtype=bool)
    upper = np.where(other, high, np.inf)
    pair = np.unravel_index(upper.argmin(), upper.shape)
    high = min(1.0, float(upper.min()))
    if high < 1:  # name the pair that the claim rests on
        worst, best = int(pair[0]), int(pair[1])
    return {
        "groups": len(large), "ratio": float(part.min() / part.max()), "low": min(1.0, float(low[other].min())),
        "high": high, "worst": names[large[worst]], "best": names[large[best]], "breach": high < config.limit,
    }


def drop_gap(
    names: Sequence[str], dropped: np.ndarray, reached: np.ndarray, config: BiasConfig, comparisons: int = 1
) -> dict:
    """The largest difference of drop rates between two groups of which enough rows reached a rule.

    `low` is the largest lower limit over all pairs, whose intervals hold together as those of `impact` do; 0: the
    differences may be noise.
    """
    large = np.flatnonzero(reached >= config.minimum_group)
    if len(large) < 2:
        return {"gap": None, "low": 0.0, "worst": None, "best": None, "breach": False}
    d, n = np.asarray(dropped)[large], np.asarray(reached)[large]
    z, rate = _all_pairs(len(large), config, comparisons), share(d, n)
    low, _ = difference_interval(d[:, None], n[:, None], d[None, :], n[None, :], z)
    low = np.where(np.eye(len(large), dtype=bool), -1, low)
    worst, best = np.unravel_index(low.argmax(), low.shape)
    return {
        "gap": float(rate.max() - rate.min()), "low": max(float(low.max()), 0.0), "worst": names[large[worst]],
        "best": names[large[best]], "breach": bool(low.max() > config.gap),
    }


def _all_pairs(groups: int, config: BiasConfig, comparisons: int) -> float:
    return normal(config.confidence, groups * (groups - 1) // 2 * comparisons)


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
        `groups` (a record each), `impact` (over all rules together), `steps` (a record each rule, in order),
        `further` (how many groups are beyond `most_groups`, and their rows).
    """
    compared, further = _largest(members, config.most_groups)
    names = list(compared)
    width = len(reasons) + 1
    counts_GR = np.array([np.bincount(outcome[rows], minlength=width) for rows in compared.values()], np.int64)
    counts_GR = counts_GR.reshape(len(names), width)
    counts_R = np.bincount(outcome[population], minlength=width)
    records = _group_table(names, counts_GR, counts_R, config)
    for record, counts in zip(records, counts_GR):
        record["reasons"] = _reason_table(counts, counts_R, reasons, config)
        confidence = 1 - (1 - config.confidence) / len(names)
        record["scores"] = _score_gap(scores, compared[record["group"]], population, record["tested"], confidence)
    return {
        "rows": int(counts_R.sum()),
        "unknown": int(len(outcome) - counts_R.sum()),
        "further": further,
        "groups": records,
        "impact": impact(names, counts_GR[:, 0], counts_GR.sum(1), config),
        "steps": _steps(names, counts_GR, reasons, config),
    }


def _largest(members: Members, most: int) -> tuple[Members, dict]:
    """The `most` largest groups, by name; how many others there are, and of how many rows."""
    order = sorted(members, key=lambda name: (-len(members[name]), name))
    rest = order[most:]
    kept = set(order[:most])
    further = {"groups": len(rest), "rows": sum(len(members[name]) for name in rest)}
    return {name: rows for name, rows in members.items() if name in kept}, further


def _group_table(
    names: Sequence[str], counts_GR: np.ndarray, counts_R: np.ndarray, config: BiasConfig
) -> list[dict]:
    total, kept = counts_GR.sum(1), counts_GR[:, 0]
    rest_total, rest_kept = counts_R.sum() - total, counts_R[0] - kept
    z, z_all = normal(config.confidence), normal(config.confidence, max(len(names), 1))
    low, high = exact(kept, total, config.confidence)
    after_low, after_high = exact(kept, counts_R[0], config.confidence)
    gap_low, gap_high = difference_interval(kept, total, rest_kept, rest_total, z)
    before = share(total, counts_R.sum())
    retention, overall = share(kept, total), counts_R[0] / max(counts_R.sum(), 1)

    def amplification(ratio: np.ndarray) -> np.ndarray:
        # share after / share before = R_g / R_all, and R_all mixes R_g with the rest's: monotone in R_g / R_rest.
        with np.errstate(invalid="ignore"):
            return np.where(np.isinf(ratio), 1 / np.maximum(before, 1e-300), ratio / (before * ratio + 1 - before))

    ratio_low, ratio_high = ratio_interval(kept, total, rest_kept, rest_total, z)
    all_low, all_high = ratio_interval(kept, total, rest_kept, rest_total, z_all)
    table = {
        "total": total, "kept": kept, "share_before": before, "share_after": share(kept, counts_R[0]),
        "share_after_low": after_low, "share_after_high": after_high,
        "retention": retention, "retention_low": low, "retention_high": high,
        "rest_retention": share(rest_kept, rest_total),
        "gap": retention - share(rest_kept, rest_total), "gap_low": gap_low, "gap_high": gap_high,
        "amplification": retention / overall if overall else np.full(len(names), np.nan),
        "amplification_low": amplification(ratio_low), "amplification_high": amplification(ratio_high),
        "amplification_lower_of_all": amplification(all_low), "amplification_upper_of_all": amplification(all_high),
    }
    tested = (total >= config.minimum_group) & (rest_total >= config.minimum_group)
    return [
        {"group": name, "tested": bool(tested[g])}
        | {key: _plain(column[g]) for key, column in table.items()}
        | {"p": fisher(kept[g], total[g], rest_kept[g], rest_total[g]) if tested[g] else None}
        for g, name in enumerate(names)
    ]


def _reason_table(counts: np.ndarray, counts_R: np.ndarray, reasons: Sequence[str], config: BiasConfig) -> list[dict]:
    """How much more of the group than of the rest each rule drops, of the rows that reach it.

    `excess` is the same of all rows, so that the excesses of all rules add up to minus the retention gap.
    """
    records, z = [], normal(config.confidence)
    rest = counts_R - counts
    reached, rest_reached = int(counts.sum()), int(rest.sum())
    for r, reason in enumerate(reasons, 1):
        dropped, rest_dropped = int(counts[r]), int(rest[r])
        if counts_R[r]:
            low, high = difference_interval(dropped, reached, rest_dropped, rest_reached, z)
            tested = min(reached, rest_reached) >= config.minimum_group
            rate, rest_rate = float(share(dropped, reached)), float(share(rest_dropped, rest_reached))
            records.append({
                "reason": reason, "reached": reached, "dropped": dropped, "rate": rate, "rest_rate": rest_rate,
                "gap": rate - rest_rate, "gap_low": float(low), "gap_high": float(high),
                "excess": float(share(dropped, counts.sum()) - share(rest_dropped, rest.sum())),
                "p": fisher(dropped, reached, rest_dropped, rest_reached) if tested else None,
            })
        reached, rest_reached = reached - dropped, rest_reached - rest_dropped
    return records


def _score_gap(
    scores: np.ndarray, rows: np.ndarray, population: np.ndarray, tested: bool, confidence: float
) -> dict:
    """Kolmogorov-Smirnov distance between the group's scores and the rest's, before any selection."""
    rest = population.copy()
    rest[rows] = False
    inside, outside = scores[rows], scores[rest]
    inside, outside = inside[np.isfinite(inside)], outside[np.isfinite(outside)]
    found = {"n": len(inside), "ks": None, "ks_lower": 0.0, "p": None, "mean": None, "rest_mean": None}
    if not len(inside) or not len(outside):
        return found
    found |= {"mean": float(inside.mean(dtype=float)), "rest_mean": float(outside.mean(dtype=float))}
    result = stats.ks_2samp(inside, outside, method="asymp")
    lower = distance_lower(result.statistic, len(inside), len(outside), confidence)
    return found | {
        "ks": float(result.statistic), "ks_lower": lower, "p": float(result.pvalue) if tested else None,
    }


def _steps(
    names: Sequence[str], counts_GR: np.ndarray, reasons: Sequence[str], config: BiasConfig
) -> list[dict]:
    """Rule by rule in order: the groups among the rows that reached the rule, and of all rows up to it."""
    total, steps = counts_GR.sum(1), []
    used = [r for r in range(len(reasons)) if counts_GR[:, r + 1].any()]
    entered = total
    for r in used:
        dropped = counts_GR[:, r + 1]
        passed = entered - dropped
        steps.append({
            "reason": reasons[r],
            "alone": impact(names, passed, entered, config, len(used)),
            "drops": drop_gap(names, dropped, entered, config, len(used)),
            "cumulative": impact(names, passed, total, config),
            "retention": dict(zip(names, share(passed, total).tolist())),
            "amplification": dict(zip(names, _amplified(passed, total))),
        })
        entered = passed
    return steps


def _amplified(passed: np.ndarray, total: np.ndarray) -> list[float | None]:
    """Each group's share among all members after some rules over its share before any."""
    overall = passed.sum() / max(total.sum(), 1)
    return [_plain(value) for value in (share(passed, total) / overall if overall else np.full(len(total), np.nan))]


def _plain(value: np.generic) -> int | float | None:
    value = value.item()
    return value if isinstance(value, int) or np.isfinite(value) else None


# --- identity and attribute --------------------------------------------------------------------------------

def associations(
    identities: Mapping[str, Members], attributes: Members, kept: np.ndarray, config: BiasConfig
) -> list[dict]:
    """nPMI of every lexicon group with every attribute, over all rows and over the kept ones.

    Pairs with at least `minimum_together` rows get an interval and a test of the shift, by bootstrap.
    """
    records = []
    pairs = max(sum(map(len, identities.values())) * len(attributes), 1)
    z, z_all = normal(config.confidence), normal(config.confidence, pairs)
    for attribute, rows in attributes.items():
        has = np.zeros(len(kept), bool)
        has[rows] = True
        for grouping, members in identities.items():
            for group, inside in members.items():
                cells, kept_cells = _cells(inside, has, np.ones(len(kept), bool)), _cells(inside, has, kept)
                before, after = _plain(npmi_of(cells)), _plain(npmi_of(kept_cells))
                known = before is not None and after is not None
                tested = known and cells[0] >= config.minimum_together
                low, high, p = npmi_shift(kept_cells, cells - kept_cells, z) if tested else (None, None, None)
                shift = after - before if known else None
                # The interval is symmetric, so that of all pairs together is the same, wider.
                least = max(abs(shift) - (high - shift) * z_all / z, 0.0) if tested else 0.0
                records.append({
                    "grouping": grouping, "group": group, "attribute": attribute,
                    "together_before": int(cells[0]), "together_after": int(kept_cells[0]), "before": before,
                    "after": after, "shift": shift, "shift_low": low, "shift_high": high, "shift_lower_of_all": least,
                    "p": p,
                })
    return records


def _cells(inside: np.ndarray, has: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Counts of rows with both, the group alone, the attribute alone, neither; int [4]."""
    both, group, attribute = (has & among)[inside].sum(), among[inside].sum(), (has & among).sum()
    return np.array([both, group - both, attribute - both, among.sum() - group - attribute + both], np.int64)


# --- everything --------------------------------------------------------------------------------------------

def measure(
    identities: Mapping[str, Members], columns: Mapping[str, Members], attributes: Members, outcome: np.ndarray,
    reasons: Sequence[str], scores: np.ndarray, config: BiasConfig,
) -> dict:
    """Compare every grouping, adjust all p-values together, and list what is left as findings.

    Returns:
        `groupings` (name -> `compare`, plus `kind`), `associations`, `rules` (those in breach), `findings` (the tests
        that hold at the configured false discovery rate, largest effect first), `tests` (how many there were).
    """
    groupings = {}
    for kind, found in (("lexicon", identities), ("column", columns)):
        for name, members in found.items():
            population = np.full(len(outcome), kind == "lexicon")
            for rows in members.values():
                population[rows] = True
            groupings[name] = {"kind": kind} | compare(members, population, outcome, reasons, scores, config)
    related = associations(identities, attributes, outcome == 0, config)
    tests = _adjust(groupings, related)
    return {
        "groupings": groupings,
        "associations": related,
        "rules": _rules(groupings),
        "findings": _findings(groupings, related, config),
        "tests": tests,
    }


def _rules(groupings: Mapping[str, dict]) -> list[dict]:
    """The rules that drop one group far more than another, by more than noise, worst first."""
    found = []
    for name, grouping in groupings.items():
        groups = {group["group"]: {r["reason"]: r for r in group["reasons"]} for group in grouping["groups"]}
        for step in grouping["steps"]:
            if step["alone"]["breach"] or step["drops"]["breach"]:
                pair = step["alone"] if step["alone"]["breach"] else step["drops"]
                worst, best = (groups[pair[side]][step["reason"]] for side in ("worst", "best"))
                found.append({
                    "grouping": name, "reason": step["reason"], "group": pair["worst"], "against": pair["best"],
                    "dropped": worst["dropped"], "reached": worst["reached"], "rate": worst["rate"],
                    "against_rate": best["rate"], "gap_low": step["drops"]["low"],
                    "pass_ratio": step["alone"]["ratio"], "pass_ratio_upper": step["alone"]["high"], "q": worst["q"],
                })
    return sorted(found, key=lambda record: record["against_rate"] - record["rate"])


def _adjust(groupings: Mapping[str, dict], related: Sequence[dict]) -> int:
    """Write `q` beside every `p`, in place; one family for everything that was tested."""
    records = [
        record
        for grouping in groupings.values()
        for group in grouping["groups"]
        for record in (group, group["scores"], *group["reasons"])
    ]
    records += related
    tested = [record for record in records if record["p"] is not None]
    adjusted = benjamini_hochberg([record["p"] for record in tested])
    for record in records:
        record["q"] = None
    for record, q in zip(tested, adjusted):
        record["q"] = float(q)
    return len(tested)


def _findings(groupings: Mapping[str, dict], related: Sequence[dict], config: BiasConfig) -> list[dict]:
    effects = []
    for name, grouping in groupings.items():
        for group in grouping["groups"]:
            at = (name, group["group"])
            effects.append((*at, "retention", None, group["gap"], group["q"]))
            effects.append((*at, "scores", None, group["scores"]["ks"], group["scores"]["q"]))
            effects += [(*at, "rule", rule["reason"], rule["gap"], rule["q"]) for rule in group["reasons"]]
    effects += [(r["grouping"], r["group"], "association", r["attribute"], r["shift"], r["q"]) for r in related]
    keys = ("grouping", "group", "kind", "reason", "effect", "q")
    found = [dict(zip(keys, effect)) for effect in effects]
    found = [record for record in found if record["q"] is not None and record["q"] <= config.false_discovery_rate]
    # `sorted` is stable: equal effects stay in the order of the tables.
    return sorted(found, key=lambda record: -abs(record["effect"]))
