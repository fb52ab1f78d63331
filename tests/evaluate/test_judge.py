"""The gate against a champion, on scores of single samples whose differences are known."""

import json

import numpy as np
import pytest

from vlmpipe.config import parse
from vlmpipe.errors import GateFailed, UserError
from vlmpipe.evaluate.gate import GateConfig, gate
from vlmpipe.evaluate.statistics import bootstrap_mean
from vlmpipe.evaluate.store import CHALLENGER, CHAMPION, Counts, tables, write_scores
from vlmpipe.shards import write_json

N, KINDS = 600, ("color", "shape", "size")
IDS = [f"{index:03}" for index in range(N)]
GOOD = np.arange(N) % 10 != 0  # 90% right


def scores(values) -> Counts:
    return Counts("ratio", {key: [float(value), 1.0] for key, value in zip(IDS, values)})


def judged(
    tmp_path, rules, challenger, champion=GOOD, each=2, metric="vqa.accuracy", reigning="v3", model=None, **config
):
    """(verdict, message or None) of a gate on pictures with `each` questions, kinds in blocks of equal size."""
    clusters = {key: str(index // each) for index, key in enumerate(IDS)}
    slices = {key: {"kind": KINDS[index * len(KINDS) // N]} for index, key in enumerate(IDS)}
    parts = [*tables(CHALLENGER, {metric: scores(challenger)}, clusters, slices)]
    if champion is not None:
        parts += tables(CHAMPION, {metric: scores(champion)}, clusters, slices)
    out = tmp_path / "evaluation"
    write_scores(out, parts)
    write_json(out / "evaluation.json", {"champion": None if champion is None else "v3", "models": {"challenger": "a"}})
    if reigning:
        known = {} if model is None else {"model": model}
        write_json(tmp_path / "champion.json", {"version": reigning, "metrics": {}} | known)
    value = float(np.mean(challenger))
    write_json(tmp_path / "metrics.json", {"metrics": {metric: value if np.isfinite(value) else 0.5}, "n": {metric: N}})
    rules = {name: {"metric": metric} | rule for name, rule in rules.items()}
    found = parse(GateConfig, {"rules": rules, "replicates": 1000} | config, "gates.finetune")
    message = None
    try:
        gate("finetune", [tmp_path / "metrics.json"], tmp_path / "champion.json", tmp_path / "verdict.json", found, out)
    except GateFailed as error:
        message = str(error)
    return json.loads((tmp_path / "verdict.json").read_text()), message


def lose(count, start=0, step=7) -> np.ndarray:
    """The champion's answers, `count` of the right ones wrong, spread evenly."""
    right = GOOD.copy()
    places = np.flatnonzero(right)[start::step][:count]
    assert len(places) == count
    right[places] = False
    return right


@pytest.mark.parametrize("rule, challenger, verdict", [
    ({"margin": 0.05}, GOOD, "PASS"),
    ({"margin": 0.05}, lose(6), "PASS"),                # 1 point down, surely less than 5
    ({"margin": 0.05}, lose(30), "INCONCLUSIVE"),       # 5 points down
    ({"margin": 0.05}, lose(72), "FAIL"),               # 12 points down
    ({"margin": 0.002}, lose(6) | (np.arange(N) % 100 == 0), "INCONCLUSIVE"),  # 6 lost, 6 won: too few to tell
    ({"gain": 0}, GOOD | (np.arange(N) % 20 == 0), "PASS"),
    ({"gain": 0}, GOOD, "INCONCLUSIVE"),
    ({"gain": 0}, lose(30), "FAIL"),
    ({"gain": 0.1}, GOOD | (np.arange(N) % 20 == 0), "FAIL"),
])
def test_verdicts_by_the_size_of_the_difference(tmp_path, rule, challenger, verdict):
    found, message = judged(tmp_path, {"champion": rule}, challenger)
    [check] = found["rules"]
    assert (found["verdict"], check["verdict"]) == (verdict, verdict)
    assert found["passed"] == (verdict == "PASS") == (message is None)
    assert check["difference"] == pytest.approx(challenger.mean() - GOOD.mean())
    assert check["interval"][0] <= check["difference"] <= check["interval"][1]
    assert (check["n"], check["clusters"], check["champion"]) == (N, N // 2, pytest.approx(0.9))
    if verdict == "INCONCLUSIVE":
        assert check["samples_needed"] is None or check["samples_needed"] > 0
    if rule == {"margin": 0.002}:
        assert check["samples_needed"] > N and "would settle it" in message and check["power"] < 0.8


def test_numbers_are_those_of_the_paired_bootstrap(tmp_path):
    challenger = lose(20)
    found, _ = judged(tmp_path, {"champion": {"margin": 0.05}}, challenger, seed=3)
    [check] = found["rules"]
    clusters = np.array([str(index // 2) for index in range(N)])
    expected = bootstrap_mean(challenger.astype(float) - GOOD, clusters, 3, 1000, reach=1.0)
    assert check["interval"] == list(expected.interval(0.1))
    assert check["p"] == expected.p_at_most(-0.05) and check["p_adjusted"] == expected.p_at_least(-0.05)
    assert (found["seed"], found["replicates"], found["alpha"]) == (3, 1000, 0.05)
    assert check["limit"] == pytest.approx(0.85) and check["margin"] == 0.05
    again, _ = judged(tmp_path, {"champion": {"margin": 0.05}}, challenger, seed=3)
    assert again == found


def test_one_destroyed_slice_is_named_and_alarms_are_adjusted_over_the_family(tmp_path):
    challenger = GOOD.copy()
    challenger[400:] &= np.arange(200) % 2 == 0  # size: half of it lost
    rules = {"kinds": {"margin": 0.1, "slices": "kind", "min_n": 200}, "whole": {"margin": 0.3}}
    found, message = judged(tmp_path, rules, challenger)
    by_slice = {check["slice"] and check["slice"]["value"]: check for check in found["rules"]}
    assert {key: check["verdict"] for key, check in by_slice.items()} == {
        "color": "PASS", "shape": "PASS", "size": "FAIL", None: "PASS"
    }
    assert by_slice["size"]["n"] == 200 and by_slice["size"]["value"] == pytest.approx(challenger[400:].mean())
    assert "(kind size)" in message and "shown to be worse than a drop of 0.1" in message
    alone, _ = judged(tmp_path, {"kinds": {"margin": 0.1, "slices": "kind"}}, challenger)
    p = {check["slice"]["value"]: check["p_adjusted"] for check in alone["rules"]}
    # Four tests against three: the smallest p is multiplied by as many.
    assert by_slice["size"]["p_adjusted"] == pytest.approx(p["size"] * 4 / 3)


@pytest.mark.parametrize("rule, verdicts, message", [
    ({"min": 0.85, "slices": "kind"}, ["PASS"] * 3, None),
    ({"min": 0.95, "slices": "kind"}, ["FAIL"] * 3, "(kind color) 0.9 is below the floor 0.95 (n 200)"),
    ({"margin": 0.2, "slices": "kind", "min_n": 201}, ["FAIL"] * 3, "rests on 200 samples, fewer than 201"),
    ({"margin": 0.2, "slices": "kind", "min_n": 201, "rare": "skip"}, ["FAIL"], "no slice by 'kind'"),
    ({"margin": 0.2, "slices": "mood"}, ["FAIL"], "no slice by 'mood'"),
])
def test_slices_have_floors_and_minimum_counts(tmp_path, rule, verdicts, message):
    found, said = judged(tmp_path, {"kinds": rule}, GOOD)
    assert [check["verdict"] for check in found["rules"]] == verdicts
    assert (said is None) if message is None else message in said


def test_less_is_better_by_the_metrics_name(tmp_path):
    found, _ = judged(tmp_path, {"m": {"margin": 0.05}}, lose(72), metric="vqa.accuracy_wrong_image")
    [check] = found["rules"]
    assert check["verdict"] == "PASS" and check["difference"] == pytest.approx(0.12)
    assert check["limit"] == pytest.approx(0.95)
    found, _ = judged(tmp_path, {"m": {"margin": 0.05}}, GOOD, lose(72), metric="vqa.accuracy_wrong_image")
    assert found["verdict"] == "FAIL" and found["rules"][0]["difference"] == pytest.approx(-0.12)


def test_mcnemar_stands_beside_right_or_wrong_on_single_samples_only(tmp_path):
    challenger = lose(10)
    challenger[[0, 10]] = True
    found, _ = judged(tmp_path, {"m": {"margin": 0.05}}, challenger, each=1)
    assert found["rules"][0]["mcnemar"] == {"lost": 10, "won": 2, "p": pytest.approx(0.03857421875)}
    assert judged(tmp_path, {"m": {"margin": 0.05}}, challenger)[0]["rules"][0]["mcnemar"] is None
    halves, _ = judged(tmp_path, {"m": {"margin": 0.05}}, challenger * 0.3, GOOD * 0.3, each=1)
    assert halves["rules"][0]["mcnemar"] is None


def test_inconclusive_may_pass_where_the_gate_says_so(tmp_path):
    found, message = judged(tmp_path, {"m": {"margin": 0.05}}, lose(30), inconclusive="pass")
    assert (found["verdict"], found["passed"], message) == ("INCONCLUSIVE", True, None)


def test_no_champion_yet_passes_and_nan_still_fails(tmp_path):
    rules = {"whole": {"margin": 0.01}, "kinds": {"margin": 0.01, "slices": "kind", "min_n": 200}}
    found, _ = judged(tmp_path, rules, lose(72), champion=None, reigning=None)
    assert found["verdict"] == "PASS" and [check["note"] for check in found["rules"]] == ["no champion yet"] * 4
    broken = GOOD.astype(float)
    broken[7] = np.nan
    found, message = judged(tmp_path, rules, broken, champion=None, reigning=None)
    assert found["verdict"] == "FAIL" and "NaN" in message


AGAINST = {
    "whole": {"margin": 0.01}, "better": {"gain": 0}, "kinds": {"margin": 0.01, "slices": "kind", "min_n": 200},
    "slower": {"metric": "cost.seconds_ratio", "max": 1.5}, "floor": {"min": 0.5},
}


@pytest.mark.parametrize("scored, reigning", [(None, "v3"), (GOOD, "v4"), (GOOD, "v3")])
def test_a_model_that_was_promoted_on_these_scores_passes_against_itself(tmp_path, scored, reigning):
    found, message = judged(tmp_path, AGAINST, lose(72), scored, reigning=reigning, model="a")
    assert (found["verdict"], found["reigns"], message) == ("PASS", True, None)
    notes = [check["note"] for check in found["rules"]]
    assert notes == ["is the champion itself"] * 6 + [None] and found["champion"] == reigning
    broken = np.where(np.arange(N) == 7, np.nan, lose(72))
    _, message = judged(tmp_path, AGAINST, broken, scored, reigning=reigning, model="a")
    assert "NaN" in message


@pytest.mark.parametrize("scored, reigning", [(None, "v3"), (GOOD, "v4")])
def test_another_champion_than_the_scored_one_fails_and_says_what_to_run(tmp_path, scored, reigning):
    found, message = judged(tmp_path, AGAINST, lose(72), scored, reigning=reigning, model="b")
    verdicts = [check["verdict"] for check in found["rules"]]
    assert verdicts == ["FAIL"] * 6 + ["PASS"] and not found["reigns"]
    assert f"not with {reigning}; score both anew (`dvc repro -f -s evaluate_finetune`), then again" in message


def test_costs_of_another_champion_are_no_answer(tmp_path):
    judged(tmp_path, {"floor": {"min": 0.5}}, GOOD, reigning="v4")
    costs = tmp_path / "costs.json"
    write_json(costs, {"metrics": {"cost.seconds_ratio": 1.0}, "models": {"challenger": "a"}})
    config = parse(GateConfig, {"rules": {"one": {"metric": "cost.seconds_ratio", "max": 1.5}}}, "gates")
    with pytest.raises(GateFailed, match="was compared with v3, not with v4"):
        gate("g", [tmp_path / "metrics.json"], tmp_path / "champion.json", tmp_path / "v.json", config,
             tmp_path / "evaluation", costs)


def test_what_can_not_be_compared_fails(tmp_path):
    rules = {"champion": {"margin": 0.05}}
    for champion, reigning, said in (
        (None, "v3", "was compared with no champion, not with v3"), (GOOD, "v4", "was compared with v3, not with v4"),
        (np.where(GOOD, 1.0, np.nan), "v3", "NaN"),
    ):
        found, message = judged(tmp_path, rules, GOOD, champion, reigning=reigning)
        assert found["verdict"] == "FAIL" and said in message
    judged(tmp_path, rules, GOOD)
    write_json(tmp_path / "metrics.json", {"metrics": {"vqa.accuracy": 0.95}, "n": {"vqa.accuracy": N}})
    config = parse(GateConfig, {"rules": {"champion": {"metric": "vqa.accuracy", "margin": 0.05}}}, "gates")
    with pytest.raises(GateFailed, match="metrics and samples are not of one evaluation"):
        gate("g", [tmp_path / "metrics.json"], tmp_path / "champion.json", tmp_path / "v.json", config,
             tmp_path / "evaluation")
    write_json(tmp_path / "evaluation/evaluation.json", {"champion": "v3", "unscored": {"vqa": "it has no head"}})
    with pytest.raises(GateFailed, match="is not known of the champion: it has no head"):
        gate("g", [tmp_path / "metrics.json"], tmp_path / "champion.json", tmp_path / "v.json", config,
             tmp_path / "evaluation")


def test_costs_are_read_where_a_rule_names_them_and_must_be_the_evaluated_models(tmp_path):
    judged(tmp_path, {"champion": {"margin": 0.05}}, GOOD)
    costs = tmp_path / "costs.json"
    write_json(costs, {"metrics": {"cost.seconds_ratio": 2.1}, "n": {}, "details": {}, "models": {"challenger": "a"}})

    def run(rule):
        config = parse(GateConfig, {"rules": {"one": rule}}, "gates")
        arguments = [tmp_path / "metrics.json"], tmp_path / "champion.json", tmp_path / "v.json", config
        gate("g", *arguments, tmp_path / "evaluation", costs)
        return json.loads((tmp_path / "v.json").read_text())

    with pytest.raises(GateFailed, match=r"cost.seconds_ratio 2.1 is above the ceiling 1.5"):
        run({"metric": "cost.seconds_ratio", "max": 1.5})
    before = run({"metric": "cost.seconds_ratio", "max": 3})["evidence"]
    assert run({"metric": "cost.seconds_ratio", "max": 3})["evidence"] == before
    assert run({"metric": "cost.seconds_ratio", "max": 2.5})["evidence"] != before  # another rule
    write_json(costs, {"metrics": {"cost.seconds_ratio": 2.2}, "models": {"challenger": "a"}})
    assert run({"metric": "cost.seconds_ratio", "max": 3})["evidence"] != before  # other costs
    assert "cost.seconds_ratio" not in run({"metric": "vqa.accuracy", "min": 0.5})["metrics"]
    write_json(costs, {"metrics": {"cost.seconds_ratio": 1.0}, "models": {"challenger": "b"}})
    with pytest.raises(UserError, match="costs of other models"):
        run({"metric": "cost.seconds_ratio", "max": 1.5})
    costs.unlink()
    with pytest.raises(GateFailed, match="was not measured"):
        run({"metric": "cost.seconds_ratio", "max": 1.5})
