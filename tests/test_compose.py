"""Config groups to params.yaml."""

from pathlib import Path

import pytest

from vlmpipe.compose import compose, read_params, write_params
from vlmpipe.errors import UserError
from vlmpipe.stages import validate

CONFIGS = Path(__file__).parents[1] / "configs"
CHOICES = sorted((path.parent.name, path.stem) for path in CONFIGS.glob("*/*.yaml"))


@pytest.mark.parametrize("group, choice", CHOICES)
def test_every_file_of_configs_composes_to_what_the_stages_take(group, choice):
    if group == "profile":
        params = compose(choice, directory=CONFIGS)
        assert params["profile"] == choice
    else:
        params = compose("scenes", [f"{group}=[{choice}]" if group == "pool" else f"{group}={choice}"], CONFIGS)
    validate(params, "configs")


def test_a_task_brings_its_gates_unless_the_model_does():
    asked = {
        (model, task): compose("scenes", [f"model={model}", f"task={task}"], CONFIGS)["gates"]["finetune"]["rules"]
        for model, task in (("llava", "classes"), ("vilt", "classes"), ("clipseg", "regions"))
    }
    assert asked["llava", "classes"]["accuracy"]["metric"] == "classification.accuracy"
    assert asked["vilt", "classes"]["accuracy"]["metric"] == "vqa.accuracy"
    assert asked["clipseg", "regions"]["iou"]["metric"] == "segmentation.iou"


def test_a_pool_of_its_own_stands_beside_the_others():
    params = compose("scenes", ["pool=[scenes,more]"], CONFIGS)
    assert list(params["pool"]) == ["scenes", "more"]
    assert params["pool"]["more"]["urls"] == f"{params['root']}/world/scenes/pools/more.parquet"


def test_a_value_can_be_set_that_no_file_mentions():
    assert "jpeg_quality" not in compose("scenes", directory=CONFIGS)["pool"]["scenes"]
    params = compose("scenes", ["pool.scenes.jpeg_quality=80"], CONFIGS)
    assert params["pool"]["scenes"]["jpeg_quality"] == 80
    validate(params, "configs")


def test_a_value_that_nobody_knows_composes_and_is_named_by_validation():
    params = compose("scenes", ["pool.scenes.jpeg_qualty=80"], CONFIGS)
    with pytest.raises(UserError, match=r"pool.scenes: unknown key 'jpeg_qualty'; did you mean 'jpeg_quality'"):
        validate(params, "configs")


def test_a_value_can_be_taken_away():
    assert "deadline" not in compose("scenes", ["~pool.scenes.deadline"], CONFIGS)["pool"]["scenes"]


def test_another_root_moves_everything_below_it():
    params = compose("scenes", ["root=/elsewhere"], CONFIGS)
    assert params["pool"]["scenes"]["urls"].startswith("/elsewhere/world/")


@pytest.mark.parametrize("profile, overrides, said", [
    ("scnes", [], r"^found profile=scnes; expected profile from .*scenes.*; did you mean 'scenes'\?; choose one "),
    ("scenes", ["model=clop"], r"^found model=clop; expected model from .*clip.*; did you mean 'clip'"),
    ("scenes", ["model"], "^found 'model'; expected KEY=VALUE"),
    ("scenes", ["modle=clip"], "^can't compose profile=scenes modle=clip: .*did you mean 'model'"),
    ("scenes", ["report.wall=${nothing}"], "^can't compose profile=scenes .*nothing"),
])
def test_what_does_not_compose_is_named(profile, overrides, said):
    with pytest.raises(UserError, match=said) as refused:
        compose(profile, overrides, CONFIGS)
    assert "\n" not in str(refused.value)


def test_params_are_written_when_they_say_something_else(tmp_path):
    path = tmp_path / "params.yaml"
    params = {"root": "data/x", "title": "größer", "pool": {"b": 1, "a": 2}}
    assert write_params(params, path)
    written = path.read_bytes()
    assert read_params(path) == params and list(read_params(path)["pool"]) == ["b", "a"]
    path.write_bytes(b"# a remark\n" + written)
    assert not write_params(params, path)
    assert path.read_bytes().startswith(b"# a remark")
    assert write_params(params | {"root": "data/y"}, path)
    assert read_params(path)["root"] == "data/y"
