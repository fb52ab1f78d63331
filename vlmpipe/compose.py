"""Config groups to params.yaml: the same Hydra composition that `dvc exp run -S` does, by hand and validated."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from vlmpipe.errors import UserError
from vlmpipe.shards import write_bytes_atomic

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

    try:
        with initialize_config_dir(str(directory.resolve()), version_base=None):
            config = hydra_compose("config", overrides=[f"profile={profile}", *map(_settable, overrides)])
        return OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        first = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        choices = ", ".join(sorted(path.stem for path in (directory / "profile").glob("*.yaml")))
        raise UserError(
            f"can't compose profile={profile} {' '.join(overrides)}: {first}; profiles: {choices}; see {directory}/"
        ) from None


def _settable(override: str) -> str:
    """Let a value be set that its config file leaves at its default; what no config knows fails in validation."""
    key = override.partition("=")[0]
    return f"++{override}" if "." in key and key[0] not in "+~" else override


def read_params(path: Path = Path(PARAMS)) -> dict[str, Any]:
    """Read params.yaml, the record of what this workspace runs."""
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"found no {path} in {Path.cwd()}; run from the workspace, or `vlmpipe compose` first") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not yaml: {' '.join(str(error).split())}; mend it, or write it anew with "
                        f"`vlmpipe compose`") from None
    if not isinstance(params, dict):
        raise UserError(f"{path}: found {type(params).__name__}; expected a mapping; recompose it")
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
