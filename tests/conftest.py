"""A workspace as a user has it: a clone with its own git, DVC and configs, small enough to run whole."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).parents[1]
# Ray remembers the first mode and token that a process used, so all clusters that one test process meets share them.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", "0" * 64)


@dataclass(frozen=True)
class Workspace:
    """A copy of the repository in which commands run as a user would type them."""

    root: Path

    def environment(self, **extra: str) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        identity = {f"GIT_{role}_{key}": "t" for role in ("AUTHOR", "COMMITTER") for key in ("NAME", "EMAIL")}
        # Its own PYTHONPATH: the clone's code, not the installed one.
        return {**os.environ, **identity, "PATH": path, "PYTHONPATH": str(self.root), "DVC_NO_ANALYTICS": "1", **extra}

    def start(self, *command: str, output: int | IO = subprocess.PIPE, **extra: str) -> subprocess.Popen:
        return subprocess.Popen(
            command, cwd=self.root, env=self.environment(**extra), stdout=output, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )

    def run(self, *command: str, timeout: float = 600, **extra: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            command, cwd=self.root, env=self.environment(**extra), capture_output=True, text=True, timeout=timeout
        )

    def vlmpipe(self, *words: str, **extra) -> subprocess.CompletedProcess:
        return self.run("python", "-m", "vlmpipe", *words, **extra)

    def done(self, *command: str, **extra) -> str:
        """Run and insist on success; returns all output."""
        result = self.run(*command, **extra)
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
        return result.stdout + result.stderr


def make_workspace(root: Path) -> Workspace:
    """A clone of what git tracks here, uncommitted changes included, as a repository of its own."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    workspace = Workspace(root)
    workspace.done("git", "init", "-q", "-b", "main")
    workspace.done("git", "add", "-A")
    workspace.done("git", "commit", "-qm", "start")
    return workspace


def copy_workspace(workspace: Workspace, root: Path) -> Workspace:
    """The same workspace with its history, cache and remote at another place, for a test that changes it."""
    shutil.copytree(workspace.root, root, symlinks=True, dirs_exist_ok=True)
    return Workspace(root)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Workspace:
    """A workspace in which the tiny profile has run once, by the flow, to a promoted model."""
    workspace = make_workspace(tmp_path_factory.mktemp("tiny"))
    workspace.done("python", "-m", "vlmpipe", "run", "--profile", "tiny", timeout=3000)
    return workspace
