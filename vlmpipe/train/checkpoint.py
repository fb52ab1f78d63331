"""Training checkpoints: safetensors and json, complete or invisible, never pickled.

`root/step-00000200/` holds one safetensors file for each set of tensors, small text files and, written last, the
marker with the step, the run's fingerprint and the sha256 of every file. The directory gets its name when all of
that is on the disk, so that a run killed at any moment leaves a checkpoint or none.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmpipe.train.parallel import split_like

MARKER = "complete.json"


def fingerprint(facts: Any) -> str:
    """Hex sha256 of what makes two runs the same run: config, data, initial weights."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def save(
    root: Path, step: int, run: str, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str],
    keep: int = 2,
) -> Path:
    """Write the checkpoint of `step` and drop all but the `keep` newest; other runs' checkpoints go too.

    Args:
        run: the fingerprint of the run.
        tensors: file stem -> name -> tensor.
        texts: file name -> contents.
    """
    root.mkdir(parents=True, exist_ok=True)
    target = root / f"step-{step:08d}"
    partial = root / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for stem, named in tensors.items():
        save_file({name: own(tensor) for name, tensor in named.items()}, partial / f"{stem}.safetensors")
    for name, text in texts.items():
        (partial / name).write_text(text, encoding="utf-8")
    files = {path.name: _digest_on_disk(path) for path in sorted(partial.iterdir())}
    marker = partial / MARKER
    marker.write_text(json.dumps({"step": step, "run": run, "files": files}, indent=2), encoding="utf-8")
    _digest_on_disk(marker)
    shutil.rmtree(target, ignore_errors=True)
    os.rename(partial, target)
    _drop_others(root, run, keep)
    return target


def own(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU: safetensors refuses tensors that share memory, as tied weights do."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _digest_on_disk(path: Path) -> str:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _drop_others(root: Path, run: str, keep: int) -> None:
    ours = [path for path in _all(root) if (read_marker(path) or {}).get("run") == run][:keep]
    for path in root.iterdir():
        if path not in ours:
            shutil.rmtree(path, ignore_errors=True)


def newest(root: Path, run: str) -> Path | None:
    """The newest complete and undamaged checkpoint of the run with this fingerprint, None where there is none."""
    for path in _all(root):
        marker = read_marker(path)
        if marker is None or marker["run"] != run:
            continue
        damaged = [name for name, digest in marker["files"].items() if _digest(path / name) != digest]
        if not damaged:
            return path
        print(f"checkpoint {path} is damaged ({damaged[0]}): an older one is used", file=sys.stderr)
    return None


def _all(root: Path) -> list[Path]:
    return sorted(root.glob("step-*"), reverse=True)


def read_marker(path: Path) -> dict | None:
    """Step, run and files of a checkpoint, None where it is incomplete."""
    try:
        return json.loads((path / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def _digest(path: Path) -> str | None:
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_tensors(path: Path, stem: str) -> dict[str, Tensor]:
    return load_file(path / f"{stem}.safetensors")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as `<parameter number>.<name>` -> tensor."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": tensor for number, named in state.items() for name, tensor in named.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave, in whole tensors; groups and rates stay those of `optimizer`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        fits = tensor.shape == parameter.shape  # what is not of the parameter's shape is a count of steps
        state.setdefault(int(number), {})[name] = split_like(parameter, tensor) if fits else tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
