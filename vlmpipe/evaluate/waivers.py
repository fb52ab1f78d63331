"""Waivers: a person's word, for a while, that a rule which did not pass shall not stop the run.

They live in `<results>/waivers/<gate>.yaml`, beside the verdicts and committed with them: a list of
`{rule, by, reason, until}`. A waived check keeps its verdict; the waiver stands beside it wherever that is shown.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import yaml

from vlmpipe.config import nearest, parse, to_dict
from vlmpipe.errors import UserError
from vlmpipe.shards import write_bytes_atomic

MAX_DAYS = 90  # one that never ends is a change of the rules, and belongs there


@dataclass(frozen=True)
class Waiver:
    """Who lets which rule of a gate pass, why, and until when (YYYY-MM-DD, UTC, that day included).

    `excuses` INCONCLUSIVE covers checks that could not be decided, FAIL those that failed too. `evidence`, a digest
    that the verdict names, binds it to the very metrics that the person saw; null holds for whatever comes until then.
    """

    rule: str
    by: str
    reason: str
    until: str
    excuses: Literal["FAIL", "INCONCLUSIVE"] = "FAIL"
    evidence: str | None = None

    def __post_init__(self):
        for name in ("rule", "by", "reason"):
            if not getattr(self, name).strip():
                raise UserError(f"waiver of '{self.rule}': found an empty '{name}'; expected who waives which rule and "
                                f"why; fill it in")
        try:
            date.fromisoformat(self.until)
        except ValueError:
            raise UserError(f"waiver of '{self.rule}': found until '{self.until}'; expected a day as YYYY-MM-DD, "
                            f"at most {MAX_DAYS} days ahead; write one") from None


def today() -> date:
    return datetime.now(UTC).date()


def waivers_path(results: Path | str, gate: str) -> Path:
    """Where the waivers of a gate are."""
    return Path(results) / "waivers" / f"{gate}.yaml"


def read_waivers(path: Path | None) -> list[Waiver]:
    """The waivers of a file; no file holds none.

    Raises:
        UserError: it is no list of waivers, or one of them says too little.
    """
    if path is None or not Path(path).exists():
        return []
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not yaml ({' '.join(str(error).split())}); expected a list of waivers; "
                        f"mend it") from None
    if not isinstance(found, list):
        raise UserError(f"{path}: found {type(found).__name__}; expected a list of {{rule, by, reason, until}}; "
                        f"mend it")
    return [parse(Waiver, _days_as_text(entry), f"{path}[{i}]") for i, entry in enumerate(found)]


def add_waivers(path: Path, waivers: Sequence[Waiver]) -> None:
    """Write waivers into a file; one that was there for the same rule goes, the others stay."""
    rules = {waiver.rule for waiver in waivers}
    kept = [waiver for waiver in read_waivers(path) if waiver.rule not in rules]
    entries = [{key: value for key, value in to_dict(waiver).items() if value is not None}
               for waiver in sorted([*kept, *waivers], key=lambda waiver: waiver.rule)]
    write_bytes_atomic(path, yaml.safe_dump(entries, sort_keys=False, allow_unicode=True).encode())


def refuse_expired(waivers: Sequence[Waiver | Mapping[str, Any]], where: str, day: date | None = None) -> None:
    """Only those that hold on `day` (today) may stand.

    Raises:
        UserError: one has ended, or ends later than a waiver may.
    """
    day = day or today()
    for waiver in waivers:
        facts = waiver if isinstance(waiver, Mapping) else to_dict(waiver)
        until = date.fromisoformat(facts["until"])
        if until < day:
            raise UserError(f"{where}: the waiver of '{facts['rule']}' by {facts['by']} expired on {until}; expected "
                            f"one that holds today, {day}; remove or renew it, then rerun the gate")
        if until > day + timedelta(days=MAX_DAYS):
            raise UserError(f"{where}: found a waiver of '{facts['rule']}' until {until}; expected at most {MAX_DAYS} "
                            f"days from today, {day}; shorten it, or change the rule")


def apply_waivers(
    checks: Sequence[Mapping[str, Any]], waivers: Sequence[Waiver], evidence: str, where: str = "waivers",
    day: date | None = None,
) -> list[dict[str, Any]]:
    """The checks, each with `waived`: the waiver that covers it, as plain data, or None.

    Args:
        checks: a gate's, with `name` (of the rule) and `verdict` (PASS, FAIL, INCONCLUSIVE).
        evidence: digest of what the gate judged; waivers bound to another one cover nothing.
        where: the file of the waivers, for messages.

    Raises:
        UserError: a waiver has expired, is of a rule that the gate doesn't have, or is the second of its rule.
    """
    refuse_expired(waivers, where, day)
    rules = list(dict.fromkeys(check["name"] for check in checks))
    by_rule: dict[str, Waiver] = {}
    for waiver in waivers:
        if waiver.rule not in rules:
            hint = nearest(waiver.rule, rules)
            raise UserError(f"{where}: found a waiver of the unknown rule '{waiver.rule}'{hint}; expected one of: "
                            f"{', '.join(rules)}; remove or rename it")
        if waiver.rule in by_rule:
            raise UserError(f"{where}: found two waivers of '{waiver.rule}'; expected one a rule; remove one")
        by_rule[waiver.rule] = waiver
    return [{**check, "waived": _covering(by_rule.get(check["name"]), check["verdict"], evidence)} for check in checks]


def _covering(waiver: Waiver | None, verdict: str, evidence: str) -> dict[str, Any] | None:
    covers = waiver is not None and verdict != "PASS" and waiver.evidence in (None, evidence)
    return to_dict(waiver) if covers and (waiver.excuses == "FAIL" or verdict == "INCONCLUSIVE") else None


def line(waiver: Mapping[str, Any]) -> str:
    """`'color' waived by Ada until 2026-12-01: reshot pictures come on Monday`."""
    return f"'{waiver['rule']}' waived by {waiver['by']} until {waiver['until']}: {waiver['reason']}"


def unmet(verdict: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The checks that keep a verdict from passing: neither passed nor waived."""
    return [check for check in verdict["rules"] if not (check["passed"] or check.get("waived"))]


def used(verdict: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The waivers that a verdict rests on, one a rule."""
    covering = [check["waived"] for check in (verdict or {}).get("rules", []) if check.get("waived")]
    return list({waiver["rule"]: waiver for waiver in covering}.values())


def _days_as_text(entry: Any) -> Any:
    """YAML reads an unquoted YYYY-MM-DD as a date."""
    if not isinstance(entry, Mapping):
        return entry
    return {key: value.isoformat() if isinstance(value, date) else value for key, value in entry.items()}
