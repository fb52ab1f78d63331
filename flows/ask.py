"""A person's word where a gate can't decide: the run pauses, Prefect's UI shows the rules and a form, and a yes becomes
a waiver that the gate reads when it runs again.

A pause blocks: the process waits, keeps the workspace's run lock and, where `vlmpipe serve` started it, the one place
for runs. Suspending instead would end it, but works for deployments alone, and a later run may not find what this
one left.
"""

from collections.abc import Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from prefect import get_run_logger, pause_flow_run, runtime
from prefect.exceptions import FlowPauseTimeout
from prefect.input import RunInput
from prefect.utilities.urls import url_for
from pydantic import Field, ValidationError

from flows.artifacts import cell, interval, part
from vlmpipe.errors import UserError
from vlmpipe.evaluate.gate import explain
from vlmpipe.evaluate.waivers import MAX_DAYS, Waiver, add_waivers, line, refuse_expired, today
from vlmpipe.shards import read_json

UNDECIDED = "INCONCLUSIVE"
POLL_S = 5
DAYS = 7  # what the form proposes


class Decision(RunInput):
    """The form in Prefect's UI."""

    go_on: bool = Field(default=False, title="Go on", description="Waive these rules for this evidence and go on")
    by: str = Field(default="", title="By", description="Your name; it stands wherever the verdict is shown")
    reason: str = Field(default="", title="Reason", description="Why the run may go on without an answer")
    until: date = Field(default_factory=lambda: today() + timedelta(days=DAYS), title="Until",
                        description=f"The waiver's last day, at most {MAX_DAYS} days from today")


def ask(verdict_path: Path, waivers_path: Path, hours: float) -> bool:
    """Pause the flow run until somebody has answered; a yes is written to `waivers_path`.

    An answer that makes no waiver (no name, no reason, a day that has passed) is asked for again. No answer within
    `hours` is a no.
    """
    verdict = read_json(verdict_path)
    logger, remark = get_run_logger(), None
    logger.warning("gate %s can't decide; a person can, within %g h: %s", verdict["gate"], hours,
                   url_for("flow-run", obj_id=runtime.flow_run.id))
    while True:
        try:
            decision = _answer(question(verdict, waivers_path, hours, remark), hours)
            if decision is None or not decision.go_on:
                logger.warning("gate %s: %s", verdict["gate"], "no answer in time" if decision is None else "a no")
                return False
            waivers = waivers_of(verdict, decision)
        except (UserError, ValidationError) as error:  # what the form lets through is for us to refuse
            remark = str(error)
            logger.warning("gate %s: %s; asking again", verdict["gate"], remark)
            continue
        add_waivers(waivers_path, waivers)
        for waiver in waivers:
            logger.warning("gate %s: %s", verdict["gate"], line(vars(waiver)))
        return True


def waivers_of(verdict: Mapping[str, Any], decision: Decision) -> list[Waiver]:
    """A waiver for each rule that couldn't be decided: of INCONCLUSIVE alone, and bound to what the verdict saw.

    Raises:
        UserError: the answer doesn't say who, why or until when.
    """
    rules = dict.fromkeys(check["name"] for check in _undecided(verdict))
    waivers = [Waiver(rule, decision.by.strip(), decision.reason.strip(), decision.until.isoformat(), UNDECIDED,
                      verdict["evidence"]) for rule in rules]
    refuse_expired(waivers, "answer")
    return waivers


def question(verdict: Mapping[str, Any], waivers_path: Path, hours: float, remark: str | None = None) -> str:
    """Markdown: what couldn't be decided, with the numbers, and what an answer does."""
    lines = [f"**The last answer makes no waiver: {cell(remark)}**", ""] if remark else []
    lines += [f"## Gate {cell(verdict['gate'])}: {UNDECIDED}", "",
              f"Champion: {cell(verdict['champion']) or 'none yet'}. No rule failed; these could not be decided:", "",
              "| rule | metric | slice | value | champion | difference | interval | n | would settle it |",
              "|---|---|---|---:|---:|---:|---|---:|---:|"]
    for check in _undecided(verdict):
        facts = [check["name"], check["metric"], part(check), check["value"], check["champion"], check["difference"],
                 interval(check), check["n"], check["samples_needed"]]
        lines.append("| " + " | ".join(map(cell, facts)) + " |")
    lines += ["", *(f"- {cell(explain(check))}" for check in _undecided(verdict)), "",
              f"A yes waives these rules for this evidence until the day below, by your name, in "
              f"`{waivers_path}`; the gate runs again and the run goes on. A no, or {hours:g} h without an "
              f"answer, ends the run."]
    return "\n".join(lines)


def _undecided(verdict: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [check for check in verdict["rules"] if check["verdict"] == UNDECIDED and not check.get("waived")]


def _answer(text: str, hours: float) -> Decision | None:
    """What somebody answered in the UI; None if nobody did in time."""
    form = Decision.with_initial_data(description=text)
    try:
        return pause_flow_run(wait_for_input=form, timeout=round(hours * 3600), poll_interval=POLL_S)
    except FlowPauseTimeout:
        return None
