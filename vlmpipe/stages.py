"""The one table of stages: what each runs, which paths it takes, which section of params.yaml configures it."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmpipe.config import nearest, parse
from vlmpipe.errors import UserError
from vlmpipe.shards import read_json

# Sections of params.yaml that say where things are or run; the others belong to stages.
PLACES = {"profile", "root", "results", "trusted", "questions", "cluster", "publish"}


@dataclass(frozen=True)
class Stage:
    """A function of paths and configs.

    `run` is `module:function`. `configs` maps a keyword of the function to (section, `module:class`); a section
    may hold `{name}`. `paths` become `--flags`, those in `several` take more than one. `verdicts` are paths that the
    function doesn't take: the stage runs only behind a gate that passed. `rescores`: the function takes `champion` not
    as the path of champion.json but as what that names: its version and model directory.
    """

    run: str
    paths: tuple[str, ...]
    configs: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    named: bool = False
    cluster: bool = False
    several: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    verdicts: tuple[str, ...] = ()
    rescores: bool = False

    @property
    def module(self) -> str:
        return self.run.partition(":")[0]


STAGES = {
    "world": Stage(
        "vlmpipe.data.world:build", ("out",), {"config": ("world.{name}", "vlmpipe.data.world:WorldConfig")},
        named=True,
    ),
    "download": Stage(
        "vlmpipe.curate.fetch:download", ("urls", "out", "state"),
        {"config": ("pool.{name}", "vlmpipe.curate.pool:PoolConfig")}, named=True, cluster=True,
    ),
    "scorer": Stage(
        "vlmpipe.train.stages:train_scorer", ("trusted", "out", "state"),
        {"config": ("train.scorer", "vlmpipe.train.stages:ScorerConfig")}, cluster=True,
    ),
    "annotate": Stage(
        "vlmpipe.curate.annotate:annotate", ("pool", "scorer", "out"),
        {"config": ("curation.annotate", "vlmpipe.curate.annotate:AnnotateConfig")}, named=True, cluster=True,
    ),
    "select": Stage(
        "vlmpipe.curate.filters:select", ("pools", "annotations", "questions", "out"),
        {"config": ("curation.select", "vlmpipe.curate.filters:SelectConfig")},
    ),
    "audit": Stage(
        "vlmpipe.curate.audit:audit", ("pools", "annotations", "selection", "questions", "champion", "out"),
        {"config": ("audit", "vlmpipe.curate.audit:AuditConfig")}, optional=("champion",),
    ),
    "gate": Stage(
        "vlmpipe.evaluate.gate:gate", ("metrics", "samples", "costs", "champion", "waivers", "lock", "out"),
        {"config": ("gates.{name}", "vlmpipe.evaluate.rules:GateConfig")},
        named=True, several=("metrics",), optional=("samples", "costs", "champion", "waivers", "lock"),
    ),
    "pack": Stage(
        "vlmpipe.curate.pack:pack", ("pools", "annotations", "selection", "bias", "verdict", "out"),
        {"config": ("curation.pack", "vlmpipe.curate.pack:PackConfig")}, optional=("bias",), verdicts=("verdict",),
    ),
    "pretrain": Stage(
        "vlmpipe.train.stages:pretrain", ("packed", "scorer", "out", "state"),
        {
            "model": ("model.architecture", "vlmpipe.models.vlm:VLMConfig"),
            "config": ("train.pretrain", "vlmpipe.train.loop:TrainConfig"),
        },
        cluster=True,
    ),
    "evaluate": Stage(
        "vlmpipe.evaluate.tasks:evaluate", ("model", "packed", "questions", "champion", "out", "metrics", "state"),
        {
            "config": ("evaluate.{name}", "vlmpipe.evaluate.tasks:EvaluateConfig"),
            "task": ("task", "vlmpipe.data.task:TaskConfig"),
        },
        named=True, cluster=True, optional=("champion", "state"), rescores=True,
    ),
    "finetune": Stage(
        "vlmpipe.train.stages:finetune", ("init", "questions", "packed", "verdict", "out", "state"),
        {
            "config": ("train.finetune", "vlmpipe.train.loop:TrainConfig"),
            "task": ("task", "vlmpipe.data.task:TaskConfig"),
        },
        cluster=True, verdicts=("verdict",),
    ),
    "report": Stage(
        "vlmpipe.report.page:report", ("root", "results", "out"),
        {
            "config": ("report", "vlmpipe.report.page:ReportConfig"),
            "bias": ("audit.bias", "vlmpipe.curate.bias:BiasConfig"),
            "task": ("task", "vlmpipe.data.task:TaskConfig"),
        },
    ),
}


def resolve(reference: str) -> Any:
    """Import `module:attribute`."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


def section(params: Mapping[str, Any], path: str, where: str) -> Any:
    """The value at a dotted path.

    Raises:
        UserError: there is none; the nearest known name is named.
    """
    value: Any = params
    walked = where
    for key in path.split("."):
        if not isinstance(value, Mapping) or key not in value:
            known = list(value) if isinstance(value, Mapping) else []
            listed = ", ".join(map(str, known)) or "nothing"
            raise UserError(f"{walked}: found no section '{key}'{nearest(key, known)}; expected one of: {listed}")
        value, walked = value[key], f"{walked}.{key}" if walked != where else f"{where}: {key}"
    return value


def configs(stage: Stage, params: Mapping[str, Any], name: str | None, where: str) -> dict[str, Any]:
    """Parse every config that `stage` takes for the instance `name`."""
    found = {}
    for keyword, (pattern, cls) in stage.configs.items():
        path = pattern.format(name=name)
        found[keyword] = parse(resolve(cls), section(params, path, where), f"{where}: {path}")
    return found


def validate(params: Mapping[str, Any], where: str = "params.yaml") -> None:
    """Parse all of params.yaml as the stages would.

    Raises:
        UserError: the first unknown section or key, missing key or wrong value, with its path and nearest name.
    """
    claimed = _claims(params)
    _refuse_unclaimed(params, claimed, where, "")
    for stage, name in claimed.values():
        configs(stage, params, name, where)
    parse(resolve("vlmpipe.dispatch:Cluster"), section(params, "cluster", where), f"{where}: cluster")
    parse(resolve("vlmpipe.publish:PublishConfig"), section(params, "publish", where), f"{where}: publish")


def _claims(params: Mapping[str, Any]) -> dict[str, tuple[Stage, str | None]]:
    """Every section path that some stage parses, with the stage and its instance name."""
    claims = {}
    for stage in STAGES.values():
        for path, _ in stage.configs.values():
            if path.endswith(".{name}"):
                group = params.get(path.partition(".")[0])
                for name in group if isinstance(group, Mapping) else ():
                    claims[path.format(name=name)] = (stage, name)
            else:
                claims[path] = (stage, None)
    return claims


def _refuse_unclaimed(tree: Mapping[str, Any], claimed: Mapping, where: str, prefix: str) -> None:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if path in claimed or path in PLACES or path == "model.expected":
            continue
        inner = [claim for claim in claimed if claim.startswith(path + ".")]
        if inner and isinstance(value, Mapping):
            _refuse_unclaimed(value, claimed, where, path + ".")
        elif not (value == {} or inner):
            known = sorted({claim[len(prefix):].partition(".")[0] for claim in claimed if claim.startswith(prefix)})
            known += [] if prefix else sorted(PLACES)
            raise UserError(f"{where}: unknown key '{path}'{nearest(key, known)}; expected one of: {', '.join(known)}")


def run_stage(
    stage_name: str, name: str | None, paths: Mapping[str, Any], params: Mapping[str, Any], where: str
) -> None:
    """Run one stage on `paths` (keyword -> Path or list of Paths) with its configs from `params`."""
    stage = STAGES[stage_name]
    _refuse_unclaimed(params, _claims(params), where, "")
    keywords = {key: value for key, value in paths.items() if key not in stage.verdicts}
    keywords |= configs(stage, params, name, where)
    if stage.cluster:
        cluster = section(params, "cluster", where)
        keywords["cluster"] = parse(resolve("vlmpipe.dispatch:Cluster"), cluster, f"{where}: cluster")
    if stage.named:
        keywords["name"] = name
    for flag in stage.verdicts:
        _require_pass(Path(paths[flag]))
    if stage.rescores:
        keywords["champion"] = _champion(paths.get("champion"), params)
    resolve(stage.run)(**keywords)


def _champion(path: Path | None, params: Mapping[str, Any]) -> tuple[str, Path] | None:
    """Version and model directory of the champion that champion.json names; None where there is none yet."""
    if path is None or not Path(path).exists():
        return None
    from vlmpipe.publish import Registry

    registry, said = Registry(Path.cwd(), params), read_json(path).get("version")
    version = next((known for known in registry.versions if known.name == said), None)
    if version is None:
        names = [known.name for known in registry.versions]
        raise UserError(f"{path}: found version '{said}'{nearest(said, names)}; expected one of {registry.name}: "
                        f"{', '.join(names) or 'none yet'}; fetch the tags (`git fetch --tags`), or roll back")
    return version.name, registry.materialise(version)


def _require_pass(verdict: Path) -> None:
    """DVC orders a stage behind its gate; this holds also when somebody runs the stage by hand."""
    passed = read_json(verdict).get("passed")
    if passed is not True:
        raise UserError(f"{verdict}: found passed={passed}; expected a gate that passed; see its rules there")
