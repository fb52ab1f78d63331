"""The door to the flows: settle Prefect's environment and server, then import it.

Prefect reads its settings when it is imported, so nothing here imports it at the top. A server that already runs
(`PREFECT_API_URL`, or one on loopback as `make ui` starts it) is used; else one is started for the length of the
run. Both keep their history in the workspace, so that `make ui` shows past runs too.
"""

import contextlib
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from vlmpipe import process
from vlmpipe.errors import UserError

STATE = Path("data/state")
START_TIMEOUT_S = 300  # a first start migrates its database; one that has ended is not waited for
PORT = 4200


def run(flow: str = "pipeline", profile: str | None = None, overrides: Sequence[str] = (),
        targets: Sequence[str] = ()) -> int:
    """Run a flow here and now; 0 when it is done, 3 when a stage broke.

    Args:
        flow: `pipeline`, `curate` or `train`.
        profile, overrides: what params.yaml is composed from; without a profile it stays as it is.
        targets: run only these stages and what is above them.

    Raises:
        UserError: unusable input, or a run is already going here.
        GateFailed: a gate stopped the run.
    """
    root = workspace()
    # From here on: of two runs the second has to say so at once, not after its server has started.
    with process.run_lock(root / STATE / "run.lock"), prefect_api(root):
        import prefect

        from flows import pipeline
        from flows.walk import StageFailed

        try:
            with prefect.tags(pipeline.workspace_tag(root)):
                pipeline.FLOWS[flow](profile=profile, overrides=list(overrides), targets=list(targets))
        except StageFailed as failure:
            print(f"error: {str(failure).splitlines()[0]}", file=sys.stderr, flush=True)
            return 3
        finally:
            pipeline.flush()
    return 0


def ui(host: str = "127.0.0.1", port: int = PORT) -> int:
    """Become a Prefect server with its UI on this workspace's history; returns only if one already runs."""
    settle(workspace())
    url = f"http://{host}:{port}"
    if healthy(f"{url}/api"):
        print(f"A Prefect server already runs: {url}")
        return 0
    # The page asks the API at this address; Prefect's default is port 4200 whatever the server's port.
    os.environ.setdefault("PREFECT_UI_API_URL", f"{url}/api")
    print(f"Prefect's UI: {url}  (runs started from this workspace show up there; Ctrl-C ends it)", flush=True)
    os.execv(sys.executable, _server(host, port))


def serve(profile: str | None = None, overrides: Sequence[str] = (), *, cron: str | None = None,
          interval_s: float | None = None, flow: str = "pipeline") -> int:
    """Register the three flows as deployments and run them as they fall due, until ended.

    `flow` gets the schedule; the others are registered without one, to be started from the UI with parameters of
    one's own (profile, overrides, targets). One run at a time.

    Raises:
        UserError: neither or both of `cron` and `interval_s`, or a cron line that is none.
    """
    if (cron is None) == (interval_s is None):
        raise UserError(f"found cron {cron!r} and interval {interval_s!r}; expected one of the two")
    with prefect_api(workspace()) as url:
        import prefect

        from flows import pipeline

        schedule = {"cron": cron} if cron else {"interval": timedelta(seconds=interval_s)}
        parameters = {"profile": profile, "overrides": list(overrides), "targets": []}
        try:
            deployments = [pipeline.deployment(name, parameters, schedule if name == flow else {})
                           for name in pipeline.FLOWS]
        except ValueError as error:
            raise UserError(f"found cron {cron!r}, which is none; expected such as '0 2 * * *'") from error
        print(f"Serving {', '.join(pipeline.FLOWS)}; '{flow}' runs {_when(cron, interval_s)}; UI: {url}", flush=True)
        prefect.serve(*deployments, limit=1, print_starting_message=False)
    return 0


def _when(cron: str | None, interval_s: float | None) -> str:
    return f"by cron '{cron}'" if cron else f"every {interval_s:g} s"


def workspace() -> Path:
    """The folder of dvc.yaml: the current one.

    Raises:
        UserError: it is elsewhere.
    """
    root = Path.cwd()
    if not (root / "dvc.yaml").exists():
        raise UserError(f"found no dvc.yaml in {root}; expected the workspace's folder; cd there and rerun")
    return root


# --- Prefect's server --------------------------------------------------------------------------------------

def settle(root: Path) -> None:
    """Prefect's settings for this process and its children; what the user has set stands."""
    settings = {
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_HOME": str(root / STATE / "prefect"),
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "PREFECT_LOGGING_LOGGERS_PREFECT_FLOW_RUNS_LEVEL": "INFO",
        "PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL": "INFO",
        "PREFECT_LOGGING_FORMATTERS_STANDARD_FLOW_RUN_FMT": "%(asctime)s | %(flow_name)s | %(message)s",
        "PREFECT_LOGGING_FORMATTERS_STANDARD_TASK_RUN_FMT": "%(asctime)s | %(task_run_name)s | %(message)s",
        "PREFECT_CLI_PROMPT": "false",
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    # Scheduled runs start as `python -m prefect`, which has to find `flows` and `vlmpipe`.
    here = str(Path(__file__).parents[1])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if here not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, *paths]))


@contextlib.contextmanager
def prefect_api(root: Path) -> Iterator[str]:
    """Have PREFECT_API_URL lead to a live server during the block; yields the address of its UI.

    Raises:
        UserError: nothing answers at the PREFECT_API_URL that the user has set, or no server starts.
    """
    given = os.environ.get("PREFECT_API_URL")
    if given and not healthy(given):
        raise UserError(f"nothing answers at PREFECT_API_URL={given}; expected a Prefect server; start it or unset it")
    settle(root)
    url = given or f"http://127.0.0.1:{os.environ.get('PREFECT_SERVER_API_PORT', PORT)}/api"
    with contextlib.ExitStack() as stack:
        if given or healthy(url):
            os.environ["PREFECT_API_URL"] = url
        else:
            url = stack.enter_context(_temporary_server(root))
        try:
            yield url.removesuffix("/api")
        finally:
            if not given:
                del os.environ["PREFECT_API_URL"]


def healthy(api_url: str) -> bool:
    """Whether a Prefect server answers at `api_url` (http://host:port/api)."""
    try:
        with urllib.request.urlopen(f"{api_url}/health", timeout=5) as answer:
            return answer.read() == b"true"
    except (urllib.error.URLError, OSError, ValueError):
        return False


@contextlib.contextmanager
def _temporary_server(root: Path) -> Iterator[str]:
    """A server of our own: unlike Prefect's own temporary one it has the UI, and ends when we are killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, log_path = f"http://127.0.0.1:{port}/api", Path(os.environ["PREFECT_HOME"]) / "server.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    own = {"PREFECT_UI_API_URL": url}  # as in `ui`
    with open(log_path, "wb") as log:
        server = process.start(_server("127.0.0.1", port), env=own | os.environ, cwd=root, output=log.fileno())
    os.environ["PREFECT_API_URL"] = url
    try:
        import prefect.flows  # noqa: F401  takes 1.5 s and the server 4 s: side by side

        _wait_healthy(server, url, log_path)
        yield url
    finally:
        server.terminate()
        server.wait()


def _wait_healthy(server, url: str, log_path: Path) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while not healthy(url):
        if server.poll() is not None or time.monotonic() > end:
            raise UserError(f"found no Prefect server after {START_TIMEOUT_S} s or it ended; see {log_path}; "
                            f"`make ui` in another terminal shows why")
        time.sleep(0.05)


def _server(host: str, port: int) -> list[str]:
    return [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)]
