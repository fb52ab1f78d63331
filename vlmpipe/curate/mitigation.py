"""A score rule that may not drop one group far more than another: thresholds of their own for groups, or quotas.

Legend: A rows still alive, G groups. It costs something either way, and says what in the funnel (`mitigation`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa

from vlmpipe.curate import groups
from vlmpipe.curate.columns import Rows
from vlmpipe.curate.groups import Members, Words
from vlmpipe.curate.rules import Drops, Score, safe_cut
from vlmpipe.errors import UserError


@dataclass(frozen=True)
class FairScore(Score):
    """`Score`, with the pass rate of every group at least `ratio` times that of the best one.

    Groups: the values of the column `by`, or those of a `lexicon` (group -> words, or language code -> words) whose
    words a caption has. `per_group_threshold`: a group that passes too rarely gets a lower threshold; nobody else is
    dropped for it, and the rows that come in have lower scores. `quota`: a group that passes too often keeps its best
    rows only; no score sinks, and rows are lost. A row of several groups passes by the mildest of their thresholds,
    with quotas by the strictest. Groups under `minimum_group` scored rows, and rows of none, keep the common threshold.
    """

    column: str = "clip_score"
    by: str | None = None
    lexicon: dict[str, Words] = field(default_factory=dict)
    method: Literal["per_group_threshold", "quota"] = "per_group_threshold"
    ratio: float = 0.9
    minimum_group: int = 50
    alone: ClassVar = False

    def __post_init__(self):
        super().__post_init__()
        if self.min is None and self.top_fraction is None:
            raise UserError("found neither min nor top_fraction; expected one: it is what groups are compared at")
        if (self.by is None) == (not self.lexicon):
            raise UserError("found by and lexicon, or neither; expected one of them: they say who is in which group")
        if not 0 < self.ratio <= 1:
            raise UserError(f"found ratio {self.ratio}; expected more than 0 and at most 1")
        if self.minimum_group < 1:
            raise UserError(f"found minimum_group {self.minimum_group}; expected at least 1")

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        common = super().drops(rows, alive).facts.get("threshold", -np.inf)
        scores = rows.numbers(self.column, alive)
        scores[~np.isfinite(scores)] = np.nan
        members = self._members(rows, alive)
        limit, cost = self.limits(scores, members, common)
        bad, missing = ~(scores >= limit), np.isnan(scores)
        facts = {"threshold": float(common), "mitigation": cost}
        return Drops(alive[bad], scores[bad], np.where(missing, np.nan, limit)[bad], missing=missing[bad], facts=facts)

    def limits(self, scores: np.ndarray, members: Members, common: float) -> tuple[np.ndarray, dict[str, Any]]:
        """The threshold of each row, float64 [A], where `common` is that of all, and what the change costs."""
        cuts = thresholds(scores, members, common, self)
        limit = _row_limits(len(scores), members, cuts, common, self.method)
        return limit, _cost(scores, members, cuts, common, ~(scores >= limit), self)

    def _members(self, rows: Rows, alive: np.ndarray) -> Members:
        """The groups' positions among the rows alive."""
        if self.by is not None:
            code, values = rows.codes(self.by, alive)
            return {value: np.flatnonzero(code == number) for number, value in enumerate(values)}
        parts: dict[str, list[np.ndarray]] = {name: [] for name in self.lexicon}
        known = frozenset().union(*(part.names for part in rows.parts))
        wanted = [name for name in ("caption", "language", "language_score") if name in known]
        for here, table in rows.scan(wanted, alive):
            spoken = _languages(table)
            for name, positions in groups.mentions(table["caption"], self.lexicon, spoken).items():
                parts[name].append(positions + here.start)
        return groups.join(parts)


def _languages(table: pa.Table) -> pa.Array | None:
    if "language" not in table.column_names:
        return None
    confidence = table["language_score"] if "language_score" in table.column_names else None
    return groups.believed(table["language"], confidence)


def thresholds(scores: np.ndarray, members: Members, common: float, rule: FairScore) -> dict[str, float]:
    """The threshold of each group that needs another one than `common`.

    Raises:
        UserError: by quotas nothing of any group could stay.
    """
    scored = {name: scores[rows][np.isfinite(scores[rows])] for name, rows in members.items()}
    rate = {name: float((s >= common).mean()) for name, s in scored.items() if len(s) >= rule.minimum_group}
    if len(rate) < 2:
        return {}
    if rule.method == "per_group_threshold":
        least = rule.ratio * max(rate.values())
        return {name: safe_cut(scored[name], least) for name, share in rate.items() if share < least}
    worst = min(rate, key=rate.get)
    if rate[worst] == 0:
        raise UserError(f"found no row of group '{worst}' that passes; expected some, as a quota gives the others no "
                        f"more; use method per_group_threshold, or lower the threshold")
    most = rate[worst] / rule.ratio
    return {name: _quota_cut(scored[name], most) for name, share in rate.items() if share > most}


def _quota_cut(scores: np.ndarray, share: float) -> float:
    """The least score at which at most `share` of the rows pass; ties with the first that fails fail too."""
    allowed = int(np.floor(len(scores) * share + 1e-9))
    best_first = -np.sort(-scores)
    passing = best_first[best_first > best_first[allowed]]
    return float(passing[-1]) if len(passing) else float(np.nextafter(best_first[0], np.inf))


def _row_limits(
    rows: int, members: Members, cuts: Mapping[str, float], common: float, method: str
) -> np.ndarray:
    """The threshold of each row, float64 [A]."""
    limit = np.full(rows, common)
    better = np.minimum if method == "per_group_threshold" else np.maximum
    for name, cut in cuts.items():
        limit[members[name]] = better(limit[members[name]], cut)
    return limit


def _cost(
    scores: np.ndarray, members: Members, cuts: Mapping[str, float], common: float, bad: np.ndarray, rule: FairScore
) -> dict[str, Any]:
    """What the mitigation changes against the common threshold: rows, their mean score, and each group's pass rate."""
    before, after, known = scores >= common, ~bad, np.isfinite(scores)
    table = {}
    for name, rows in members.items():
        scored = int(known[rows].sum())
        if scored >= rule.minimum_group:
            table[name] = {
                "rows": scored, "threshold": float(cuts.get(name, common)),
                "pass_rate_before": float(before[rows].sum() / scored),
                "pass_rate_after": float(after[rows].sum() / scored),
            }
    return {
        "method": rule.method, "ratio": rule.ratio, "groups": table,
        "kept_before": int(before.sum()), "kept_after": int(after.sum()),
        "rows_gained": int((after & ~before).sum()), "rows_lost": int((before & ~after).sum()),
        "mean_score_before": _mean(scores[before]), "mean_score_after": _mean(scores[after]),
        "impact_ratio_before": _ratio(table, "pass_rate_before"),
        "impact_ratio_after": _ratio(table, "pass_rate_after"),
    }


def _mean(scores: np.ndarray) -> float | None:
    return float(scores.mean()) if len(scores) else None


def _ratio(table: Mapping[str, Mapping], key: str) -> float | None:
    rates = [group[key] for group in table.values()]
    return min(rates) / max(rates) if len(rates) > 1 and max(rates) else None
