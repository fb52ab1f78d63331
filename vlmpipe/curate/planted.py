"""What the embedded world planted against what curation caught: curation's measurable truth.

Only the report and the benchmarks read the plan; no stage that decides about a row may.
"""

from collections import Counter
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmpipe.curate.urls import Columns, read_list
from vlmpipe.errors import UserError

SWAPPED = "swapped"
DUPLICATE = "duplicate"


def caught(planted: Path, decisions: Path, rule: str = "clip") -> dict:
    """Count planted and caught faults by kind.

    A row is caught when it was dropped, for whatever reason. A planted duplicate is also caught when it stayed and
    another row was dropped for being its twin: which of the two is the copy is a matter of taste.

    Args:
        planted: parquet with `url`, `caption` and `fault` (null for a sound row), in the order of the pool's list.
        decisions: decisions.parquet of the selection.
        rule: the reason under which the pair score drops rows.

    Returns:
        rows: [{kind, planted, caught, reasons: {reason: count}}] by kind; swapped: precision and recall of `rule` as
        a detector of swapped captions (None where none were planted), with the counts behind them. Precision is
        over all rows that the rule dropped, recall over all planted ones.

    Raises:
        UserError: a file is missing, or a planted row is not among the decisions.
    """
    faults = {row["uid"]: row["fault"] for row in read_list(planted, Columns(extra=("fault",)))}
    reasons, twins = _outcomes(Path(decisions), faults)
    kinds: dict[str, Counter] = {}
    for uid, fault in faults.items():
        if fault is not None:
            stayed = "twin_dropped" if DUPLICATE in fault and uid in twins else "kept"
            kinds.setdefault(fault, Counter())[reasons[uid] or stayed] += 1
    rows = [_row(kind, outcomes) for kind, outcomes in sorted(kinds.items())]
    return {"rows": rows, "swapped": _swapped(faults, reasons, rule)}


def _outcomes(decisions: Path, faults: dict[str, str | None]) -> tuple[dict[str, str | None], set[str]]:
    """Each planted row's reason (None: kept), and the rows that some duplicate was dropped in favour of."""
    if not decisions.is_file():
        raise UserError(f"found no {decisions}; expected the selection's decisions; run `select`")
    table = pq.read_table(decisions, columns=["uid", "reason", "other_uid"])
    found = dict(zip(table["uid"].to_pylist(), table["reason"].to_pylist(), strict=True))
    missing = faults.keys() - found.keys()
    if missing:
        raise UserError(f"found {len(missing)} planted rows without a decision; expected all; rerun world and select")
    is_twin = pc.fill_null(pc.match_substring(table["reason"], DUPLICATE), False)
    return {uid: found[uid] for uid in faults}, set(table["other_uid"].filter(is_twin).to_pylist())


def _row(kind: str, outcomes: Counter) -> dict:
    reasons = {reason: count for reason, count in outcomes.most_common() if reason != "kept"}
    return {"kind": kind, "planted": outcomes.total(), "caught": sum(reasons.values()), "reasons": reasons}


def _swapped(faults: dict[str, str | None], reasons: dict[str, str | None], rule: str) -> dict | None:
    swapped = {uid for uid, fault in faults.items() if fault is not None and fault.startswith(SWAPPED)}
    if not swapped:
        return None
    dropped = {uid for uid, reason in reasons.items() if reason == rule}
    hits = len(swapped & dropped)
    return {
        "planted": len(swapped),
        "dropped": len(dropped),
        "hits": hits,
        "precision": hits / len(dropped) if dropped else None,
        "recall": hits / len(swapped),
    }
