import json
from datetime import date, timedelta

import pytest

from vlmpipe.errors import GateFailed, UserError
from vlmpipe.evaluate.gate import GateConfig, Rule, gate
from vlmpipe.evaluate.verdict import check as check_seal
from vlmpipe.evaluate.waivers import (
    MAX_DAYS,
    Waiver,
    add_waivers,
    apply_waivers,
    line,
    read_waivers,
    refuse_expired,
    today,
    used,
    waivers_path,
)

DAY = date(2026, 11, 21)
CHECKS = [
    {"name": "accuracy", "verdict": "FAIL"}, {"name": "color", "verdict": "INCONCLUSIVE"},
    {"name": "color", "verdict": "FAIL"}, {"name": "speed", "verdict": "PASS"},
]


def waiver(rule="color", until="2026-12-01", **facts) -> Waiver:
    return Waiver(rule, "Ada", "reshot pictures come on Monday", until, **facts)


def waived(*waivers, evidence="e") -> list[bool]:
    return [check["waived"] is not None for check in apply_waivers(CHECKS, waivers, evidence, day=DAY)]


def test_a_waiver_covers_its_rule_and_leaves_verdicts_as_they_are():
    checks = apply_waivers(CHECKS, [waiver()], "e", day=DAY)
    assert [check["verdict"] for check in checks] == [check["verdict"] for check in CHECKS]
    assert [check["waived"] and check["waived"]["by"] for check in checks] == [None, "Ada", "Ada", None]
    assert used({"rules": checks}) == [checks[1]["waived"]] and used(None) == []
    assert line(checks[1]["waived"]) == "'color' waived by Ada until 2026-12-01: reshot pictures come on Monday"
    assert waived() == [False] * 4
    assert waived(waiver("speed")) == [False] * 4  # nothing there to waive


def test_a_waiver_of_the_undecided_excuses_no_failure_and_one_of_other_evidence_nothing():
    assert waived(waiver(excuses="INCONCLUSIVE")) == [False, True, False, False]
    assert waived(waiver(evidence="e")) == [False, True, True, False]
    assert waived(waiver(evidence="of last week")) == [False] * 4


def test_the_last_day_counts_and_the_day_after_is_an_error():
    waived(waiver(until=DAY.isoformat()))
    with pytest.raises(UserError, match=r"the waiver of 'color' by Ada expired on 2026-11-20.*remove or renew it"):
        waived(waiver(until="2026-11-20"))
    with pytest.raises(UserError, match="at most 90 days"):
        waived(waiver(until=(DAY + timedelta(days=MAX_DAYS + 1)).isoformat()))
    with pytest.raises(UserError, match="expired on 2026-11-20"):
        refuse_expired([{"rule": "color", "by": "Ada", "until": "2026-11-20"}], "verdict.json", DAY)


def test_unknown_and_doubled_rules_are_errors():
    with pytest.raises(UserError, match=r"unknown rule 'colour'; did you mean 'color'\?.*accuracy, color, speed"):
        waived(waiver("colour"))
    with pytest.raises(UserError, match="two waivers of 'color'"):
        waived(waiver(), waiver())


@pytest.mark.parametrize("facts, said", [
    ({"by": " "}, "empty 'by'"), ({"reason": ""}, "empty 'reason'"), ({"until": "soon"}, "found until 'soon'"),
])
def test_a_waiver_says_who_why_and_until_when(facts, said):
    with pytest.raises(UserError, match=said):
        Waiver(**{"rule": "color", "by": "Ada", "reason": "x", "until": "2026-12-01"} | facts)


def test_files_keep_what_is_of_other_rules(tmp_path):
    path = waivers_path(tmp_path, "finetune")
    assert read_waivers(path) == read_waivers(None) == []
    add_waivers(path, [waiver(), waiver("accuracy")])
    newer = Waiver("color", "Grace", "asked", "2026-12-02", excuses="INCONCLUSIVE", evidence="e")
    add_waivers(path, [newer])
    assert read_waivers(path) == [waiver("accuracy"), newer]


def test_a_file_is_read_as_people_write_it_and_refused_where_it_says_something_else(tmp_path):
    path = tmp_path / "w.yaml"
    path.write_text("- {rule: color, by: Ada, reason: because, until: 2026-12-01}\n")  # yaml takes this for a date
    assert read_waivers(path) == [Waiver("color", "Ada", "because", "2026-12-01")]
    for text, said in (("rule: color", "expected a list"), ("- {rule: [", "is not yaml"),
                       ("- {rule: color, by: Ada, until: 2026-12-01}", r"w.yaml\[0\]: missing key 'reason'"),
                       ("- {rule: color, bye: Ada}", "unknown key 'bye'; did you mean 'by'")):
        path.write_text(text)
        with pytest.raises(UserError, match=said):
            read_waivers(path)


def test_a_gate_rests_on_its_waivers_and_says_so(tmp_path):
    metrics, out, path = tmp_path / "m.json", tmp_path / "verdict.json", tmp_path / "w.yaml"
    config = GateConfig({"floor": Rule("m", min=0.5), "ceiling": Rule("m", max=1)})

    def run(value: float) -> dict:
        metrics.write_text(json.dumps({"metrics": {"m": value}, "n": {}}))
        gate("g", [metrics], None, out, config, waivers=path)
        return json.loads(out.read_text())

    with pytest.raises(GateFailed, match=r"m 0.1 is below the floor"):
        run(0.1)
    seen = json.loads(out.read_text())["evidence"]
    add_waivers(path, [Waiver("floor", "Ada", "because", today().isoformat(), evidence=seen)])
    verdict = run(0.1)
    check_seal(verdict)
    assert (verdict["verdict"], verdict["passed"]) == ("PASS", True)
    facts = [(check["name"], check["verdict"], check["passed"], bool(check["waived"])) for check in verdict["rules"]]
    assert facts == [("floor", "FAIL", False, True), ("ceiling", "PASS", True, False)]
    with pytest.raises(GateFailed, match=r"m 0.2 is below the floor"):
        run(0.2)  # not what the waiver is of
    verdict = json.loads(out.read_text())
    assert used(verdict) == [] and [waiver["by"] for waiver in verdict["waivers"]] == ["Ada"]
    path.unlink()
    add_waivers(path, [Waiver("flor", "Ada", "because", today().isoformat())])
    with pytest.raises(UserError, match=r"w.yaml: found a waiver of the unknown rule 'flor'; did you mean 'floor'"):
        run(0.1)
