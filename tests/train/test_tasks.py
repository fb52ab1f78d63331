"""Every preset trains and is evaluated on its task through the stages, as the pipeline runs them; and what a batch of
each kind of record holds."""

from pathlib import Path

import pyarrow as pa
import pytest
import torch

from benchmarks.zoo import small_presets
from vlmpipe.compose import compose
from vlmpipe.data.task import TaskConfig
from vlmpipe.data.task_world import write_tasks
from vlmpipe.dispatch import Cluster
from vlmpipe.errors import UserError
from vlmpipe.evaluate.rules import COSTS
from vlmpipe.evaluate.tasks import evaluate
from vlmpipe.models import build, load, save
from vlmpipe.shards import read_json, write_manifest, write_table
from vlmpipe.stages import STAGES, configs, validate
from vlmpipe.train.pictures import decode_images
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


def started(world: Path, name: str, params: dict) -> Path:
    """The pretrained preset, made once."""
    model = world / "models" / name
    if not model.exists():
        scorer = configs(STAGES["scorer"], params, None, "test")["config"]  # as it is made, where eyes come from it
        save(*build(scorer.model, ["a red circle"]), world / "scorer")
        config = configs(STAGES["pretrain"], params, None, "test")
        pretrain(world / "packed", world / "scorer", model, world / "state" / name, **config, cluster=INLINE)
    return model


def tuned(world: Path, out: Path, name: str, params: dict) -> Path:
    config, packed = configs(STAGES["finetune"], params, None, "test"), world / "packed"
    init = started(world, name, params)
    finetune(init, place(world, params), packed, out / "model", out / "state", **config, cluster=INLINE)
    return out / "model"


def measured(world: Path, out: Path, stage: str, model: Path, params: dict) -> dict:
    config, packed = configs(STAGES["evaluate"], params, stage, "test"), world / "packed"
    place_of = place(world, params)
    evaluate(stage, model, packed, place_of, out / "evaluation", out / "metrics.json", **config, cluster=INLINE)
    return read_json(out / "metrics.json")["metrics"]


def judged(params: dict, stage: str) -> set[str]:
    """The metrics that the gate asks for, but for costs, which stand in a file of their own."""
    asked = {rule["metric"] for rule in params["gates"][stage]["rules"].values() if rule}
    return {metric for metric in asked if not metric.startswith(COSTS)}


@pytest.mark.parametrize("name", small_presets())
def test_a_preset_trains_on_its_task_and_is_measured_by_what_its_gates_ask(name, world, tmp_path):
    params = make(name)
    models = {"pretrain": started(world, name, params), "finetune": tuned(world, tmp_path, name, params)}
    for stage, model in models.items():
        assert judged(params, stage) <= set(measured(world, tmp_path, stage, model, params))


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
    params = make(name, *overrides)
    found = measured(world, tmp_path, "finetune", tuned(world, tmp_path, name, params), params)
    assert metric in found
    assert {f"{metric}_wrong_image", f"{metric}_blind"} <= set(found)


def test_too_many_pictures_for_a_row_are_named(world, tmp_path):
    overrides = ["task=clips", "train.finetune.captions=false"]
    with pytest.raises(UserError, match=r"found 96 for 4 pictures of 25 tokens; expected at least 116; raise"):
        tuned(world, tmp_path, "llava", make("llava", *overrides))


def test_a_dual_encoder_reads_no_pairs_of_pictures(world, tmp_path):
    with pytest.raises(UserError, match=r"found 2 pictures in a row; expected a model with heads.language_model or"):
        tuned(world, tmp_path, "clip", make("clip", "task=statements"))


def taught(world: Path, name: str, task: str, reader: str):
    """The training data of a task for a preset: its records, processor, dataset and objective."""
    model, processor = load(started(world, name, make(name)))
    source = read_task(world / "tasks" / task / "train", TaskConfig(reader))
    processor.answers = source.answers_for(model)
    images = decode_images(source.images, len(source.images), processor, Path("unused"))
    return (source.records, processor, *source.lessons(images, model, processor, per_row=4))


def test_questions_for_classes_hold_each_answers_score(world):
    records, processor, dataset, objective = taught(world, "vilt", "questions", "vqav2")
    batch = dataset.collate([0, 5])
    known = [processor.answers.index(records[row].answers[0]) for row in (0, 5)]
    assert objective == "answers" and len(dataset) == len(records)
    assert batch["answers"].shape == (2, 64) and batch["answers"].sum() == 2
    assert batch["answers"][[0, 1], known].tolist() == [1, 1]


def test_statements_hold_both_pictures_and_the_verdict(world):
    records, _, dataset, objective = taught(world, "vilt", "statements", "nlvr2")
    batch = dataset.collate([1, 2])
    assert objective == "statements" and batch["image_rows"].tolist() == [0, 0, 1, 1]
    assert batch["statement_labels"].tolist() == [int(record.label) for record in records[1:3]]


def test_detections_ask_for_labels_that_are_not_there_too(world):
    records, _, dataset, objective = taught(world, "detector", "detection", "coco_instances")
    phrases = {(query.image, query.phrase) for _, queries in dataset.rows for query in queries}
    absent = [(image, phrase) for image, phrase in phrases
              if not any(record.image == image and phrase in record.labels for record in records)]
    assert objective == "boxes" and len(absent) == 2 * len(records)


def test_answers_of_a_dual_encoder_are_all_that_were_given(world):
    records, processor, dataset, objective = taught(world, "clip", "questions", "vqav2")
    assert processor.answers == tuple(sorted({record.answers[0] for record in records}))
    assert objective is None and len(dataset) == len(records)
