import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import yaml

from flows import walk
from flows.walk import Node, StageFailed, Undecided, below, failure, read_plan, restrict
from vlmpipe.errors import GateFailed, UserError

STAGES = ["download@one", "download@two", "gate_data", "pack", "report", "select"]


def lock(toy) -> dict:
    return yaml.safe_load((toy.root / "dvc.lock").read_text())


def wait_until(condition, timeout_s=30.0):
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)
    return found


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


# --- the plan ----------------------------------------------------------------------------------------------

def node(name: str, *upstream: str, verdict: Path | None = None) -> Node:
    return Node(name, "", upstream, True, 0, verdict)


DIAMOND = [
    node("top@x"), node("top@y"), node("middle", "top@x", "top@y"), node("left", "middle"), node("right", "top@y"),
]


def test_restrict_takes_everything_above():
    assert [n.name for n in restrict(DIAMOND, ["middle"])] == ["top@x", "top@y", "middle"]
    assert [n.name for n in restrict(DIAMOND, ["top"])] == ["top@x", "top@y"]
    assert [n.name for n in restrict(DIAMOND, ["right", "top@x"])] == ["top@x", "top@y", "right"]


def test_below_takes_everything_that_depends_on_it():
    assert [n.name for n in below(DIAMOND, "top@x")] == ["top@x", "middle", "left"]


def test_an_unknown_target_is_named_with_what_there_is():
    with pytest.raises(UserError, match=r"no stage 'midle'.*top@x, top@y, middle"):
        restrict(DIAMOND, ["midle"])


def test_the_plan_is_dvcs_graph(toy_alone, monkeypatch):
    monkeypatch.chdir(toy_alone.root)
    plan = {n.name: n for n in read_plan(toy_alone.root)}
    assert sorted(plan) == STAGES
    assert plan["select"].upstream == ("download@one", "download@two")
    assert plan["pack"].upstream == ("gate_data", "select")
    assert [plan["download@one"].retries, plan["select"].retries, plan["gate_data"].retries] == [1, 0, 0]
    assert plan["gate_data"].verdict == toy_alone.root / "results/toy/gates/data/verdict.json"
    assert all(n.changed for n in plan.values())
    toy_alone.dvc("repro", "--quiet")
    assert not any(n.changed for n in read_plan(toy_alone.root))


def test_a_broken_dvc_lock_is_a_users_error(toy_alone, monkeypatch):
    monkeypatch.chdir(toy_alone.root)
    (toy_alone.root / "dvc.lock").write_text("schema: '2.0'\nstages:\n  select: {cmd")
    with pytest.raises(UserError, match=r"dvc.lock.*git checkout dvc.lock"):
        read_plan(toy_alone.root)


# --- locks of killed processes -----------------------------------------------------------------------------

def test_locks_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    me = {"pid": os.getpid(), "cmd": "x " + " ".join(psutil.Process().cmdline()[-1:])}
    reused = {"pid": os.getpid(), "cmd": "dvc repro --single-item select"}  # our pid, but not what we run
    dead = {"pid": 2**22 + 1, "cmd": "dvc repro"}
    locks = {"write": {"a": dead, "b": me, "c": reused}, "read": {"a": [dead, me], "d": [reused]}}
    (tmp_path / "rwlock").write_text(json.dumps(locks))
    walk.clear_dead_locks(tmp_path)
    assert json.loads((tmp_path / "rwlock").read_text()) == {"write": {"b": me}, "read": {"a": [me]}}


def test_a_half_written_lock_file_is_mended(toy_alone, monkeypatch):
    monkeypatch.chdir(toy_alone.root)
    toy_alone.dvc("repro", "--quiet", "select")
    (toy_alone.root / ".dvc/tmp/rwlock").write_text('{"write": {"')
    read_plan(toy_alone.root)
    assert json.loads((toy_alone.root / ".dvc/tmp/rwlock").read_text()).get("write", {}) == {}


# --- failures ----------------------------------------------------------------------------------------------

DVC_ERROR = "ERROR: failed to reproduce 'x': failed to run: python x, exited with 2"


def test_a_users_error_keeps_its_line():
    error = failure(node("x"), ["Running stage 'x':", "> python x", "error: found 0 rows; expected 1", DVC_ERROR])
    assert isinstance(error, UserError) and str(error) == "stage x: found 0 rows; expected 1"


def test_any_other_failure_leads_with_its_last_line():
    error = failure(node("x"), ["> python x", "Traceback …", "RuntimeError: boom", DVC_ERROR])
    assert isinstance(error, StageFailed)
    assert str(error).splitlines() == ["stage x failed: RuntimeError: boom", "Traceback …"]


def test_where_only_dvc_speaks_its_line_is_the_reason():
    line = "ERROR: failed to reproduce 'x': missing data 'source': in.txt"
    assert str(failure(node("x"), [line])) == f"stage x failed: {line}"


def test_a_gate_without_a_verdict_crashed(tmp_path):
    assert isinstance(failure(node("g", verdict=tmp_path / "verdict.json"), ["KeyError: 'x'"]), StageFailed)


def test_a_verdict_tells_a_gate_that_failed_from_one_that_cannot_decide_and_leaves_out_what_is_waived(tmp_path):
    check = {"metric": "m", "slice": None, "rule": "min", "difference": None, "note": "is bad", "detail": None, "n": 5}
    checks = [check | {"name": "a", "passed": False, "waived": None}, check | {"name": "b", "passed": True},
              check | {"name": "c", "metric": "other", "passed": False, "waived": {"rule": "c"}}]
    gate = node("gate_x", verdict=tmp_path / "verdict.json")
    for verdict, kind, said in (("FAIL", GateFailed, "failed"), ("INCONCLUSIVE", Undecided, "can't decide")):
        facts = {"gate": "x", "passed": False, "verdict": verdict, "rules": checks}
        gate.verdict.write_text(json.dumps(facts))
        error = failure(gate, [])
        assert type(error) is kind and str(error) == f"gate x {said}: m is bad"
    assert error.gate is gate


# --- progress ----------------------------------------------------------------------------------------------

def test_progress_lines_become_one_live_artifact(monkeypatch):
    written = []
    monkeypatch.setattr(walk, "create_progress_artifact", lambda p, key, description: written.append((key, p)) or "id")
    monkeypatch.setattr(walk, "update_progress_artifact", lambda id, p, description: written.append((id, p)))
    progress = walk.Progress("download@one", every_s=0)
    for line in ["starting", "one: 1/50 (2%) 3/s", "one: 1/50 (2%) 3/s", "loss (over 400%)", "one: 25/50 (50%)"]:
        progress.read(line)
    progress.finish()
    assert written == [("progress-download-one", 2.0), ("id", 50.0), ("id", 100.0)]


def test_a_stage_without_progress_makes_no_artifact():
    progress = walk.Progress("x")
    progress.read("nothing to see")
    progress.finish()
    assert progress.artifact is None


# --- whole runs, through real DVC and Prefect --------------------------------------------------------------

def test_a_run_gives_dvcs_lock_and_an_unchanged_one_runs_nothing(toy):
    status, output = toy.flow()
    assert status == 0, output
    assert sorted(toy.log()) == ["download one", "download two", "gate", "pack", "report", "select"]
    run = toy.last_run()
    assert run["state"][0] == "Completed"
    states = {name: state for name, (state, _) in run["tasks"].items()}
    assert states == dict.fromkeys([*STAGES, "publish"], "Completed")
    assert run["artifacts"]["toy-funnel"][0] == "table"
    by_flow = lock(toy)

    status, output = toy.flow()
    assert status == 0 and toy.log() == []
    run = toy.last_run()
    assert {name: run["tasks"][name][0] for name in STAGES} == dict.fromkeys(STAGES, "Cached")
    assert "6 stages: 0 ran, 6 cached" in output

    (toy.root / "dvc.lock").unlink()
    toy.dvc("repro", "--quiet", "--force")
    assert lock(toy) == by_flow


def test_a_threshold_reruns_what_is_below_it_and_an_equal_result_stops_there(toy):
    toy.dvc("repro", "--quiet")
    toy.log()
    toy.set(threshold=3)
    assert toy.flow()[0] == 0
    assert toy.log() == ["select", "gate", "pack", "report"]
    toy.set(threshold=2.5)  # the same rows pass
    assert toy.flow()[0] == 0
    assert toy.log() == ["select"]
    states = {name: state for name, (state, *_) in toy.last_run()["tasks"].items()}
    assert [states["select"], states["pack"], states["report"]] == ["Completed", "Cached", "Cached"]


def test_a_failed_gate_stops_the_run_and_says_both_numbers(toy):
    toy.set(floor=100)
    status, output = toy.flow()
    assert status == 1 and "GateFailed gate data failed: kept 5 is below the floor 100" in output
    run = toy.last_run()
    assert run["state"][0] == "Failed" and "kept 5 is below the floor 100" in run["state"][1]
    assert run["tasks"]["gate_data"][0] == "Failed" and run["tasks"]["gate_data"][1] == 1
    assert [run["tasks"][name][0] for name in ("pack", "report")] == ["NotReady", "NotReady"]
    assert "publish" not in run["tasks"]
    assert run["tasks"]["report of what there is"][0] == "Completed"
    assert (toy.root / "data/toy/report/index.html").exists()
    assert toy.git("log", "--oneline").count("\n") == 0  # nothing was committed
    verdict = json.loads((toy.root / "results/toy/gates/data/verdict.json").read_text())
    assert verdict["passed"] is False
    assert "## data: FAIL" in run["artifacts"]["toy-gate-data"][1]

    toy.set(floor=1)
    assert toy.flow()[0] == 0


def test_a_crash_is_retried_and_a_users_error_is_not(toy):
    (toy.root / "flaky-one").touch()
    (toy.root / "bad-two").touch()
    status, output = toy.flow()
    assert status == 2 and "UserError stage download@two: found nothing; expected a list; write one" in output
    assert toy.log().count("download one") == 2 and toy.last_run()["tasks"]["download@two"][1] == 1
    assert toy.last_run()["tasks"]["download@one"][0] == "Completed"  # what doesn't depend on it went on
    (toy.root / "bad-two").unlink()
    assert toy.flow()[0] == 0
    assert "download one" not in toy.log()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_takes_its_stages_along_and_the_next_goes_on(toy, number):
    (toy.root / "slow").touch()
    flow = toy.start("end(run)")
    pids = [int(wait_until(lambda name=name: (toy.root / f"pid-{name}").exists() and
                           (toy.root / f"pid-{name}").read_text())) for name in ("one", "two")]
    if number == signal.SIGKILL:
        status, output = toy.flow()
        assert status == 2 and f"already going (pid {flow.pid})" in output
        progress = wait_until(lambda: toy.last_run()["artifacts"].get("progress-download-one"))
        assert progress[0] == "progress" and 0 < progress[1] < 100
    flow.send_signal(number)
    output = flow.communicate(timeout=60)[0]
    assert flow.returncode != 0, output
    wait_until(lambda: not any(map(alive, pids)), timeout_s=5)
    (toy.root / "slow").unlink()
    status, output = toy.flow()
    assert status == 0, output
    assert (toy.root / "data/toy/packed/rows.txt").read_text() == "2 3 4 5 6"


def test_stages_join_a_ray_that_starts_only_when_one_needs_it(toy):
    code = """
import contextlib, os

@contextlib.contextmanager
def ray():
    os.environ["RAY_ADDRESS"] = "here:1"
    print("RAY UP")
    yield
    print("RAY DOWN")

def main():
    with prefect_api(workspace()):  # Prefect's settings stand before it is imported
        import flows.pipeline as pipeline
        pipeline._ray = ray
        pipeline._ray_decider = lambda params: lambda node: node.name in ("select", "pack")
        return run()

end(main)
"""
    work = toy.root / "work.py"
    work.write_text(work.read_text() + '\nprint("address", stage, os.environ.get("RAY_ADDRESS"))\n')
    status, output = toy.python(code)
    assert status == 0, output
    assert output.count("RAY UP") == output.count("RAY DOWN") == 1
    assert "address select here:1" in output and "address pack here:1" in output
    status, output = toy.python(code)
    assert status == 0 and "RAY UP" not in output
