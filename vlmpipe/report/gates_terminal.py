"""A verdict on the terminal: its rules, the intervals drawn with characters, and the samples that got worse."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlmpipe.evaluate import explain
from vlmpipe.evaluate.explain import Answer, Finding
from vlmpipe.evaluate.judge import PASS
from vlmpipe.report.gates import STATES, counted, heading, scale_label, seal, truth, value_of, waived

COLOURS = {"good": "green", "bad": "red", "unsure": "yellow"}
DRAWN = 41  # characters of an interval


def show(verdict: Mapping[str, Any], evaluation: Path, samples: int, console: Console | None = None) -> None:
    """Print it; questions and answers are escaped."""
    console = console or Console()
    through = " (let through)" if verdict["passed"] and verdict["verdict"] != PASS else ""
    count, reigns = len(waived(verdict)), verdict["champion"] or "none yet"
    through += f" ({count} waived)" if count else ""
    console.print(f"{escape(verdict['gate'])} gate: {_word(verdict)}{through}, champion {escape(reigns)}")
    console.print(_rules(verdict["rules"]))
    for check in verdict["rules"]:
        if asides := _asides(check):
            console.print(f"[bold]{escape(explain.title(check))}[/]: {escape('; '.join(asides))}")
    for scale, checks in explain.scales(verdict["rules"]).items():
        console.print(_intervals(scale, checks))
    for finding in explain.findings(verdict, evaluation, samples):
        console.print(_samples(finding) if finding.samples else escape(f"{heading(finding)}: {counted(finding)}"))
    state, sealed = seal(verdict)
    console.print(f"[{COLOURS[state]}]{escape(sealed)}[/]")


def _word(check: Mapping[str, Any]) -> str:
    waived = " (waived)" if check.get("waived") else ""
    return f"[{COLOURS[STATES[check['verdict']]]}]{check['verdict']}{waived}[/]"


def _rules(checks: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("rule", "asks for", "value", "champion", "samples", "needed", "verdict", title="rules")
    for check in checks:
        cells = (check.get("value"), check.get("champion"), check.get("n"), check.get("samples_needed"))
        table.add_row(
            escape(f"{explain.title(check)}\n{check['metric']}"), explain.asked(check),
            *("–" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells),
            _word(check),
        )
    return table


def _asides(check: Mapping[str, Any]) -> list[str]:
    """Its waiver, and what there was to note."""
    waiver = check.get("waived")
    told = [f"waived by {waiver['by']} until {waiver['until']}: {waiver['reason']}"] if waiver else []
    return told + [check[key] for key in ("note", "detail") if check.get(key)]


def _intervals(scale: str, checks: Sequence[Mapping[str, Any]]) -> Table:
    ends = [0.0, *(end for check in checks for end in (*check["interval"], check["difference"]))]
    ends += [explain.bound(check) or 0.0 for check in checks]
    table = Table("rule", "difference", f"{min(ends):+.3g} to {max(ends):+.3g}", title=scale_label(scale))
    table.caption = "● difference  ├─┤ interval  │ zero  ┊ the interval must lie right of this"
    for check in checks:
        low, high = check["interval"]
        row = draw(check["difference"], low, high, explain.bound(check), min(ends), max(ends))
        said = f"{check['difference']:+.3g}\n{low:+.3g} to {high:+.3g}"
        table.add_row(escape(explain.title(check)), said, f"[{COLOURS[STATES[check['verdict']]]}]{row}[/]")
    return table


def draw(
    estimate: float, low: float, high: float, bound: float | None, left: float, right: float, width: int = DRAWN
) -> str:
    """An interval in `width` characters for a scale from `left` to `right`: `  ┊ ├─│──●─┤ `."""
    span = (right - left) or 1.0

    def place(number: float) -> int:
        return round((number - left) / span * (width - 1))

    row = [" "] * width
    row[place(low) : place(high) + 1] = "─" * (place(high) - place(low) + 1)
    row[place(low)], row[place(high)] = "├", "┤"
    row[place(0.0)] = "│"
    if bound is not None:
        row[place(bound)] = "┊"
    row[place(estimate)] = "●"
    return "".join(row)


def _samples(finding: Finding) -> Table:
    measured = finding.metric.partition(".")[2]
    models = ("champion", "challenger") if finding.compared else ("challenger",)
    table = Table("sample", "question", "truth", *models, title=escape(f"{heading(finding)}: {counted(finding)}"))
    for shown in finding.samples:
        said = (getattr(shown, model) for model in models)
        table.add_row(
            escape("\n".join((shown.sample_id, *shown.images))), escape(shown.question or "a caption"),
            escape(truth(shown.truth)), *(_said(answer, measured) for answer in said),
        )
    return table


def _said(answer: Answer, measured: str) -> str:
    value = f"{measured} {value_of(answer)}" if answer.value is not None else ""
    return escape("\n".join(part for part in (answer.text, value) if part)) or "–"
