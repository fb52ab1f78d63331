"""dvc.yaml is held to the code: a forgotten dependency would mean stale results."""

import ast
import shlex
from pathlib import Path

import pytest
from dvc.repo import Repo

from vlmpipe.stages import STAGES

ROOT = Path(__file__).parents[1]
OUTPUTS = {"out"}
# Neither in nor out for DVC: work in progress, seconds and memory (other ones each time), the champion that a gate
# compares with, its waivers, and DVC's own record of what led to it (see docs/architecture.md).
UNTRACKED = {"state", "costs", "champion", "waivers", "lock"}


@pytest.fixture(scope="module")
def stages():
    return {stage.name: stage for stage in Repo(str(ROOT)).index.stages}


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", [stage.name for stage in Repo(str(ROOT)).index.stages])


def command(stage):
    """(table entry, instance name, {flag: [paths]}) of a stage's cmd."""
    words = shlex.split(stage.cmd)
    assert words[:3] == ["python", "-m", "vlmpipe"], stage.cmd
    entry, rest = STAGES[words[3]], words[4:]
    name = rest.pop(0) if entry.named else None
    flags: dict[str, list[str]] = {}
    for word in rest:
        if word.startswith("--"):
            current = flags.setdefault(word[2:], [])
        else:
            current.append(word)
    return entry, name, flags


def closure(module: str, seen: set[str] | None = None) -> set[str]:
    """Files of vlmpipe that importing `module` can reach, lazy imports included; empty files don't count."""
    seen = set() if seen is None else seen
    path = module_file(module)
    if path is None or path in seen:
        return seen
    seen.add(path)
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and ":" in node.value:
            names = [node.value.partition(":")[0]]  # a table of "module:attribute"
        else:
            continue
        for name in names:
            if name.startswith("vlmpipe."):
                closure(name, seen)
    return seen


def module_file(module: str) -> str | None:
    path = Path(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if (ROOT / candidate).is_file() and (ROOT / candidate).stat().st_size:
            return str(candidate)
    return None


def code_of(entry) -> set[str]:
    modules = [entry.module, *(cls.partition(":")[0] for _, cls in entry.configs.values())]
    files: set[str] = set()
    for module in modules:
        closure(module, files)
    return files


def expand(path: str) -> set[str]:
    """A dep on a folder of code stands for the files in it."""
    if (ROOT / path).is_dir():
        return {str(p.relative_to(ROOT)) for p in (ROOT / path).rglob("*.py") if p.stat().st_size}
    return {path}


def test_every_stage_command_is_in_the_dag(stages):
    assert {shlex.split(stage.cmd)[3] for stage in stages.values()} == set(STAGES)


def test_flags_are_the_stage_functions_paths(name, stages):
    entry, _, flags = command(stages[name])
    assert set(flags) - set(entry.optional) == set(entry.paths) - set(entry.optional)


def test_deps_and_outs_are_the_commands_paths(name, stages):
    stage = stages[name]
    entry, _, flags = command(stage)
    outputs = {path for flag in flags if flag in outputs_of(entry) for path in flags[flag]}
    inputs = {path for flag in flags if flag not in outputs_of(entry) | UNTRACKED for path in flags[flag]}
    deps = {dep.def_path for dep in stage.deps if not dep.def_path.endswith(".py") and "vlmpipe" not in dep.def_path}
    deps -= {"params.yaml"}
    assert {out.def_path for out in stage.outs} == outputs
    if name == "report":  # reads what it finds below two roots: each stage's outs are named
        assert all(any(dep.startswith(root + "/") for root in inputs) for dep in deps) and deps
    else:
        assert deps == inputs


def outputs_of(entry) -> set[str]:
    return OUTPUTS | ({"metrics"} if "metrics" in entry.paths and "metrics" not in entry.several else set())


def test_params_are_the_sections_that_the_stage_parses(name, stages):
    entry, instance, _ = command(stages[name])
    sections = {path.format(name=instance) for path, _ in entry.configs.values()}
    params = {dep.def_path: set(dep.params) for dep in stages[name].deps if hasattr(dep, "params")}
    assert params.pop("params.yaml", set()) == sections
    # Of a verdict, only whether it passed: other numbers in it, or a waiver, don't make stale what stands behind it.
    assert all(taken == {"passed"} for taken in params.values())
    assert {Path(path).name for path in params} <= {"verdict.json"}


def test_code_deps_are_the_import_closure(name, stages):
    entry, _, _ = command(stages[name])
    listed = [dep.def_path for dep in stages[name].deps if dep.def_path.startswith("vlmpipe")]
    found = set().union(*(expand(path) for path in listed)) if listed else set()
    expected = code_of(entry)
    assert found == expected, f"{name} should list:\n" + "\n".join(f"        - {p}" for p in sorted(expected))
