import importlib.metadata
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vlmpipe import doctor
from vlmpipe.doctor import BAD, NOTE, OK, dvc_config, examine, locked_versions, reachable

ROOT = Path(__file__).parents[1]


@pytest.fixture
def workspace(tmp_path, monkeypatch) -> Path:
    for name in ("RAY_ADDRESS", "PREFECT_API_URL"):
        monkeypatch.delenv(name, raising=False)
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    remote = local\n['remote \"local\"']\n    url = ../remote\n")
    (tmp_path / "params.yaml").write_text("cluster: {address: null}\n")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "start"], check=True)
    return tmp_path


def rows(root: Path) -> dict[str, doctor.Row]:
    return {row.what: row for row in examine(root)}


def test_a_sound_workspace_lacks_nothing(workspace):
    found = rows(workspace)
    assert [row for row in found.values() if row.state == BAD] == []
    assert found["git"].state == OK and found["dvc remote"].found == "local -> ../remote"
    assert found["torch"].found == importlib.metadata.version("torch")
    assert found["dvc.lock"].state == NOTE and found["dvc.lock"].remedy == "make run"


def test_every_finding_that_is_not_ok_says_what_to_do(tmp_path):
    found = rows(tmp_path)
    assert found["git"].state == found["dvc"].state == BAD
    assert all(row.remedy for row in found.values() if row.state != OK)


def test_exit_status_and_table(workspace, capsys):
    assert doctor.doctor(workspace) == 0
    (workspace / ".dvc/config").write_text("")
    assert doctor.doctor(workspace) == 1
    assert "missing: dvc remote" in capsys.readouterr().out


def test_a_missing_and_a_wrong_version(workspace, monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "gto":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    (workspace / "requirements.lock").write_text("# lock\nprefect==0.1\ntorch==" + real("torch") + "\n")
    found = rows(workspace)
    assert found["gto"].state == BAD and found["gto"].remedy == "make setup"
    assert found["prefect"].state == NOTE and "0.1" in found["prefect"].remedy
    assert found["torch"].state == OK


def test_changed_files_and_a_broken_params_are_named(workspace):
    (workspace / "params.yaml").write_text("a: [")
    found = rows(workspace)
    assert found["git"].state == NOTE and "1 changed file" in found["git"].found
    assert found["params.yaml"].state == BAD


def test_configured_addresses_are_tried(workspace, monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        assert not reachable(f"tcp://127.0.0.1:{port}")
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{port}/api")
        found = rows(workspace)
        assert [found["ray cluster"].state, found["prefect server"].state] == [BAD, BAD]
        server.listen()
        assert rows(workspace)["ray cluster"].state == OK


def test_an_object_storage_that_does_not_answer(workspace):
    (workspace / ".dvc/config.local").write_text(
        "[core]\n    remote = s3\n['remote \"s3\"']\n    url = s3://bucket/x\n    endpointurl = http://127.0.0.1:9\n"
    )
    assert dvc_config(workspace)["core"]["remote"] == "s3"
    row = rows(workspace)["dvc remote"]
    assert row.state == BAD and "http://127.0.0.1:9" in row.remedy


def test_locked_versions_reads_names_as_pip_does(tmp_path):
    lines = ["# c", "Hydra_Core==1.3.8  # why", "torch==2.13.0+cpu ; python_version > '3'", "", "nothing"]
    (tmp_path / "lock").write_text("\n".join(lines))
    assert locked_versions(tmp_path / "lock") == {"hydra-core": "1.3.8", "torch": "2.13.0"}


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from pathlib import Path; from vlmpipe.doctor import examine; examine(Path('.'));"
        "print({'torch', 'ray', 'prefect', 'dvc', 'datasets', 'transformers'} & set(sys.modules))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "set()"
