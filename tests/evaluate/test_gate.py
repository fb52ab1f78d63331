"""The gate: every kind of rule passes and fails by its own number, and the verdict says which."""

import json
import math
from pathlib import Path

import pytest

from vlmpipe.compose import compose
from vlmpipe.config import parse
from vlmpipe.errors import GateFailed, UserError
from vlmpipe.evaluate.gate import GateConfig, gate, refuse_against_champion
from vlmpipe.shards import sha256_file, write_json

ROOT = Path(__file__).parents[2]

def run(tmp_path, rules, metrics, n=None, details=None, champion=None, name="finetune"):
    """Judge, and return (verdict, message or None)."""
    source = tmp_path / "metrics.json"
    source.write_text(json.dumps({"metrics": metrics, "n": n or {}, "details": details or {}}))
    if champion is not None:
        write_json(tmp_path / "champion.json", {"version": "v3", "metrics": champion})
    config = parse(GateConfig, {"rules": {f"rule{i}": rule for i, rule in enumerate(rules)}}, "gates.finetune")
    out, message = tmp_path / "gates" / "verdict.json", None
    try:
        gate(name, [source], tmp_path / "champion.json", out, config)
    except GateFailed as error:
        message = str(error)
    return json.loads(out.read_text()), message


@pytest.mark.parametrize(
    "rule, value, passed",
    [
        ({"min": 0.85}, 0.85, True),
        ({"min": 0.85}, 0.8499, False),
        ({"max": 0.5}, 0.5, True),
        ({"max": 0.5}, 0.51, False),
        ({"min": 0.2, "max": 0.4}, 0.3, True),
        ({"min": 0.2, "max": 0.4}, 0.5, False),
    ],
)
def test_each_rule_on_either_side_of_its_limit(tmp_path, rule, value, passed):
    verdict, message = run(tmp_path, [rule | {"metric": "m"}], {"m": value}, champion={"m": 0.75})
    assert verdict["passed"] is passed and verdict["verdict"] == ("PASS" if passed else "FAIL")
    assert (message is None) is passed
    assert any(not check["passed"] for check in verdict["rules"]) is not passed


def test_a_failure_names_gate_metric_both_numbers_and_detail(tmp_path):
    rules = [{"metric": "bias.impact_ratio", "min": 0.8}, {"metric": "vqa.wrong", "max": 0.5}]
    verdict, message = run(
        tmp_path, rules, {"bias.impact_ratio": 0.6125, "vqa.wrong": 0.9}, n={"vqa.wrong": 300},
        details={"bias.impact_ratio": {"group": "dusk", "table": [1, 2]}}, champion={"vqa.wrong": 0.95}, name="data",
    )
    assert message == (
        "data: bias.impact_ratio 0.6125 is below the floor 0.8 (group dusk); "
        "vqa.wrong 0.9 is above the ceiling 0.5 (n 300)"
    )
    assert verdict["champion"] == "v3" and verdict["rules"][1]["limit"] == 0.5


@pytest.mark.parametrize(
    "metrics, n, message",
    [
        ({"vqa.acuracy": 0.9}, {}, "vqa.accuracy was not measured; did you mean 'vqa.acuracy'?"),
        ({"vqa.accuracy": math.nan}, {"vqa.accuracy": 500}, "vqa.accuracy is nan, not a number"),
        ({"vqa.accuracy": math.inf}, {"vqa.accuracy": 500}, "vqa.accuracy is inf, not a number"),
        ({"vqa.accuracy": None}, {"vqa.accuracy": 500}, "vqa.accuracy is None, not a number"),
        ({"vqa.accuracy": True}, {"vqa.accuracy": 500}, "vqa.accuracy is True, not a number"),
        ({"vqa.accuracy": 0.9}, {"vqa.accuracy": 99}, "rests on 99 samples, fewer than 100"),
        ({"vqa.accuracy": 0.9}, {}, "an unknown number of samples, fewer than 100"),
    ],
)
def test_missing_nan_and_few_samples_fail(tmp_path, metrics, n, message):
    verdict, said = run(tmp_path, [{"metric": "vqa.accuracy", "min": 0.5, "min_n": 100}], metrics, n)
    assert message in said
    assert not verdict["passed"]


def test_no_champion_passes_and_says_so(tmp_path):
    rules = [{"metric": "m", "margin": 0.1}, {"metric": "m", "gain": 0}, {"metric": "cost.seconds_ratio", "max": 1.5}]
    verdict, message = run(tmp_path, rules, {"m": 0.1})
    assert message is None
    assert verdict["champion"] is None and verdict["verdict"] == "PASS"
    assert {check["note"] for check in verdict["rules"]} == {"no champion yet"}
    verdict, message = run(tmp_path, rules, {"m": math.nan})
    assert "not a number" in message


@pytest.mark.parametrize("rule", [
    {"metric": "m", "margin": 0.1}, {"metric": "m", "gain": 0}, {"metric": "cost.memory_ratio", "max": 1.5},
])
def test_a_gate_that_is_handed_no_champion_takes_no_rule_against_it(tmp_path, rule):
    write_json(tmp_path / "m.json", {"metrics": {"m": 1.0}})
    config = parse(GateConfig, {"rules": {"floor": {"metric": "m", "min": 0}, "mine": rule}}, "gates.data")
    with pytest.raises(UserError, match=r"gate data: found rule 'mine'.*put the rule into gates.finetune"):
        gate("data", [tmp_path / "m.json"], None, tmp_path / "v.json", config)
    assert not (tmp_path / "v.json").exists()
    gate("data", [tmp_path / "m.json"], tmp_path / "champion.json", tmp_path / "v.json", config)


def test_the_verdict_is_the_same_bytes_and_changes_with_rules_and_evidence(tmp_path):
    out = tmp_path / "gates" / "verdict.json"
    rules = [{"metric": "m", "min": 0.5}]
    verdict, _ = run(tmp_path, rules, {"m": 0.9, "k": 2})
    before = out.read_bytes()
    assert verdict["metrics"] == {"m": 0.9, "k": 2}
    assert verdict["metric_files"][0]["sha256"] == sha256_file(tmp_path / "metrics.json")
    run(tmp_path, rules, {"k": 2, "m": 0.9})
    run(tmp_path, rules, {"m": 0.9, "k": 2})
    assert out.read_bytes() == before
    other_rules, _ = run(tmp_path, [{"metric": "m", "min": 0.6}], {"m": 0.9, "k": 2})
    assert other_rules["rules_sha256"] != verdict["rules_sha256"]


def test_files_merge_and_must_agree(tmp_path):
    config = parse(GateConfig, {"rules": {"a": {"metric": "a", "min": 1}, "b": {"metric": "b", "max": 1}}}, "gates")
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    write_json(one, {"metrics": {"a": 1.0}})
    write_json(two, {"metrics": {"b": 0.5}, "n": {"b": 3}})
    gate("g", [one, two], None, tmp_path / "v.json", config)
    assert json.loads((tmp_path / "v.json").read_text())["passed"]
    write_json(two, {"metrics": {"a": 0.5, "b": 0.5}})
    with pytest.raises(UserError, match=r"'a' 0\.5, elsewhere 1\.0"):
        gate("g", [one, two], None, tmp_path / "v.json", config)


@pytest.mark.parametrize("content", ["{}", "[]", '{"metrics": {}}', '{"metrics": 3}'])
def test_empty_evidence_is_refused(tmp_path, content):
    (tmp_path / "m.json").write_text(content)
    config = parse(GateConfig, {"rules": {"a": {"metric": "a", "min": 1}}}, "gates")
    with pytest.raises(UserError, match="metrics"):
        gate("g", [tmp_path / "m.json"], None, tmp_path / "v.json", config)
    assert not (tmp_path / "v.json").exists()


@pytest.mark.parametrize(
    "rules, message",
    [
        ({}, "found none"),
        ({"a": None}, "found none"),
        ({"a": {"metric": "m"}}, "found no limit"),
        ({"a": {"metric": "m", "min": 2, "max": 1}}, "min 2.0 over max 1.0"),
        ({"a": {"metric": "m", "margin": 0}}, "a margin over 0"),
        ({"a": {"metric": "m", "gain": -0.1}}, "a gain of at least 0"),
        ({"a": {"metric": "m", "margin": 0.1, "rare": "skip"}}, "rare: skip without slices"),
        ({"a": {"metric": "m", "min": float("nan")}}, "expected a number"),
        ({"a": {"metric": "m", "minimum": 1}}, "did you mean 'min'"),
    ],
)
def test_useless_rules_are_refused(rules, message):
    with pytest.raises(UserError, match=message):
        parse(GateConfig, {"rules": rules}, "gates.data")


@pytest.mark.parametrize("choice", sorted(path.stem for path in (ROOT / "configs/gates").glob("*.yaml")))
def test_shipped_gates_parse_and_guard_promotion(choice):
    gates = compose("scenes", [f"gates={choice}"], ROOT / "configs")["gates"]
    parsed = {name: parse(GateConfig, given, f"gates.{name}") for name, given in gates.items()}
    assert set(parsed) == {"data", "pretrain", "finetune"}
    for name in ("data", "pretrain"):  # which are handed no champion
        refuse_against_champion(name, parsed[name])
    rules = [rule for rule in parsed["finetune"].rules.values() if rule]
    # Against the champion, and against the same model with wrong pictures, in what the model is asked.
    assert any(rule.margin is not None for rule in rules)
    named = parsed["finetune"].rules
    if named.get("contamination"):  # of the task that is judged
        assert named["contamination"].metric == f"contamination.{named['champion'].metric.partition('.')[0]}"
    wrong = [rule for rule in rules if rule.metric.endswith("_wrong_image") and rule.max is not None]
    gains = [rule for rule in rules if rule.metric.endswith("image_gain") and (rule.min or 0) > 1]
    assert wrong or gains
    if any(rule.metric.startswith("vqa.") for rule in rules):
        assert {"vqa.accuracy", "vqa.accuracy_wrong_image"} <= {rule.metric for rule in rules}
    assert any(rule and rule.metric == "evaluation.overlap" and rule.max == 0 for rule in parsed["data"].rules.values())
