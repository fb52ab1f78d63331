"""The table of stages: it fits the functions, the configs fit it, and a stage runs only behind its gate."""

import copy
import inspect
from dataclasses import dataclass, replace

import pytest

from vlmpipe.compose import compose
from vlmpipe.dispatch import Cluster
from vlmpipe.errors import UserError
from vlmpipe.publish import Registry, Version
from vlmpipe.shards import write_json
from vlmpipe.stages import STAGES, Stage, resolve, run_stage, section, validate


@pytest.fixture(scope="module")
def composed():
    return compose("scenes")


@pytest.fixture
def params(composed):
    return copy.deepcopy(composed)


@pytest.mark.parametrize("name", STAGES)
def test_a_stages_function_takes_what_the_table_says(name):
    stage = STAGES[name]
    given = {*stage.paths, *stage.configs} - {*stage.verdicts}
    given |= {"name"} if stage.named else set()
    given |= {"cluster"} if stage.cluster else set()
    taken = inspect.signature(resolve(stage.run)).parameters
    assert set(taken) == given
    assert {*stage.several, *stage.optional, *stage.verdicts} <= {*stage.paths}


def test_a_section_is_found_by_its_path(params):
    assert section(params, "curation.select", "params.yaml") == params["curation"]["select"]


@pytest.mark.parametrize("path, said", [
    ("curatoin.select", r"^params.yaml: found no section 'curatoin'; did you mean 'curation'\?; expected one of: "),
    ("curation.selct", r"^params.yaml: curation: found no section 'selct'; did you mean 'select'\?"),
    ("profile.x", r"^params.yaml: profile: found no section 'x'; expected one of: nothing"),
])
def test_a_missing_section_is_named_with_the_nearest(params, path, said):
    with pytest.raises(UserError, match=said):
        section(params, path, "params.yaml")


@pytest.mark.parametrize("place, value, said", [
    ("curatoin", {"select": {}}, "configs: unknown key 'curatoin'; did you mean 'curation'"),
    ("curation.selct", {"min": 1}, "configs: unknown key 'curation.selct'; did you mean 'select'"),
    ("clusters", {"workers": 2}, "configs: unknown key 'clusters'; did you mean 'cluster'"),
    ("gates.data.rules.kept.least", 1, "configs: gates.data.rules.kept: unknown key 'least'"),
    ("pool.scenes.thread", 4, "configs: pool.scenes: unknown key 'thread'; did you mean 'threads'"),
    ("pool.other", {"columns": {}}, "configs: pool.other: missing key 'urls'"),
    ("cluster.workers", "two", "configs: cluster.workers: found str 'two'; expected int"),
    ("publish.tagg", True, "configs: publish: unknown key 'tagg'"),
])
def test_what_no_stage_reads_is_refused(params, place, value, said):
    *parents, last = place.split(".")
    inner = params
    for key in parents:
        inner = inner.setdefault(key, {})
    inner[last] = value
    with pytest.raises(UserError) as refused:
        validate(params, "configs")
    assert str(refused.value).startswith(said)


# --- running one -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Settings:
    depth: int = 1


calls: list[dict] = []


def record(**keywords) -> None:
    calls.append(keywords)


@pytest.fixture
def stage(monkeypatch):
    """A stage of this file: `record`, configured by the section `fake.NAME`."""
    calls.clear()
    configs = {"config": ("fake.{name}", f"{__name__}:Settings")}
    made = Stage(f"{__name__}:record", ("verdict", "out"), configs, named=True, cluster=True, verdicts=("verdict",))
    monkeypatch.setitem(STAGES, "fake", made)
    return {"fake": {"small": {"depth": 2}}, "cluster": {"backend": "inline"}}


def test_a_stage_runs_on_paths_config_name_and_cluster(stage, tmp_path):
    write_json(tmp_path / "verdict.json", {"passed": True})
    paths = {"verdict": tmp_path / "verdict.json", "out": tmp_path / "out"}
    run_stage("fake", "small", paths, stage, "params.yaml")
    assert calls == [{
        "out": tmp_path / "out", "config": Settings(2), "name": "small", "cluster": Cluster(backend="inline"),
    }]


def test_a_stage_that_rescores_gets_the_champion_that_the_file_names(stage, tmp_path, monkeypatch):
    monkeypatch.setitem(STAGES, "fake", replace(STAGES["fake"], paths=("champion",), verdicts=(), rescores=True))
    monkeypatch.setattr(Registry, "__init__", lambda self, root, params: setattr(self, "name", "vlm-toy"))
    monkeypatch.setattr(Registry, "versions", [Version("v0.0.1", "a", None, None, None)])
    monkeypatch.setattr(Registry, "materialise", lambda self, version: tmp_path / version.name)
    path = tmp_path / "champion.json"
    run_stage("fake", "small", {"champion": path}, stage, "params.yaml")
    write_json(path, {"version": "v0.0.1"})
    run_stage("fake", "small", {"champion": path}, stage, "params.yaml")
    assert [call["champion"] for call in calls] == [None, ("v0.0.1", tmp_path / "v0.0.1")]
    write_json(path, {"version": "v0.0.2"})
    with pytest.raises(UserError, match=r"found version 'v0.0.2'; did you mean 'v0.0.1'\?; expected one of vlm-toy"):
        run_stage("fake", "small", {"champion": path}, stage, "params.yaml")


@pytest.mark.parametrize("verdict", [{"passed": False}, {"passed": "yes"}, {}])
def test_behind_a_gate_that_did_not_pass_nothing_runs(stage, tmp_path, verdict):
    write_json(tmp_path / "verdict.json", verdict)
    paths = {"verdict": tmp_path / "verdict.json", "out": tmp_path / "out"}
    with pytest.raises(UserError, match=r"verdict.json: found passed=.*; expected a gate that passed"):
        run_stage("fake", "small", paths, stage, "params.yaml")
    assert calls == []
