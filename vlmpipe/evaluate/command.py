"""`python -m vlmpipe evaluate MODEL --task NAME`: any model on one task, as a table, by the stage's own code."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from vlmpipe import compose
from vlmpipe.cluster import Cluster
from vlmpipe.config import nearest, parse
from vlmpipe.data.task import TaskConfig
from vlmpipe.errors import UserError
from vlmpipe.evaluate.compare import resample
from vlmpipe.evaluate.lmms_files import write_lmms
from vlmpipe.evaluate.store import read_scores
from vlmpipe.evaluate.tasks import TASKS, EvaluateConfig, evaluate
from vlmpipe.evaluate.tasks.base import TaskName
from vlmpipe.models.directory import is_model
from vlmpipe.models.pretrained.load import locate
from vlmpipe.shards import read_json
from vlmpipe.stages import section

CHAMPION = "champion"
FORMATS = {"lmms-eval": write_lmms}


@dataclass(frozen=True)
class Row:
    """A metric, its 95% interval where it is made of samples, and how many."""

    metric: str
    value: float
    interval: tuple[float, float] | None
    n: int


def run(
    model: str, task: str, data: Path | None = None, reader: str | None = None, limit: int | None = None,
    out: Path | None = None, batch_size: int | None = None, device: str | None = None,
    export: tuple[str, Path] | None = None,
) -> tuple[list[Row], Path]:
    """Score a model on a task; returns what a table shows and the folder with samples.parquet and metrics.json.

    Args:
        model: a model directory, a Hugging Face directory or hub id, or `champion`.
        data: the folder whose `test/` holds the task's official files, or a packed dataset for the tasks that read
            one; None: what params.yaml says.
        reader: of the files' format; None: VQAv2's, or with params.yaml's data its own.
        limit, batch_size: None: what params.yaml says of its own data, else all and `EvaluateConfig`'s.
        export: a name of FORMATS, and the folder that gets such files.

    Raises:
        UserError: an unknown task or format, no data, or a model that can't be read or can't do the task.
    """
    if task not in TASKS:
        known = get_args(TaskName)
        raise UserError(f"--task: found '{task}'{nearest(task, known)}; expected one of {', '.join(known)}")
    if export is not None and export[0] not in FORMATS:
        raise UserError(f"--export: found '{export[0]}'; expected one of {', '.join(FORMATS)}")
    params = compose.read_params() if data is None else None
    config = settings(task, params, {"limit": limit, "batch_size": batch_size})
    folder, files = place(task, data, reader) if params is None else place_of(task, params)
    directory = find_model(model)
    out = out or Path("evaluations") / f"{directory.name if model != CHAMPION else CHAMPION}-{task}"
    use(device)
    evaluate(task, directory, folder, folder, out, out / "metrics.json", config, Cluster(backend="inline"), files)
    if export is not None:
        FORMATS[export[0]](out, export[1], model, task)
    return table(out), out


def find_model(name: str) -> Path:
    """The directory of a model by its path, its hub id or as the champion."""
    if name == CHAMPION:
        from vlmpipe.publish import champion_model

        return champion_model(compose.read_params())
    return Path(name) if is_model(Path(name)) else locate(name)


def use(device: str | None) -> None:
    """Have this process see that device alone.

    Raises:
        UserError: no such device.
    """
    if device is None:
        return
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not (kind == "cuda" and number.isdigit())):
        raise UserError(f"--device: found '{device}'; expected cpu, cuda or cuda:N")
    if kind == "cpu" or number:
        os.environ["CUDA_VISIBLE_DEVICES"] = number
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device: found no {device} on this machine; expected one; leave --device out")


def settings(task: str, params: Mapping[str, Any] | None, chosen: Mapping[str, int | None]) -> EvaluateConfig:
    """How the stage after fine-tuning asks this task, with what was chosen; the defaults where params.yaml isn't read.

    Raises:
        UserError: nobody would judge what is drawn.
    """
    config = EvaluateConfig() if params is None else configured(EvaluateConfig, params, "evaluate.finetune")
    if task == "text_to_image" and config.drawing.scorer is None:
        raise UserError("--task: found text_to_image, and no evaluate.finetune.drawing.scorer; expected a dual encoder "
                        "to judge what is drawn; name one in params.yaml and leave --data out")
    given = {key: value for key, value in chosen.items() if value is not None}
    return replace(config, tasks=(task,), attention_samples=0, cost_samples=0, **given)


def place(task: str, data: Path, reader: str | None) -> tuple[Path, TaskConfig]:
    """The folder of a task's data, and how its files are read."""
    if not (data / "test").is_dir():
        kind = "a packed dataset" if TASKS[task].packed else "official files"
        raise UserError(f"{data}: found no folder test/; expected one with {kind}; give the folder that holds it")
    # Folders of classes are the pictures; other files stand beside theirs.
    return data, TaskConfig(reader or TaskConfig.reader, images="." if reader == "folders" else TaskConfig.images)


def place_of(task: str, params: Mapping[str, Any]) -> tuple[Path, TaskConfig]:
    """The same as params.yaml says it."""
    files = configured(TaskConfig, params, "task")
    return (Path(params["root"]) / "packed" if TASKS[task].packed else Path(files.path)), files


def configured(kind: type, params: Mapping[str, Any], path: str) -> Any:
    return parse(kind, section(params, path, compose.PARAMS), f"{compose.PARAMS}: {path}")


# --- the table ---------------------------------------------------------------------------------------------

def table(out: Path, alpha: float = 0.05) -> list[Row]:
    """A row for each metric of an evaluation's folder."""
    found, store = read_json(out / "metrics.json"), read_scores(out)
    rows = []
    for metric, value in found["metrics"].items():
        interval = None
        if metric in store.metrics:
            scored = store.scored(metric)
            if len(set(scored.clusters_N.tolist())) > 1:  # one picture says nothing about others
                interval = resample(scored, store.evaluation["seed"]).interval(alpha)
        rows.append(Row(metric, value, interval, found["n"].get(metric, 0)))
    return rows


def show(rows: list[Row]) -> str:
    lines = [("metric", "value", "95% interval", "n")]
    for row in rows:
        ends = "" if row.interval is None else f"[{number(row.interval[0])}, {number(row.interval[1])}]"
        lines.append((row.metric, number(row.value), ends, str(row.n)))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        f"{name:<{widths[0]}}  {value:>{widths[1]}}  {ends:<{widths[2]}}  {n:>{widths[3]}}"
        for name, value, ends, n in lines
    )


def number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) and abs(value) < 1000 else f"{value:.4g}"


def options_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """What was typed, as `run` takes it."""
    names = ("model", "task", "data", "reader", "limit", "out", "batch_size", "device")
    export = options["export"]
    return {**{name: options[name] for name in names}, "export": export and (export[0], Path(export[1]))}
