import json
import time
import urllib.error
import urllib.request
from datetime import date, timedelta

import pytest
from prefect.exceptions import FlowPauseTimeout

from flows import ask
from flows.ask import question
from vlmpipe.evaluate.waivers import read_waivers, today

CHECK = {
    "name": "color", "metric": "vqa.accuracy", "slice": {"name": "question_type", "value": "color"}, "rule": "margin",
    "verdict": "INCONCLUSIVE", "passed": False, "value": 0.81, "champion": 0.82, "difference": -0.01,
    "interval": [-0.03, 0.01], "limit": 0.8, "margin": 0.02, "n": 300, "clusters": 150, "samples_needed": 1200,
    "note": "the drop may be 0.02 or more", "detail": None, "waived": None,
}
FLOOR = CHECK | {"name": "floor", "slice": None, "rule": "min", "verdict": "PASS", "passed": True, "interval": None}
VERDICT = {"gate": "finetune", "champion": "v0.0.1", "evidence": "e" * 64, "rules": [FLOOR, CHECK]}
YES = {"go_on": True, "by": "Ada", "reason": "as good as the last one", "until": today()}


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Ask with answers given; (whether it goes on, the questions, the waivers)."""
    path, waivers = tmp_path / "verdict.json", tmp_path / "waivers/finetune.yaml"
    path.write_text(json.dumps(VERDICT))
    logger = type("Logger", (), {"warning": lambda self, *_: None})()
    monkeypatch.setattr(ask, "get_run_logger", lambda: logger)
    monkeypatch.setattr(ask, "url_for", lambda *_, **__: "http://here")

    def run(*answers):
        pending, shown = list(answers), []

        def pause(wait_for_input, timeout, poll_interval):
            shown.append(wait_for_input._description)
            answer = pending.pop(0)
            if answer is None:
                raise FlowPauseTimeout("never resumed")
            return wait_for_input(**answer)

        monkeypatch.setattr(ask, "pause_flow_run", pause)
        went_on = ask.ask(path, waivers, 2)
        assert not pending
        return went_on, shown, read_waivers(waivers)

    return run


def test_the_question_shows_what_is_undecided_and_how_many_samples_would_settle_it(tmp_path):
    text = question(VERDICT, tmp_path / "w.yaml", 2)
    [row] = [line for line in text.splitlines() if line.startswith("| color")]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "color", r"vqa.accuracy", r"question\_type color", "0.81", "0.82", "-0.01", "-0.03 to +0.01", "300", "1200"
    ]
    assert "1200 would settle it" in text and "floor" not in text.partition("\n- ")[0] and "2 h" in text


def test_a_yes_is_a_waiver_of_what_was_undecided_on_this_evidence_alone(asked):
    went_on, shown, [waiver] = asked(YES)
    assert went_on and len(shown) == 1
    assert vars(waiver) == {"rule": "color", "by": "Ada", "reason": YES["reason"], "excuses": "INCONCLUSIVE",
                            "until": today().isoformat(), "evidence": "e" * 64}


@pytest.mark.parametrize("answer", [None, {}, YES | {"go_on": False}])
def test_a_no_and_silence_end_the_run(asked, answer):
    went_on, shown, waivers = asked(answer)
    assert not went_on and len(shown) == 1 and waivers == []


@pytest.mark.parametrize("lacking, said", [
    ({"by": " "}, "empty 'by'"), ({"reason": ""}, "empty 'reason'"), ({"until": "some day"}, "valid date"),
    ({"until": today() - timedelta(days=1)}, "expired"), ({"until": date(2999, 1, 1)}, "at most 90 days"),
])
def test_an_answer_that_makes_no_waiver_is_asked_for_again(asked, lacking, said):
    went_on, shown, waivers = asked(YES | lacking, YES)
    assert went_on and len(waivers) == 1
    assert said in shown[1] and said not in shown[0]


def wait_until(condition, timeout_s=120.0):
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.2)
    return found


def test_a_paused_run_goes_on_from_its_gate_when_a_person_says_so(toy):
    (toy.root / "undecided").touch()
    params = toy.root / "params.yaml"
    params.write_text(params.read_text() + "publish: {ask: true}\n")
    flow = toy.start("end(run)")
    try:
        [paused] = wait_until(lambda: toy.ask("flow_runs", flow_runs={"state": {"type": {"any_": ["PAUSED"]}}}))
        assert not (toy.root / "data/toy/packed").exists() and (toy.root / "data/toy/report/index.html").exists()
        toy.log()
        answer = {key: str(value) if key == "until" else value for key, value in YES.items()}
        wait_until(lambda: resume(toy.api, paused["id"], answer))
        output = flow.communicate(timeout=120)[0]
    finally:
        flow.kill()
    assert flow.returncode == 0, output
    assert f"{toy.api.removesuffix('/api')}/runs/flow-run/{paused['id']}" in output
    assert toy.log() == ["gate", "pack", "report"]
    verdict = json.loads((toy.root / "results/toy/gates/data/verdict.json").read_text())
    assert (verdict["verdict"], verdict["passed"]) == ("PASS", True)
    [check] = verdict["rules"]
    assert check["verdict"] == "INCONCLUSIVE" and check["waived"]["by"] == "Ada"
    shown = [artifact["data"] for artifact in toy.ask("artifacts", flow_runs={"id": {"any_": [paused["id"]]}})
             if artifact["key"] == "toy-gate-data"]  # one from before the pause, one from after it
    assert sorted("waived by Ada" in text for text in shown) == [False, True]
    assert toy.git("show", "HEAD:results/toy/waivers/data.yaml").startswith("- rule: kept")


def resume(api: str, run_id: str, answer: dict) -> bool:
    """As the form in the UI does; whether the server took it: it has no form yet when the state is first seen, and
    says 503 while its database is busy."""
    request = urllib.request.Request(f"{api}/flow_runs/{run_id}/resume", json.dumps({"run_input": answer}).encode(),
                                     {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            return json.load(reply)["status"] == "ACCEPT"
    except urllib.error.HTTPError as error:
        assert error.code == 503, error
        return False
