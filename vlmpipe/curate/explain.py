"""Why one sample was kept or dropped: its numbers, what each rule asked of it, and who it was measured against."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlmpipe import shards
from vlmpipe.curate.filters import DECISIONS, FUNNEL, KIND
from vlmpipe.errors import UserError

SHOWN_NEIGHBOURS = 20
# What a rule of this class reads; the others name their `column`.
SIZE = ("original_width", "original_height")
READS = {
    "Downloaded": ("status", "reason"), "Decoded": ("error",), "Small": SIZE, "Elongated": SIZE,
    "CaptionWords": ("caption_words",), "CaptionChars": ("caption_chars",), "Language": ("language", "language_score"),
    "EvaluationOverlap": ("phash",), "NearDuplicate": ("phash",), "ExactDuplicate": ("sha256",), "OptOut": ("url",),
}


def explain(uid: str, root: Path) -> dict[str, Any]:
    """Everything that decided the sample whose uid begins with `uid`, from the files under `root`.

    Returns:
        sample (pool columns), numbers (annotation columns that are scalars), decision, rules (one each, in order:
        outcome `passed`, `dropped` or `not asked`, the rule's settings and the values that it reads), kept_instead (the
        neighbour that it was dropped for) and stands_for (the rows that were dropped for it).

    Raises:
        UserError: no sample or several begin so, or a file is missing.
    """
    selection = Path(root) / "selection"
    shards.read_manifest(selection, KIND)
    decision = _only(uid, selection / DECISIONS)
    sample, numbers = _record(Path(root), decision["pool"], decision["uid"])
    other = decision["other_uid"]
    return {
        "decision": decision,
        "sample": sample,
        "numbers": numbers,
        "rules": _rules(shards.read_json(selection / FUNNEL)["steps"], decision, sample | numbers),
        "kept_instead": None if other is None else _neighbour(Path(root), selection, other),
        "stands_for": _rows(selection / DECISIONS, pc.field("other_uid") == decision["uid"])[:SHOWN_NEIGHBOURS],
    }


def _rows(decisions: Path, condition: pc.Expression) -> list[dict]:
    return pq.read_table(decisions, filters=condition).to_pylist()


def _only(uid: str, decisions: Path) -> dict:
    found = _rows(decisions, pc.starts_with(pc.field("uid"), uid))
    exact = [row for row in found if row["uid"] == uid]
    found = exact or found
    if len(found) != 1:
        listed = ", ".join(row["uid"] for row in found[:5])
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise UserError(f"found {len(found)} samples whose uid begins with '{uid}' {listed}{more}; expected one; "
                        f"give {'more of it' if found else 'one that stands in ' + str(decisions)}")
    return found[0]


def _record(root: Path, pool: str, uid: str) -> tuple[dict, dict]:
    """The pool's row and the annotations' scalar columns."""
    for shard in shards.read_manifest(root / "pools" / pool)["shards"]:
        file = f"{shard['name']}.parquet"
        rows = _rows(root / "pools" / pool / file, pc.field("uid") == uid)
        if rows:
            notes = root / "annotations" / pool / file
            return rows[0], _scalars(notes, uid) if notes.exists() else {}
    raise UserError(f"found {uid} in the decisions, but not in pool {pool}; expected a selection of this pool; rerun "
                    f"`select`")


def _scalars(notes: Path, uid: str) -> dict:
    fields = [field.name for field in pq.read_schema(notes) if not _bulky(field.type)]
    table = pq.read_table(notes, columns=fields, filters=pc.field("uid") == uid)
    return {name: value for row in table.to_pylist() for name, value in row.items() if name != "uid"}


def _bulky(kind: pa.DataType) -> bool:
    return pa.types.is_nested(kind) or (pa.types.is_fixed_size_binary(kind) and kind.byte_width > 32)


def _rules(steps: Sequence[dict], decision: dict, values: dict) -> list[dict]:
    found, gone = [], False
    for step in steps:
        name = step["reason"]
        here = not gone and not decision["kept"] and _rule_of(decision["reason"]) == name
        reads = [column for column in (*READS.get(step["kind"], ()), step["config"].get("column")) if column]
        found.append({
            "rule": name, "outcome": "not asked" if gone else "dropped" if here else "passed",
            "settings": step["config"] | ({"threshold": step["threshold"]} if "threshold" in step else {}),
            "values": {column: values.get(column) for column in dict.fromkeys(reads)},
        })
        gone = gone or here
    return found


def _rule_of(reason: str) -> str:
    rule = reason.partition(":")[0]
    return {"download": "downloaded", "decode": "decoded"}.get(rule, rule)


def _neighbour(root: Path, selection: Path, uid: str) -> dict:
    rows = _rows(selection / DECISIONS, pc.field("uid") == uid)
    if not rows:
        return {"uid": uid, "note": "a picture of an evaluation set"}
    sample, numbers = _record(root, rows[0]["pool"], uid)
    return rows[0] | {"url": sample.get("url"), "caption": sample.get("caption"), "numbers": numbers}


# --- on the terminal ---------------------------------------------------------------------------------------

def as_json(found: dict) -> str:
    return json.dumps(found, indent=2, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def show(found: dict, console: Console | None = None) -> None:
    """Print it; what came from the web is escaped."""
    console = console or Console()
    decision = found["decision"]
    verdict = "[green]kept[/]" if decision["kept"] else f"[red]dropped[/] by {escape(decision['reason'])}"
    measured = [name for name in ("value", "threshold") if decision[name] is not None]
    measured = "".join(f", {name} {_said(decision[name])}" for name in measured)
    console.print(f"{escape(decision['uid'])} (pool {escape(decision['pool'])}): {verdict}{measured}")
    console.print(f"  {escape(str(found['sample'].get('url')))}\n  {escape(repr(found['sample'].get('caption')))}")
    console.print(_rule_table(found["rules"]))
    numbers = Table("column", "value", title="its record")
    for name, value in (found["sample"] | found["numbers"]).items():
        numbers.add_row(escape(name), escape(_said(value)))
    console.print(numbers)
    if found["kept_instead"]:
        console.print(_neighbours("kept instead of it", [found["kept_instead"]]))
    if found["stands_for"]:
        console.print(_neighbours("dropped in its favour", found["stands_for"]))


def _rule_table(rules: Sequence[dict]) -> Table:
    table = Table("rule", "outcome", "its values", "settings", title="rules, in order")
    for rule in rules:
        colour = {"passed": "green", "dropped": "red", "not asked": "dim"}[rule["outcome"]]
        values, settings = (
            ", ".join(f"{name} {_said(value)}" for name, value in rule[part].items()) for part in ("values", "settings")
        )
        table.add_row(escape(rule["rule"]), f"[{colour}]{rule['outcome']}[/]", escape(values), escape(settings))
    return table


def _neighbours(title: str, rows: Sequence[dict]) -> Table:
    table = Table("uid", "pool", "reason", "value", "url", title=title)
    for row in rows:
        reason = row.get("reason") or row.get("note") or "kept"
        cells = (row["uid"], row.get("pool"), reason, row.get("value"), row.get("url"))
        table.add_row(*(escape("" if cell is None else _said(cell)) for cell in cells))
    return table


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value.hex() if isinstance(value, bytes) else str(value)
