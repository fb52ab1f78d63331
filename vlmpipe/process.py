"""Who dies with whom, and who goes first: child processes and the lock on a workspace.

A run killed with SIGKILL can tidy up nothing, so nothing may depend on its tidying up:
- `start` puts each child behind a small supervisor (this file, run as a script, standard library only). It holds
  the reading end of a pipe whose writing end only the parent has. The kernel closes that end however the parent
  dies, and the supervisor then kills the child's whole process group: the shell between DVC and a stage, download
  workers and loaders included. Unlike `prctl(PR_SET_PDEATHSIG)` this reaches grandchildren and works on macOS.
- `die_with_parent` covers a stage under a hand-typed `dvc repro`, where there is no supervisor.
- `run_lock` is a `flock`, which the kernel releases with its owner.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

SHELLS = {"sh", "bash", "dash", "zsh", "ksh", "fish"}
_held: set[Path] = set()  # run locks of this process


def start(command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None,
          output: int | None = subprocess.PIPE) -> subprocess.Popen:
    """Start `command` so that it and all its descendants end when this process does, in whatever way.

    Args:
        output: where stdout and stderr go together: a file descriptor, or a pipe of text lines by default.

    Returns:
        The supervisor. Its exit status is the command's (128 + signal where a signal ended it); closing its `stdin`
        kills the command, `terminate` asks it to end. `wait`, `poll` and `stdout` work as usual.
    """
    # -S and -P: no site-packages and no folder of this file on the path; it starts in 15 ms.
    return subprocess.Popen(
        [sys.executable, "-S", "-P", __file__, *map(str, command)],
        stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, text=True, errors="replace",
        env=env, cwd=cwd, start_new_session=True,  # the terminal's Ctrl-C is for the parent to act on
    )


def stop(child: subprocess.Popen) -> int:
    """End a child of `start` and its descendants at once; return its exit status."""
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()
    return child.wait()


def _supervise(command: Sequence[str]) -> int:
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    signal.signal(signal.SIGTERM, lambda *_: _signal_group(child.pid, signal.SIGTERM))

    def kill_at_end_of_parent() -> None:
        os.read(0, 1)  # nobody writes: it returns when the last writing end is closed
        _signal_group(child.pid, signal.SIGKILL)

    threading.Thread(target=kill_at_end_of_parent, daemon=True).start()
    status = child.wait()
    _signal_group(child.pid, signal.SIGKILL)  # what a crashed stage left running must not meet its next attempt
    return status if status >= 0 else 128 - status


def _signal_group(group: int, number: int) -> None:
    # macOS answers PermissionError for a group of zombies.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def die_with_parent(poll_s: float = 1.0) -> None:
    """Kill this process when the DVC process that runs it is gone; call it at the start of a stage.

    Outside `dvc repro` it does nothing, so that a run under nohup outlives its terminal.
    """
    if "DVC_STAGE" not in os.environ:
        return
    import psutil

    watched = [psutil.Process().parent()]
    # DVC runs a stage through a shell; some shells stay between the two and outlive DVC.
    if watched[0] is not None and watched[0].name() in SHELLS:
        watched.append(watched[0].parent())

    def watch() -> None:
        while all(process is not None and process.is_running() for process in watched):
            time.sleep(poll_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="die-with-parent").start()


@contextlib.contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Hold the workspace's run lock; inside a block of this process that holds it already, do nothing.

    Raises:
        UserError: another process holds it; the message gives its pid.
    """
    import fcntl

    from vlmpipe.errors import UserError

    path = Path(path).absolute()
    if path in _held:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:  # never deleted: a deleted file can be locked twice
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"found a run in this workspace already going (pid {file.read().strip() or 'unknown'}); "
                f"expected one at a time; wait for it or end it, then run again"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        _held.add(path)
        try:
            yield
        finally:
            _held.remove(path)


if __name__ == "__main__":
    sys.exit(_supervise(sys.argv[1:]))
