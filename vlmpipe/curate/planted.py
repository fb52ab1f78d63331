"""What the embedded world planted against what curation caught: curation's measurable truth.

Only the report and the benchmarks read the plan; no stage that decides about a row may.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq

from vlmpipe.curate.urls import Columns, read_list
from vlmpipe.errors import UserError

SWAPPED, DUPLICATE, DOWNLOAD = "swapped", "duplicate", "download:"
MISSED, RECOVERED, TWIN_DROPPED = "missed", "recovered", "twin_dropped"


def caught(planted: Path, decisions: Path, rule: str = "clip") -> dict:
    """Count planted and caught faults by kind.

    A row is caught when it was dropped, for whatever reason, with two exceptions. A duplicate is also caught when
    it stayed and its twin did not: which of the two is the copy is a matter of taste. A fault that a patient
    downloader gets over is caught when the picture came after all.

    Args:
        planted: parquet in the order of the pools' lists with `url`, `caption`, `fault` (null for a sound row),
            `recovers` (whether the picture can be had) and `twin_url` (what a duplicate repeats).
        decisions: decisions.parquet of the selection.
        rule: the reason under which the pair score drops rows.

    Returns:
        rows: [{kind, planted, caught, reasons: {reason: count}}] by kind. swapped: precision and recall of `rule` as
        a detector of swapped captions (None where none were planted), with the counts behind them; precision is
        over all rows that the rule dropped, recall over all planted ones. elsewhere: planted rows of pools that
        this selection did not see.

    Raises:
        UserError: a file is missing, or no planted row is among the decisions.
    """
    plan = {row["uid"]: row for row in read_list(planted, Columns(extra=("fault", "recovers", "twin_url")))}
    reasons = _reasons(Path(decisions))
    seen = {uid: row for uid, row in plan.items() if uid in reasons}
    if not seen:
        raise UserError(f"{planted}: found none of its rows in {decisions}; expected its pools; rerun world and select")
    kept_urls = {row["url"] for uid, row in seen.items() if reasons[uid] is None}
    kinds: dict[str, Counter] = {}
    for uid, row in seen.items():
        if row["fault"] is not None:
            kinds.setdefault(row["fault"], Counter())[_outcome(row, reasons[uid], kept_urls)] += 1
    rows = [_row(kind, outcomes) for kind, outcomes in sorted(kinds.items())]
    swapped = {uid for uid, row in seen.items() if row["fault"] == SWAPPED}
    dropped = {uid for uid in seen if reasons[uid] == rule}
    return {"rows": rows, "swapped": _detection(swapped, dropped), "elsewhere": len(plan) - len(seen)}


def _reasons(decisions: Path) -> dict[str, str | None]:
    """Each decided row's reason; None: it was kept."""
    if not decisions.is_file():
        raise UserError(f"found no {decisions}; expected the selection's decisions; run `select`")
    table = pq.read_table(decisions, columns=["uid", "reason"])
    return dict(zip(table["uid"].to_pylist(), table["reason"].to_pylist(), strict=True))


def _outcome(row: Mapping, reason: str | None, kept_urls: set[str]) -> str:
    """MISSED where the fault got through, else how it was caught."""
    if row["recovers"]:
        return MISSED if reason is not None and reason.startswith(DOWNLOAD) else RECOVERED
    if reason is None and DUPLICATE in row["fault"] and row["twin_url"] not in kept_urls:
        return TWIN_DROPPED
    return reason or MISSED


def _row(kind: str, outcomes: Counter) -> dict:
    reasons = {reason: count for reason, count in outcomes.most_common() if reason != MISSED}
    return {"kind": kind, "planted": outcomes.total(), "caught": sum(reasons.values()), "reasons": reasons}


def _detection(planted: set[str], dropped: set[str]) -> dict | None:
    if not planted:
        return None
    hits = len(planted & dropped)
    return {
        "planted": len(planted),
        "dropped": len(dropped),
        "hits": hits,
        "precision": hits / len(dropped) if dropped else None,
        "recall": hits / len(planted),
    }
