"""Rows of chunks that an evaluation had before it was ended: a file for each, named by all that the rows depend on.

Plain values, arrays, tuples and boxes as json, compressed: nothing here is unpickled.
"""

import base64
import dataclasses
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

import vlmpipe
from vlmpipe.evaluate.metrics import Detections
from vlmpipe.shards import write_bytes_atomic


def fingerprint(value: Any) -> str:
    """The sha256 of plain values, arrays and dataclasses of them."""
    return hashlib.sha256(json.dumps(_plain(value)).encode()).hexdigest()


def code_sha256() -> str:
    """Of this package's files: other code may answer otherwise."""
    root = Path(vlmpipe.__file__).parent
    files = sorted(path for path in root.rglob("*.py"))
    return fingerprint([(path.relative_to(root).as_posix(), path.read_bytes()) for path in files])


def read_rows(state: Path, key: str) -> list[dict] | None:
    """What `write_rows` left; None where it left nothing."""
    path = _path(state, key)
    return _restored(json.loads(zlib.decompress(path.read_bytes()))) if path.exists() else None


def write_rows(state: Path, key: str, rows: list[dict]) -> None:
    write_bytes_atomic(_path(state, key), zlib.compress(json.dumps(_plain(rows)).encode(), level=1))


def _path(state: Path, key: str) -> Path:
    return state / f"{key}.json.z"


def _plain(value: Any) -> Any:
    """As json: a list stays, everything else that json doesn't know is {its kind: what it holds}."""
    if value is None or (isinstance(value, str | bool | int | float) and not isinstance(value, np.generic)):
        return value
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, tuple):
        return {"tuple": [_plain(one) for one in value]}
    if isinstance(value, dict):
        return {"dict": [[_plain(key), _plain(one)] for key, one in value.items()]}
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray | np.generic):
        return {"array": [str(value.dtype), list(value.shape), base64.b64encode(value.tobytes()).decode()]}
    if dataclasses.is_dataclass(value):
        held = [_plain(getattr(value, one.name)) for one in dataclasses.fields(value)]
        return {type(value).__name__: held}
    raise TypeError(f"found {type(value).__name__} in a row; expected plain values, arrays and dataclasses of them")


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return [_restored(one) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind == "dict":
        return {_restored(key): _restored(one) for key, one in held}
    if kind == "bytes":
        return base64.b64decode(held)
    if kind == "array":
        name, shape, data = held
        return np.frombuffer(base64.b64decode(data), np.dtype(name)).reshape(shape).copy()[()]
    return {"tuple": tuple, "Detections": lambda fields: Detections(*fields)}[kind](_restored(held))
