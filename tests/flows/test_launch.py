import socket
import time

import psutil
import pytest

from flows.launch import healthy


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_until(condition, timeout_s=90.0):
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_nothing_is_healthy_where_nothing_listens():
    assert not healthy(f"http://127.0.0.1:{free_port()}/api")
    assert not healthy("no address")


def test_a_given_server_that_does_not_answer_is_a_users_error(toy_alone):
    toy_alone.api = f"http://127.0.0.1:{free_port()}/api"
    status, output = toy_alone.flow()
    assert status == 2 and f"nothing answers at PREFECT_API_URL={toy_alone.api}" in output


def test_outside_a_workspace_and_with_odd_parameters(toy):
    status, output = toy.flow(overrides=["a.b=1"])
    assert status == 2 and "found overrides a.b=1 without a profile" in output
    status, output = toy.flow(targets=["sellect"])
    assert status == 2 and "found no stage 'sellect'" in output
    status, output = toy.python("from flows.launch import serve\nend(serve)")
    assert status == 2 and "expected one of the two" in output
    (toy.root / "dvc.yaml").unlink()
    status, output = toy.flow()
    assert status == 2 and "found no dvc.yaml" in output


def test_curate_ends_with_pack_and_targets_with_themselves(toy):
    assert toy.flow(targets=["download@one"])[0] == 0
    assert toy.log() == ["download one"]
    assert toy.flow("curate")[0] == 0
    assert sorted(toy.log()) == ["download two", "gate", "pack", "select"]


@pytest.mark.slow
def test_a_temporary_server_keeps_history_and_dies_with_its_run(toy_alone):
    status, output = toy_alone.flow()
    assert status == 0, output
    (toy_alone.root / "slow").touch()
    (toy_alone.root / "lists/one.txt").write_text("9")
    flow = toy_alone.start("end(run)")
    wait_until((toy_alone.root / "pid-one").exists)
    family = [child.pid for child in psutil.Process(flow.pid).children(recursive=True)]
    assert any("server" in " ".join(psutil.Process(pid).cmdline()) for pid in family)
    flow.kill()
    flow.wait()
    wait_until(lambda: not any(map(alive, family)), 10)

    port = free_port()
    server = toy_alone.start(f"from flows.launch import ui\nend(lambda: ui(port={port}))")
    try:
        toy_alone.api = f"http://127.0.0.1:{port}/api"
        wait_until(lambda: healthy(toy_alone.api))
        states = [run["state"]["name"] for run in toy_alone.ask("flow_runs", sort="EXPECTED_START_TIME_ASC")]
        assert states[0] == "Completed" and len(states) == 2
        assert len([run for run in toy_alone.ask("task_runs") if run["state"]["name"] == "Completed"]) >= 7
        assert states[1] == "Running"  # it was killed and could not say so; the next run says it
        (toy_alone.root / "slow").unlink()
        status, output = toy_alone.flow()
        assert status == 0, output
        states = [run["state"]["name"] for run in toy_alone.ask("flow_runs", sort="EXPECTED_START_TIME_ASC")]
        assert states == ["Completed", "Crashed", "Completed"]
    finally:
        server.terminate()
        server.communicate(timeout=30)


@pytest.mark.slow
def test_a_scheduled_run_fires_by_itself(toy):
    serving = toy.start("from flows.launch import serve\nend(lambda: serve(interval_s=5))")
    try:
        [run, *_] = wait_until(lambda: [run for run in toy.ask("flow_runs", flow_runs={"state": {"type": {
            "any_": ["COMPLETED"]}}}) if run["auto_scheduled"]])
        assert run["parameters"] == {"profile": None, "overrides": [], "targets": []}
        assert sorted(toy.log()[:6]) == ["download one", "download two", "gate", "pack", "report", "select"]
        deployments = {(d["name"], len(d["schedules"])) for d in toy.ask("deployments")}
        assert {("scheduled", 1), ("by hand", 0)} <= deployments
    finally:
        serving.terminate()
        output = serving.communicate(timeout=60)[0]
    assert "'pipeline' runs every 5 s" in output
