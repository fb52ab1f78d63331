"""Verdicts for people: the rules with what they found, the differences as pictures, and the samples that got worse."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmpipe.config import nearest
from vlmpipe.errors import UserError
from vlmpipe.evaluate import explain
from vlmpipe.evaluate.explain import Answer, Finding, Shown
from vlmpipe.evaluate.judge import FAIL, INCONCLUSIVE, PASS
from vlmpipe.evaluate.verdict import check
from vlmpipe.report import charts
from vlmpipe.report.pictures import TaskPictures
from vlmpipe.report.templating import environment
from vlmpipe.shards import read_json, write_bytes_atomic

STATES = {PASS: "good", FAIL: "bad", INCONCLUSIVE: "unsure"}
THUMBNAIL = 160
ANSWERS = 4  # of those that people gave, how many are told


def block(verdict: Mapping[str, Any], evaluation: Path, tested: TaskPictures, samples: int) -> dict[str, Any]:
    """What the page shows of a verdict: plain values for `sections/verdict.html.j2`.

    Args:
        evaluation: the folder of the store that the gate read; samples: at most so many of each metric and slice.
    """
    found = explain.findings(verdict, evaluation, samples)
    wanted = {name for finding in found for shown in finding.samples for name in shown.images}
    pictures = tested.thumbnails(wanted, THUMBNAIL)
    compared = explain.scales(verdict["rules"])
    rules = [{**rule, "title": explain.title(rule), "asked": explain.asked(rule), "state": STATES[rule["verdict"]]}
             for rule in verdict["rules"]]
    return {
        **verdict,
        "state": STATES[verdict["verdict"]],
        "rules": rules,
        "waived": waived({"rules": rules}),
        "seal": seal(verdict),
        "compared": bool(compared),
        "charts": [charts.forest(list(map(_difference, checks)), scale_label(scale))
                   for scale, checks in compared.items()],
        "findings": [_found(finding, pictures) for finding in found],
    }


def read_verdict(directory: Path, gates: Sequence[str], name: str | None) -> dict[str, Any]:
    """The verdict of the gate `name`, or of the last of `gates` that has one.

    Raises:
        UserError: there is none.
    """
    there = [gate for gate in gates if (directory / gate / "verdict.json").exists()]
    if name is None and there:
        name = there[-1]
    if name not in there:
        wanted = "verdict" if name is None else f"verdict of a gate '{name}'{nearest(name, there)}"
        raise UserError(f"{directory}: found no {wanted}; expected one of: {', '.join(there) or 'nothing yet'}; "
                        f"run the pipeline up to its gate")
    return read_json(directory / name / "verdict.json")


def write_page(verdict: Mapping[str, Any], evaluation: Path, tested: TaskPictures, samples: int, out: Path) -> None:
    """Write `out`, one file that opens from disk."""
    shown = block(verdict, evaluation, tested, samples)
    page = environment().get_template("verdict.html.j2").render(verdict=shown)
    write_bytes_atomic(out, page.encode())


def tile(name: str, verdict: Mapping[str, Any]) -> dict[str, str]:
    """The verdict in a word, and how many of its rules were waived."""
    count = len(waived(verdict))
    return {"name": f"{name} gate", "value": verdict["verdict"], "note": f"{count} waived" if count else "",
            "state": STATES[verdict["verdict"]]}


def waived(verdict: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The checks that did not pass and yet stop nothing."""
    return [rule for rule in verdict["rules"] if rule.get("waived")]


def seal(verdict: Mapping[str, Any]) -> tuple[str, str]:
    """Whether the verdict is what its gate wrote, and how that looks: a state and a line."""
    try:
        check(verdict)
    except UserError as error:
        return "bad", str(error)
    signer = f"signed by {verdict['public_key'][:16]}…" if "signature" in verdict else "not signed"
    return "good", f"digest {verdict['digest'][:16]}…, {signer}"


def scale_label(scale: str) -> str:
    measured = "rates" if scale == explain.RATES else scale
    return f"challenger − champion, {measured}: better to the right"


def heading(finding: Finding) -> str:
    """`vqa.accuracy, question_type = color`."""
    within = "" if finding.slice is None else f", {finding.slice[0]} = {finding.slice[1]}"
    return f"{finding.metric}{within}"


def counted(finding: Finding) -> str:
    """How many samples speak against the challenger, or why that can't be told."""
    if finding.note:
        return finding.note
    if not finding.compared:
        return f"no champion's scores to compare with: the lowest of {finding.worse:,} samples"
    total = finding.worse + finding.better + finding.same
    return f"{finding.worse:,} of {total:,} samples got worse, {finding.better:,} got better"


def truth(answers: Sequence[str]) -> str:
    """The true answers, the commonest first, with how often each was given."""
    given = Counter(answers).most_common(ANSWERS)
    several = len(given) > 1
    return ", ".join(f"{text} ×{count}" if several and count > 1 else text for text, count in given)


def value_of(answer: Answer) -> str:
    return "" if answer.value is None else f"{answer.value:.3g}"


def _difference(rule: Mapping[str, Any]) -> charts.Difference:
    return charts.Difference(
        explain.title(rule), rule["difference"], *rule["interval"], explain.bound(rule), STATES[rule["verdict"]]
    )


def _found(finding: Finding, pictures: Mapping[str, str]) -> dict[str, Any]:
    rules = [{"title": rule["name"], "verdict": rule["verdict"], "state": STATES[rule["verdict"]],
              "asked": explain.asked(rule), "waived": rule.get("waived")} for rule in finding.checks]
    measured = finding.metric.partition(".")[2]
    return {"heading": heading(finding), "counted": counted(finding), "rules": rules,
            "cards": [_card(shown, measured, pictures) for shown in finding.samples]}


def _card(shown: Shown, measured: str, pictures: Mapping[str, str]) -> dict[str, Any]:
    models: Sequence[tuple[str, Answer | None]] = (("champion", shown.champion), ("challenger", shown.challenger))
    return {
        "id": shown.sample_id, "question": shown.question,
        "truth": truth(shown.truth) if shown.truth != (shown.question,) else "",  # a phrase names its place
        "pictures": [pictures.get(name) for name in shown.images],
        "slices": ", ".join(f"{name} {value}" for name, value in sorted(shown.slices.items())),
        "said": [{"model": model, "text": answer.text, "value": value_of(answer), "measured": measured}
                 for model, answer in models if answer is not None],
    }
