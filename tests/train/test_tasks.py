"""Every preset trains and is evaluated on its task through the stages, as the pipeline runs them; and what a batch of
each kind of record holds."""

from pathlib import Path

import pyarrow as pa
import pytest
import torch

from vlmpipe.compose import compose
from vlmpipe.config import parse
from vlmpipe.data.task import TaskConfig
from vlmpipe.data.task_world import write_tasks
from vlmpipe.dispatch import Cluster
from vlmpipe.errors import UserError
from vlmpipe.evaluate.tasks import evaluate
from vlmpipe.models.vlm import VLMConfig
from vlmpipe.shards import read_json, write_manifest, write_table
from vlmpipe.stages import STAGES, configs, validate
from vlmpipe.train.stages import finetune, pretrain
from vlmpipe.train.tasks import read_task

CONFIGS = Path(__file__).parents[2] / "configs"
INLINE = Cluster(backend="inline", threads=1)
QUICK = [
    f"train.{stage}.{key}={value}"
    for stage in ("pretrain", "finetune") for key, value in {"steps": 2, "batch_size": 4}.items()
] + [f"evaluate.{stage}.{key}" for stage in ("pretrain", "finetune") for key in ("limit=4", "attention_samples=1")]


def make(name: str, *overrides: str) -> dict:
    """The params of profile=scenes with this model, to be run in two steps."""
    params = compose("scenes", [f"model={name}", *overrides, *QUICK], CONFIGS)
    validate(params, name)
    return params


PRESETS = [path.stem for path in sorted((CONFIGS / "model").glob("*.yaml"))]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("tasks")
    write_tasks(root / "tasks", 8, seed=0)
    source = read_task(root / "tasks" / "captions" / "train", TaskConfig("coco_captions"))
    rows = [
        {"uid": f"{number:032x}", "caption": record.captions[0], "image": {"bytes": data, "path": None}}
        for number, (record, data) in enumerate(zip(source.records, source.encoded, strict=True))
    ]
    for split in ("train", "test"):
        write_table(root / "packed" / split / "part-00000.parquet", pa.Table.from_pylist(rows))
    write_manifest(root / "packed", "packed", [])
    return root


def place(world: Path, params: dict) -> Path:
    return world / "tasks" / Path(params["task"]["path"]).name


def run(world: Path, out: Path, params: dict) -> dict:
    """Both trainings and evaluations; the metrics of both."""
    parsed = {
        (stage, name): configs(STAGES[stage], params, name, "test")
        for stage, name in (("pretrain", None), ("finetune", None), ("evaluate", "pretrain"), ("evaluate", "finetune"))
    }
    packed, questions, models = world / "packed", place(world, params), out / "models"
    pretrain(packed, world / "scorer", models / "pretrain", out / "p", **parsed["pretrain", None], cluster=INLINE)
    finetune(
        models / "pretrain", questions, packed, models / "finetune", out / "f", **parsed["finetune", None],
        cluster=INLINE,
    )
    for name in ("pretrain", "finetune"):
        evaluate(
            name, models / name, packed, questions, out / "evaluation" / name, out / f"{name}.json",
            **parsed["evaluate", name], cluster=INLINE,
        )
    return {name: read_json(out / f"{name}.json")["metrics"] for name in ("pretrain", "finetune")}


def judged(params: dict, stage: str) -> set[str]:
    """The metrics that the gate asks for."""
    return {rule["metric"] for rule in params["gates"][stage]["rules"].values() if rule}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_on_its_task_and_is_measured_by_what_its_gates_ask(name, world, tmp_path):
    params = make(name)
    if parse(VLMConfig, params["model"]["architecture"], name).text.transformer.width > 128:
        pytest.skip("of published size: it composes, see tests/models/published for its shape")
    found = run(world, tmp_path, params)
    for stage, metrics in found.items():
        assert judged(params, stage) <= set(metrics), name


@pytest.mark.parametrize("name, task, metric", [
    ("vilt", "statements", "statements.consistency"),
    ("vilt", "classes", "classification.accuracy"),
    ("llava", "statements", "statements.accuracy"),
    ("qwen2.5-vl", "clips", "vqa.accuracy"),
    ("flamingo", "clips", "vqa.accuracy"),
    ("llava", "classes", "classification.accuracy"),
    ("clip", "classes", "classification.accuracy"),
    ("clip", "clevr", "vqa.accuracy"),
    ("vilbert", "unanswerable", "vqa.accuracy"),
    ("detector", "regions", "referring.accuracy"),
    ("clipseg", "detection", "segmentation.iou"),
])
def test_a_model_takes_other_tasks(name, task, metric, world, tmp_path):
    tasks = [metric.partition(".")[0]]
    overrides = [f"task={task}", f"evaluate.finetune.tasks=[{','.join(tasks)}]", "train.finetune.captions=false"]
    found = run(world, tmp_path, make(name, *overrides))["finetune"]
    assert metric in found
    assert {f"{metric}_wrong_image", f"{metric}_blind"} <= set(found)


def test_too_many_pictures_for_a_row_are_named(world, tmp_path):
    overrides = ["task=clips", "train.finetune.captions=false"]
    with pytest.raises(UserError, match=r"found 96 for 4 pictures of 25 tokens; expected at least 116; raise"):
        run(world, tmp_path, make("llava", *overrides))


def test_a_dual_encoder_reads_no_pairs_of_pictures(world, tmp_path):
    with pytest.raises(UserError, match=r"found 2 pictures in a row; expected a model with heads.language_model or"):
        run(world, tmp_path, make("clip", "task=statements"))
