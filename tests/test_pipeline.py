"""The whole pipeline as a user runs it, through the real Prefect, Ray, DVC, img2dataset, Great Expectations, datasets.

Whole runs are dear, so there are four: one to a promoted model, one by `dvc repro`, one that is killed three times, and
one that goes on from the first with another threshold and another pool. Everything else looks at what they left.
"""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from tests.conftest import Workspace, copy_workspace, make_workspace
from vlmpipe.curate import ledger
from vlmpipe.curate.planted import caught
from vlmpipe.curate.spool import Spool
from vlmpipe.shards import iter_images, read_json, read_manifest, read_rows

# Far above what they take: other work on the machine must not fail them.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

DATA = Path("data/tiny")
CHAMPION, VERDICT = Path("results/tiny/champion.json"), Path("results/tiny/gates/finetune/verdict.json")
TINY = ("--profile", "tiny")
RUN = ("python", "-m", "vlmpipe", "run", *TINY)
ROWS = 240
RAN = re.compile(r"\| (\S+) \| Finished in state Completed\('ran'\)")
# Opinions about sound pictures are no mechanical faults: a scorer trained for seconds has none worth asserting.
NOT_MECHANICAL = {"swapped"}


# --- looking at a workspace --------------------------------------------------------------------------------

def lock(workspace: Workspace) -> dict:
    """dvc.lock by stage and path: DVC writes entries in the order in which stages ended."""
    stages = yaml.safe_load((workspace.root / "dvc.lock").read_text())["stages"]
    return {
        name: {key: {entry["path"]: entry for entry in value} if key in ("deps", "outs") else value
               for key, value in stage.items()}
        for name, stage in stages.items()
    }


def git(workspace: Workspace, *arguments: str) -> str:
    return workspace.done("git", *arguments).strip()


def tags(workspace: Workspace) -> list[str]:
    return git(workspace, "tag", "--list").splitlines()


def due(workspace: Workspace) -> set[str]:
    """The stages that DVC would run for what has changed by now; what comes below them is not among them."""
    return set(json.loads(workspace.done("dvc", "status", "--json")))


def uids(workspace: Workspace, pool: str = "scenes") -> list[str]:
    return read_rows(workspace.root / DATA / "pools" / pool, ["uid"])["uid"].to_pylist()


def column(path: Path, name: str) -> list:
    return pq.read_table(path, columns=[name])[name].to_pylist()


def page(workspace: Workspace) -> str:
    return (workspace.root / DATA / "report/index.html").read_text()


def without_scorer_noise(rows: list[dict]) -> dict[str, tuple[int, int]]:
    return {row["kind"]: (row["caught"], row["planted"]) for row in rows if row["kind"] not in NOT_MECHANICAL}


# --- a run to a promoted model -----------------------------------------------------------------------------

def test_a_run_ends_with_a_promoted_model(tiny):
    champion = read_json(tiny.root / CHAMPION)
    assert champion["version"] == "v0.0.1"
    assert read_json(tiny.root / VERDICT)["passed"] and champion["metrics"]["vqa.accuracy"] >= 0
    assert tags(tiny) == ["vlm-tiny#champion#1", "vlm-tiny@v0.0.1"]
    assert git(tiny, "rev-list", "-1", "vlm-tiny@v0.0.1") == champion["rev"]
    assert "dvc.lock" in git(tiny, "show", "--name-only", "--format=", champion["rev"]).splitlines()
    assert "champion.json" in git(tiny, "show", "--name-only", "--format=", "HEAD")
    assert git(tiny, "status", "--porcelain") == ""
    assert "<html" in page(tiny) and "vlmpipe report" in page(tiny)


def test_every_row_is_accounted_for(tiny):
    pool, selection = tiny.root / DATA / "pools/scenes", tiny.root / DATA / "selection"
    decisions = pq.read_table(selection / "decisions.parquet")
    reasons = Counter(decisions["reason"].to_pylist())
    funnel = read_json(selection / "funnel.json")
    assert decisions["uid"].to_pylist() == uids(tiny) and len(set(uids(tiny))) == ROWS
    assert funnel["kept"] == reasons.pop(None) == sum(decisions["kept"].to_pylist())
    assert funnel["reasons"] == reasons and funnel["kept"] + reasons.total() == ROWS
    packed = [uid for path in (tiny.root / DATA / "packed").glob("*/*.parquet") for uid in column(path, "uid")]
    assert sorted(packed) == sorted(decisions.filter(decisions["kept"])["uid"].to_pylist())
    assert read_manifest(pool)["rows"] == ROWS


def test_every_planted_mechanical_fault_is_caught(tiny):
    found = caught(tiny.root / DATA / "world/scenes/planted.parquet", tiny.root / DATA / "selection/decisions.parquet")
    counts = without_scorer_noise(found["rows"])
    assert len(counts) == 20
    assert all(caught == planted >= 1 for caught, planted in counts.values()), counts


def test_the_commit_and_the_remote_are_the_whole_record(tiny, tmp_path):
    """A clone of the commit with the remote's data is a workspace in which nothing is due."""
    subprocess.run(["git", "clone", "-q", str(tiny.root), str(tmp_path / "clone")], check=True)
    clone = Workspace(tmp_path / "clone")
    clone.done("dvc", "remote", "modify", "--local", "local", "url", str(tiny.root / "remote"))
    clone.done("dvc", "pull", "--quiet")
    assert due(clone) == set()
    assert page(clone) == page(tiny)


# --- an unchanged second run -------------------------------------------------------------------------------

@contextlib.contextmanager
def measured(label: str) -> Iterator[dict]:
    """Seconds on the clock, printed, and of the processor, which other work on the machine doesn't stretch."""
    cost, clock, before = {}, time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    yield cost
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cost["processor"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{label}: {time.monotonic() - clock:.1f} s, of the processor {cost['processor']:.1f} s")


def test_an_unchanged_second_run_runs_nothing(tiny):
    before = git(tiny, "rev-parse", "HEAD"), tags(tiny), (tiny.root / "dvc.lock").read_bytes()
    with measured("unchanged, dvc repro") as by_hand:
        said = tiny.done("dvc", "repro")
    assert said.count("didn't change, skipping") == len(lock(tiny)) and "Running stage" not in said
    with measured("unchanged, flow") as by_flow:
        said = tiny.done(*RUN)
    assert f"{len(lock(tiny))} stages: 0 ran, {len(lock(tiny))} cached" in said and not RAN.findall(said)
    assert "nothing new to commit" in said and "the model is v0.0.1 as before" in said
    assert (git(tiny, "rev-parse", "HEAD"), tags(tiny), (tiny.root / "dvc.lock").read_bytes()) == before
    # Processor time that fits on one core even where the work can't be spread.
    assert by_hand["processor"] < 20 and by_flow["processor"] < 40


# --- by hand -----------------------------------------------------------------------------------------------

def test_a_hand_typed_repro_leaves_the_same_lock(tiny, tmp_path):
    by_hand = make_workspace(tmp_path / "by-hand")
    by_hand.done("python", "-m", "vlmpipe", "compose", *TINY)
    by_hand.done("dvc", "repro", timeout=3000)
    assert lock(by_hand) == lock(tiny)
    assert "vlmpipe/dispatch.py" in lock(by_hand)["pretrain"]["deps"]  # code is in it
    for path in ("metrics/pretrain.json", "metrics/finetune.json", "gates/data/verdict.json"):
        assert (by_hand.root / "results/tiny" / path).read_bytes() == (tiny.root / "results/tiny" / path).read_bytes()
    assert not (by_hand.root / CHAMPION).exists() and tags(by_hand) == []  # promotion is the flow's


# --- a threshold, a pool, a second version -----------------------------------------------------------------

THRESHOLD, POOLS = "curation.select.clip.top_fraction=0.8", "pool=[scenes,more]"


@pytest.fixture(scope="module")
def grown(tiny, tmp_path_factory) -> tuple[Workspace, str]:
    """The workspace after a second run with another threshold and one more pool, and what that run said."""
    workspace = copy_workspace(tiny, tmp_path_factory.mktemp("grown"))
    return workspace, workspace.done(*RUN, "--set", THRESHOLD, "--set", POOLS, timeout=3000)


def test_a_threshold_makes_nothing_above_select_due(tiny, tmp_path):
    workspace = copy_workspace(tiny, tmp_path)
    workspace.done("python", "-m", "vlmpipe", "compose", *TINY, "--set", THRESHOLD)
    assert due(workspace) == {"select"}
    workspace.done("python", "-m", "vlmpipe", "compose", *TINY)
    assert due(workspace) == set()


def test_a_pool_makes_only_its_own_stages_due_above_select(tiny, tmp_path):
    workspace = copy_workspace(tiny, tmp_path)
    workspace.done("python", "-m", "vlmpipe", "compose", *TINY, "--set", POOLS)
    assert due(workspace) == {"download@more", "annotate@more", "select"}


def test_a_run_with_both_leaves_the_rest_alone(tiny, grown):
    workspace, said = grown
    ran, before, after = set(RAN.findall(said)), lock(tiny), lock(workspace)
    untouched = {"world@scenes", "scorer", "download@scenes", "annotate@scenes"}
    assert ran and not ran & untouched
    assert {stage for stage in after if after[stage] != before.get(stage)} == set(after) - untouched
    decisions = pq.read_table(workspace.root / DATA / "selection/decisions.parquet")
    assert Counter(decisions["pool"].to_pylist()) == {"scenes": ROWS, "more": 60}
    assert decisions["uid"].to_pylist() == uids(workspace, "more") + uids(workspace)  # pools by name


def test_versions_are_listed_rolled_back_and_asked(tiny, grown, tmp_path):
    workspace = copy_workspace(grown[0], tmp_path / "rolled-back")
    listed = workspace.done("python", "-m", "vlmpipe", "models", COLUMNS="200").splitlines()
    rows = [re.sub(r"[^\w.#:@%-]+", " ", line).split() for line in listed if "v0.0." in line]
    assert [row[:3] for row in rows] == [["v0.0.2", "champion", "passed"], ["v0.0.1", "passed", "vqa.accuracy"]]
    unknown = workspace.vlmpipe("rollback", "v0.0.9")
    assert unknown.returncode == 2 and "expected one of: v0.0.1, v0.0.2" in unknown.stderr

    picture = tmp_path / "picture.jpg"
    uid, data = next(iter_images(workspace.root / DATA / "pools/scenes", "00000"))
    picture.write_bytes(data)
    assert uid in uids(workspace)
    for version, model in (("v0.0.2", workspace), ("v0.0.1", tiny)):
        workspace.done("python", "-m", "vlmpipe", "rollback", version)
        assert read_json(workspace.root / CHAMPION)["version"] == version
        directory = str(model.root / DATA / "models/finetune")
        for words in (("ask", str(picture), "what colour is it?"), ("caption", str(picture))):
            answer = workspace.vlmpipe(*words)
            assert answer.returncode == 0, answer.stderr
            assert answer.stdout == workspace.vlmpipe(*words, "--model", directory).stdout
        [kept] = workspace.root.glob(f"data/state/champions/vlm-tiny-{version}-*/model.safetensors")
        assert kept.read_bytes() == Path(directory, "model.safetensors").read_bytes()
    # A rollback is a decision of a person: the next run, with nothing new, lets it stand.
    said = workspace.done(*RUN, "--set", THRESHOLD, "--set", POOLS)
    assert "the model is v0.0.2 as before; the champion is v0.0.1" in said


# --- a gate that says no -----------------------------------------------------------------------------------

LIMIT_CELL = "<td>≥ 1.01</td>"


def test_a_failed_gate_stops_both_entries_and_the_champion_stands(tiny, tmp_path):
    workspace = copy_workspace(tiny, tmp_path)
    before = tags(workspace), (workspace.root / CHAMPION).read_bytes(), git(workspace, "rev-parse", "HEAD")
    accuracy = read_json(workspace.root / CHAMPION)["metrics"]["vqa.accuracy"]
    message = f"vqa.accuracy {accuracy:.6g} is below the floor 1.01"

    flow = workspace.run(*RUN, "--set", "gates.finetune.rules.accuracy.min=1.01")
    said = flow.stdout + flow.stderr
    assert flow.returncode == 1 and f"gate finetune failed: {message}" in said
    assert RAN.findall(said) == [] and "publish" not in said
    check = next(rule for rule in read_json(workspace.root / VERDICT)["rules"] if not rule["passed"])
    assert (check["metric"], check["value"], check["limit"]) == ("vqa.accuracy", accuracy, 1.01)
    assert LIMIT_CELL in page(workspace) and LIMIT_CELL not in page(tiny)

    repro = workspace.run("dvc", "repro")
    assert repro.returncode != 0 and message in repro.stdout + repro.stderr
    assert "Running stage 'report'" not in repro.stdout
    assert read_json(workspace.root / VERDICT)["passed"] is False
    after = tags(workspace), (workspace.root / CHAMPION).read_bytes(), git(workspace, "rev-parse", "HEAD")
    assert after == before


# --- SIGKILL -----------------------------------------------------------------------------------------------

def wait_until(ready: Callable, timeout_s: float = 1800.0) -> None:
    end = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)


def at_work(root: Path) -> list[str]:
    """Processes of this workspace, whoever their parent is by now. Some of Ray's overwrite their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            paths = process.environ().get("PYTHONPATH", "").split(os.pathsep)
            if str(root) in paths or Path(process.cwd()).is_relative_to(root):
                found.append(f"{process.pid} {' '.join(process.cmdline())[:80]}")
    return found


@contextlib.contextmanager
def started(workspace: Workspace) -> Iterator[subprocess.Popen]:
    """A run under way; what it says is in `run.log`."""
    with open(workspace.root.parent / "run.log", "w") as log:
        run = workspace.start(*RUN, output=log)
    try:
        yield run
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def kill_when(workspace: Workspace, ready: Callable) -> None:
    """SIGKILL a run's own process as soon as `ready()`; the rest of it has to end by itself."""
    with started(workspace) as run:
        wait_until(lambda: ready() or run.poll() is not None)
        assert run.poll() is None, (workspace.root.parent / "run.log").read_text()
        run.kill()
    wait_until(lambda: not at_work(workspace.root), 120)


def rows_under_way(data: Path) -> int:
    """Rows that the download says it has: 0 where a counter is just being written."""
    return sum(int(path.read_text() or 0) for path in data.glob("state/download/scenes/progress/*"))


def finished_rows(data: Path) -> set[str]:
    """Rows that must not be fetched again: those in spools, and the settled ones of finished shards."""
    found = set()
    for path in data.glob("state/download/scenes/spool/*.spool"):
        with Spool(path) as spool:
            found.update(spool.uids())
    for path in data.glob("state/download/scenes/done/*.json"):
        rows = pq.read_table(data / "pools/scenes" / f"{path.stem}.parquet", columns=["uid", "status"]).to_pylist()
        found.update(row["uid"] for row in rows if row["status"] != "retriable")
    return found


def fetched_since(data: Path, moment: float) -> set[str]:
    lines = [line for path in data.glob("state/download/scenes/ledger/*.parquet") for line in ledger.read(path)]
    return {line["uid"] for line in lines if (line["tried_at"] or 0) > moment}


def stamps(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("*.parquet")}


def test_a_run_that_is_killed_three_times_ends_as_if_it_never_was(tiny, tmp_path):
    workspace = make_workspace(tmp_path / "killed")
    data = workspace.root / DATA

    kill_when(workspace, lambda: rows_under_way(data) >= 30)
    assert not (data / "pools/scenes/manifest.json").exists()
    finished, moment = finished_rows(data), time.time()
    assert 0 < len(finished) < ROWS

    kill_when(workspace, lambda: stamps(data / "annotations/scenes"))
    refetched = fetched_since(data, moment)
    assert not refetched & finished and refetched | finished == set(uids(workspace))
    assert not (data / "annotations/scenes/manifest.json").exists()
    annotated = stamps(data / "annotations/scenes")

    kill_when(workspace, lambda: list(data.glob("state/pretrain/checkpoints/step-*")))
    assert annotated.items() <= stamps(data / "annotations/scenes").items()
    assert not (data / "models/pretrain").exists()
    with started(workspace) as run:
        assert_no_second_run(workspace, run)
        assert run.wait(timeout=3000) == 0, (tmp_path / "run.log").read_text()

    assert read_json(data / "state/pretrain/timing.json")["resumed_from"] >= 20
    steps = [json.loads(line)["step"] for line in (data / "models/pretrain/curves.jsonl").open()]
    assert steps == list(range(1, 61))
    assert uids(workspace) == uids(tiny)
    # Every byte of every stage's output, so no row is lost or doubled and no weight differs.
    assert lock(workspace) == lock(tiny)
    assert read_json(workspace.root / CHAMPION)["version"] == "v0.0.1"


def assert_no_second_run(workspace: Workspace, first: subprocess.Popen) -> None:
    """From its first moment on `first` has the workspace: another run says so in one line and changes nothing."""
    held = workspace.root / "data/state/run.lock"
    wait_until(lambda: held.read_text().strip() == str(first.pid) or first.poll() is not None)
    second = workspace.run(*RUN)
    assert second.returncode == 2, second.stderr
    [line] = (second.stdout + second.stderr).strip().splitlines()
    assert f"already going (pid {first.pid})" in line and "wait for it or end it" in line
