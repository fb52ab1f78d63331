"""Config groups to params.yaml: the same Hydra composition that `dvc exp run -S` does, by hand and validated."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vlmpipe.config import nearest
from vlmpipe.errors import UserError
from vlmpipe.shards import write_bytes_atomic
from vlmpipe.stages import PLACES

PARAMS = "params.yaml"


def compose(profile: str, overrides: Sequence[str] = (), directory: Path = Path("configs")) -> dict[str, Any]:
    """Compose `configs/` with `profile` and Hydra overrides (`model=clip`, `curation.select.min_side=64`).

    Raises:
        UserError: an unknown group choice or key, named.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups = _groups(directory)
    _check_choices([f"profile={profile}", *overrides], groups)
    try:
        with initialize_config_dir(str(directory.resolve()), version_base=None):
            config = hydra_compose("config", overrides=[f"profile={profile}", *map(_settable, overrides)])
        return OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        said = " ".join(str(error).split())
        unknown = re.search("Could not override '([^']+)'", said)
        hint = nearest(unknown[1], [*groups, *PLACES]) if unknown else ""
        found = " ".join([f"profile={profile}", *overrides])
        raise UserError(f"can't compose {found}: {said}{hint}; expected keys and choices of {directory}/") from None


def _groups(directory: Path) -> dict[str, list[str]]:
    """The choices of each config group."""
    if not directory.is_dir():
        raise UserError(f"found no {directory}/ in {Path.cwd()}; expected the workspace's folder; cd there and rerun")
    folders = [folder for folder in sorted(directory.iterdir()) if folder.is_dir()]
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def _check_choices(overrides: Sequence[str], groups: Mapping[str, Sequence[str]]) -> None:
    """Hydra names an unknown choice in a paragraph and without the nearest one."""
    for override in overrides:
        key, equals, value = override.lstrip("+~").partition("=")
        if not equals and not override.startswith("~"):
            raise UserError(f"found '{override}'; expected KEY=VALUE such as model=clip or train.pretrain.steps=100")
        for choice in re.findall(r"[\w.-]+", value) if key in groups else ():
            if choice not in groups[key]:
                raise UserError(f"found {override}; expected {key} from {', '.join(groups[key])}"
                                f"{nearest(choice, groups[key])}; choose one or add configs/{key}/{choice}.yaml")


def _settable(override: str) -> str:
    """Let a value be set that its config file leaves at its default; what no config knows fails in validation."""
    key = override.partition("=")[0]
    return f"++{override}" if "." in key and key[0] not in "+~" else override


def read_params(path: Path = Path(PARAMS)) -> dict[str, Any]:
    """Read params.yaml, the record of what this workspace runs."""
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        message = f"found no {path} in {Path.cwd()}; run from the workspace, or `vlmpipe compose` first"
        raise UserError(message) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not yaml: {' '.join(str(error).split())}; mend it, or write it anew with "
                        f"`vlmpipe compose`") from None
    if not isinstance(params, dict):
        raise UserError(f"{path}: found {type(params).__name__}; expected a mapping; write it with `vlmpipe compose`")
    return params


def write_params(params: dict[str, Any], path: Path = Path(PARAMS)) -> bool:
    """Write params.yaml if it says something else now; returns whether it did."""
    if path.exists() and _says(path, params):
        return False
    write_bytes_atomic(path, yaml.safe_dump(params, sort_keys=False, allow_unicode=True).encode())
    return True


def _says(path: Path, params: dict[str, Any]) -> bool:
    try:
        return read_params(path) == params
    except UserError:  # it is no yaml: to be replaced
        return False
