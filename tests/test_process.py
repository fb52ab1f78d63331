import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vlmpipe import process
from vlmpipe.errors import UserError


def wait_until(condition, timeout_s=10.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def read_pids(path, count):
    wait_until(lambda: path.exists() and len(path.read_text().split()) == count)
    return [int(pid) for pid in path.read_text().split()]


# A shell that stays, with a grandchild in the background: both must go.
FAMILY = "echo $$ > {pids}.part; sleep 60 & echo $! >> {pids}.part; mv {pids}.part {pids}; wait; true"


def test_output_and_status_pass_through():
    child = process.start(["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert sorted(child.stdout.read().split()) == ["err", "out"]
    assert child.wait() == 7


def test_death_by_signal_is_reported_as_shells_do():
    assert process.start(["sh", "-c", "kill -9 $$"]).wait() == 128 + signal.SIGKILL


@pytest.mark.parametrize("end, number", [("stop", signal.SIGKILL), ("terminate", signal.SIGTERM)])
def test_ending_a_child_ends_its_descendants(tmp_path, end, number):
    child = process.start(["sh", "-c", FAMILY.format(pids=tmp_path / "pids")])
    family = read_pids(tmp_path / "pids", 2)
    assert all(map(alive, family))
    process.stop(child) if end == "stop" else child.terminate()
    wait_until(lambda: not any(map(alive, family)))
    assert child.wait() == 128 + number


def test_what_a_child_leaves_behind_is_ended(tmp_path):
    child = process.start(["sh", "-c", f"sleep 60 >/dev/null 2>&1 & echo $! > {tmp_path / 'pid'}"])
    assert child.wait() == 0
    wait_until(lambda: not alive(int((tmp_path / "pid").read_text())))


def test_descendants_die_when_the_parent_is_killed(tmp_path):
    family = FAMILY.format(pids=tmp_path / "pids")
    script = f"from vlmpipe import process; process.start(['sh', '-c', {family!r}]).wait()"
    parent = subprocess.Popen([sys.executable, "-c", script])
    family = read_pids(tmp_path / "pids", 2)
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(map(alive, family)))


STAGE = """
import os, time
from pathlib import Path
from vlmpipe.process import die_with_parent
die_with_parent(poll_s=0.05)
Path({pid!r}).write_text(str(os.getpid()))
time.sleep(60)
"""


@pytest.mark.parametrize("under_dvc", [True, False])
def test_a_stage_dies_with_dvc_even_behind_a_shell(tmp_path, under_dvc):
    (tmp_path / "stage.py").write_text(STAGE.format(pid=str(tmp_path / "pid")))
    env = {name: value for name, value in os.environ.items() if name != "DVC_STAGE"}
    env["PYTHONPATH"] = str(Path(process.__file__).parents[1])
    shell = f"{sys.executable} {tmp_path / 'stage.py'}; true"  # `; true` keeps every shell from exec-ing
    dvc = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run(['sh', '-c', {shell!r}])"],
        env=env | ({"DVC_STAGE": "x"} if under_dvc else {}),
    )
    stage = read_pids(tmp_path / "pid", 1)[0]
    dvc.kill()
    dvc.wait()
    if under_dvc:
        wait_until(lambda: not alive(stage))
    else:
        time.sleep(0.5)
        assert alive(stage)
        os.kill(stage, signal.SIGKILL)


def test_run_lock_names_the_holder_and_is_released_by_sigkill(tmp_path):
    lock = tmp_path / "state" / "run.lock"
    script = f"""
import time
from pathlib import Path
from vlmpipe.process import run_lock
with run_lock(Path({str(lock)!r})):
    Path({str(tmp_path / 'held')!r}).touch()
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", script])
    wait_until((tmp_path / "held").exists)
    with pytest.raises(UserError, match=f"pid {holder.pid}"), process.run_lock(lock):
        pass
    holder.kill()
    holder.wait()
    with process.run_lock(lock):
        assert lock.read_text().strip() == str(os.getpid())
        with process.run_lock(lock):  # a flow inside the launcher that started it
            pass
        other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert other.returncode != 0 and f"pid {os.getpid()}" in other.stderr
