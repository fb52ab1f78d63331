"""What all writers share."""

import json
from pathlib import Path
from typing import Any

from vlmpipe.shards import write_bytes_atomic


def dump(path: Path, value: Any) -> None:
    """Write compact json with sorted keys atomically; annotation files are long and read by programs alone."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_bytes_atomic(path, (text + "\n").encode())


def dump_lines(path: Path, values: list[Any]) -> None:
    """Write json lines atomically."""
    lines = (json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False) for value in values)
    write_bytes_atomic(path, "".join(f"{line}\n" for line in lines).encode())
