"""A throw-away workspace: a real git and DVC repository with six trivial stages, a gate among them."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from flows.launch import healthy
from vlmpipe import process

REPO = Path(__file__).parents[2]

DVC_YAML = """
stages:
  download:
    foreach: [one, two]
    do:
      cmd: python work.py download ${item}
      deps: [work.py, "lists/${item}.txt"]
      outs: ["data/toy/pools/${item}": {persist: true}]
      meta: {retries: 1}
  select:
    cmd: python work.py select
    deps: [data/toy/pools]
    params: [threshold]
    outs: [data/toy/selection]
  gate_data:
    cmd: python work.py gate
    deps: [data/toy/selection]
    params: [floor]
    outs: ["results/toy/gates/data/verdict.json": {cache: false}]
  pack:
    cmd: python work.py pack
    deps: [data/toy/selection, results/toy/gates/data/verdict.json]
    outs: [data/toy/packed]
  report:
    cmd: python work.py report
    deps: [data/toy/packed]
    outs: [data/toy/report]
"""

WORK = '''
import json, os, sys, time
from pathlib import Path

stage, name = sys.argv[1], (sys.argv[2:] or [""])[0]
params = {line.split(": ")[0]: line.split(": ")[1] for line in Path("params.yaml").read_text().splitlines()}
with open("log.txt", "a") as log:
    log.write(f"{stage} {name}".strip() + "\\n")

def write(path, text):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)

if stage == "download":
    if Path("slow").exists():
        write(f"pid-{name}", str(os.getpid()))
        for step in range(1, 101):
            print(f"download {name}: {step}/100 ({step}%) 5.0/s", file=sys.stderr, flush=True)
            time.sleep(0.2)
    if Path(f"flaky-{name}").exists():
        Path(f"flaky-{name}").unlink()
        raise RuntimeError("the host hung up")
    if Path(f"bad-{name}").exists():
        sys.exit("error: found nothing; expected a list; write one")
    write(f"data/toy/pools/{name}/rows.txt", Path(f"lists/{name}.txt").read_text())
elif stage == "select":
    rows = sorted(row for path in Path("data/toy/pools").glob("*/rows.txt") for row in path.read_text().split())
    kept = [row for row in rows if float(row) >= float(params["threshold"])]
    write("data/toy/selection/rows.txt", " ".join(kept))
    steps = [{"reason": "low", "rows": len(rows), "dropped": len(rows) - len(kept)}]
    write("data/toy/selection/funnel.json", json.dumps({"steps": steps}))
elif stage == "gate":
    from vlmpipe.evaluate import gate as gates
    from vlmpipe.evaluate.gate import GateConfig, Rule, gate
    from vlmpipe.errors import GateFailed
    judge = gates.judge
    if Path("undecided").exists():
        gates.judge = lambda *known: [check | {"verdict": "INCONCLUSIVE"} for check in judge(*known)]
    kept = len(Path("data/toy/selection/rows.txt").read_text().split())
    write("metrics.json", json.dumps({"metrics": {"kept": kept}, "n": {"kept": kept}}))
    try:
        gate("data", [Path("metrics.json")], None, Path("results/toy/gates/data/verdict.json"),
             GateConfig({"kept": Rule("kept", min=float(params["floor"]))}),
             waivers=Path("results/toy/waivers/data.yaml"))
    except GateFailed as failed:
        sys.exit(f"gate failed: {failed}")
elif stage == "pack":
    write("data/toy/packed/rows.txt", Path("data/toy/selection/rows.txt").read_text())
elif stage == "report":
    write("data/toy/report/index.html", "<p>report</p>")
'''


PREAMBLE = """
import json, sys
from flows.launch import prefect_api, run, workspace
from vlmpipe.errors import GateFailed, UserError

def end(call):
    try:
        sys.exit(call())
    except (GateFailed, UserError) as error:
        print(type(error).__name__, error)
        sys.exit(1 if isinstance(error, GateFailed) else 2)
"""

class Workspace:
    """A repository, and the Prefect server its flows use (none: a temporary one each)."""

    def __init__(self, root: Path, api: str | None = None):
        self.root, self.api = root, api

    def git(self, *arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=self.root, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def set(self, **values) -> None:
        path = self.root / "params.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))

    def log(self) -> list[str]:
        """Which stages ran, and forget them."""
        path = self.root / "log.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "RAY_"))}
        path = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
        server = {"PREFECT_API_URL": self.api} if self.api else {"PREFECT_SERVER_API_PORT": "1"}  # nobody is there
        return {**kept, "PATH": path, "PYTHONPATH": str(REPO), "DVC_NO_ANALYTICS": "1", **server}

    def start(self, code: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + code], cwd=self.root, env=self.environment(), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )

    def python(self, code: str) -> tuple[int, str]:
        """Run code in the workspace; exit status and all output."""
        with self.start(code) as child:
            try:
                output = child.communicate(timeout=600)[0]
            finally:
                child.kill()
        return child.returncode, output

    def flow(self, *arguments, **options) -> tuple[int, str]:
        """Run a flow as `python -m vlmpipe run` does."""
        words = [*map(repr, arguments), *(f"{key}={value!r}" for key, value in options.items())]
        return self.python(f"end(lambda: run({', '.join(words)}))")

    def last_run(self) -> dict:
        """What Prefect keeps of the last flow run by hand: its state, its tasks' and the artifacts."""
        by_hand = {"deployment_id": {"is_null_": True}}
        [flow] = self.ask("flow_runs", flow_runs=by_hand, sort="EXPECTED_START_TIME_DESC", limit=1)
        which = {"flow_runs": {"id": {"any_": [flow["id"]]}}}
        tasks, artifacts = self.ask("task_runs", **which), self.ask("artifacts", **which)
        return {
            "flow": flow,
            "state": (flow["state"]["name"], flow["state"]["message"]),
            "tasks": {task["name"]: (task["state"]["name"], task["run_count"]) for task in tasks},
            "artifacts": {artifact["key"]: (artifact["type"], artifact["data"]) for artifact in artifacts},
        }

    def ask(self, what: str, **filters) -> list[dict]:
        body = json.dumps(filters).encode()
        request = urllib.request.Request(f"{self.api}/{what}/filter", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def dvc(self, *arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "dvc", *arguments], cwd=self.root, env=self.environment(), check=True,
            capture_output=True, text=True,
        ).stdout


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A real Prefect server for the whole session; its API's address."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}/api"
    with open(home / "server.log", "wb") as log:
        child = process.start(command, env=environment, output=log.fileno())
    end = time.monotonic() + 120
    while not healthy(url):
        assert time.monotonic() < end and child.poll() is None, (home / "server.log").read_text()
        time.sleep(0.1)
    yield url
    process.stop(child)


@pytest.fixture
def toy(toy_alone, server) -> Workspace:
    toy_alone.api = server
    return toy_alone


@pytest.fixture
def toy_alone(tmp_path) -> Workspace:
    workspace = Workspace(tmp_path / "toy")
    (workspace.root / "lists").mkdir(parents=True)
    workspace.git("init", "--quiet")
    workspace.dvc("init", "--quiet")
    workspace.dvc("remote", "add", "--default", "--quiet", "local", "remote")
    files = {
        "dvc.yaml": DVC_YAML, "work.py": WORK, "lists/one.txt": "1 2 3", "lists/two.txt": "4 5 6",
        "params.yaml": "floor: 1\nprofile: toy\nresults: results/toy\nroot: data/toy\nthreshold: 2\n",
        ".gitignore": "/data/\n/remote/\n/log.txt\n/metrics.json\n/slow\n/pid-*\n/flaky-*\n/bad-*\n__pycache__/\n",
    }
    for name, text in files.items():
        (workspace.root / name).write_text(text)
    workspace.git("add", ".")
    workspace.git("-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-m", "start")
    return workspace
