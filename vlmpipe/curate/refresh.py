"""Trying again what may work by now: `python -m vlmpipe refresh POOL`.

A pool whose list and settings are unchanged is left alone by `dvc repro`. A refresh leaves a note beside the ledger and
has DVC run the pool's download once more (`dvc repro --single-item --force`). The stage reads the note: rows that are
due are asked for again, those that still wait and those that were refused stay as they are. What changed makes
the stages below due; where nothing did, they stay cached.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmpipe import shards
from vlmpipe.curate import ledger
from vlmpipe.errors import UserError

NOTE = "refresh.json"


def refresh(name: str, root: Path, all_rows: bool = False) -> int:
    """Have DVC retry the pool's retriable rows that are due, or all of them; return the exit code.

    Raises:
        UserError: the pool was never downloaded here.
    """
    state, now = root / "state" / "download" / name, time.time()
    found = ledger.summary(state, float("inf") if all_rows else now)
    print(ledger.due_line(name, found), flush=True)
    if not found["due"]:
        print("nothing to do" + ("; --all tries those that wait too" if found["retriable"] else ""))
        return 0
    shards.write_json(state / NOTE, {"until": None if all_rows else now})
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", "--force", f"download@{name}"]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise UserError(f"pool '{name}' was not refreshed (its reason stands above); expected stage download@{name} to "
                        f"run; mend it, then rerun")
    after = ledger.summary(state)
    print(f"{found['retriable'] - after['retriable']} of {found['due']} rows are settled now; "
          f"{ledger.due_line(name, after)}; each run that fails doubles a row's wait")
    return 0


def resting(state: Path, names: Sequence[str]) -> dict[str, set[str]]:
    """Shard -> uids that a refresh under way leaves alone; nothing where none is under way."""
    if not (state / NOTE).exists():
        return {}
    until = shards.read_json(state / NOTE)["until"]
    return {} if until is None else {name: _waiting(ledger.folder(state) / f"{name}.parquet", until) for name in names}


def _waiting(path: Path, until: float) -> set[str]:
    if not path.exists():
        return set()
    table = pq.read_table(path, columns=["uid", "status", "next_attempt"])
    table = table.filter(pc.equal(table["status"], "retriable"))
    return set(table["uid"].filter(pc.invert(ledger.is_due(table["next_attempt"], until))).to_pylist())


def finish(state: Path, names: Sequence[str]) -> None:
    """The download has ended: the note is done with, and so are ledgers of shards that are no more."""
    (state / NOTE).unlink(missing_ok=True)
    for path in ledger.folder(state).glob("*.parquet"):
        if path.stem not in names:
            path.unlink()
