"""An evaluation in lmms-eval's files: a line of json for each sample, and the results.

    DIR/MODEL/DATE_samples_TASK.jsonl    doc_id, input, target, filtered_resps, token_counts, doc_hash, the metrics
    DIR/MODEL/DATE_results.json          results, configs, versions, n-shot, n-samples, task_hashes, …

Written from lmms-eval 0.7: its `--baseline` and its log viewer read them. Answers stand in `filtered_resps`; `resps`,
which lmms-eval leaves out where they are the same, is left out. Standard errors are those of a bootstrap over pictures.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from vlmpipe.evaluate.compare import lower_is_better, resample
from vlmpipe.evaluate.store import Store, read_scores
from vlmpipe.shards import read_json, write_bytes_atomic

FILTER = "none"  # lmms-eval names metrics "accuracy,none": by what answers were cut out


def write_lmms(evaluation: Path, directory: Path, model: str, task: str, date: str | None = None) -> list[Path]:
    """Write one task of an evaluation's folder; returns the two files.

    Args:
        model: as results name it. date: of the files' names, as 20250131_235959; None: now, in UTC.
    """
    date = date or datetime.now(UTC).strftime("%Y%m%d_%H%M%S")
    store = read_scores(evaluation)
    rows = [row for row in pq.read_table(evaluation / "samples.parquet").to_pylist() if row["task"] == task]
    named = [name for name in store.metrics if name.startswith(f"{task}.")]
    values = {name.removeprefix(f"{task}."): store.values(name) for name in named}
    lines = [sample(number, row, values) for number, row in enumerate(rows)]
    folder = Path(directory) / sanitized(model)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{date}_samples_{task}.jsonl", folder / f"{date}_results.json"]
    write_bytes_atomic(files[0], "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines).encode())
    found = results(store, read_json(evaluation / "metrics.json"), task, len(rows))
    found |= {
        "config": {"model": "vlmpipe", "model_args": f"pretrained={model}", "limit": None, "device": None},
        "date": date,
        "task_hashes": {task: digest("".join(f"sample_{i}{line['doc_hash']}" for i, line in enumerate(lines)))},
        "model_source": "vlmpipe", "model_name": model, "model_name_sanitized": sanitized(model),
        "vlmpipe": store.evaluation,
    }
    write_bytes_atomic(files[1], f"{json.dumps(found, indent=2, ensure_ascii=False)}\n".encode())
    return files


def sample(number: int, row: Mapping[str, Any], values: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """One line: `score` and, of each metric that the sample has a number in, that number."""
    doc = {"question_id": row["sample_id"], "image_id": row["image_id"], "question": row["question"],
           "answers": row["answers"]}
    own = {name: found[row["sample_id"]] for name, found in values.items() if row["sample_id"] in found}
    return {
        "doc_id": number,
        "target": str(row["answers"][0] if len(set(row["answers"])) == 1 else row["answers"]),
        "filtered_resps": row["prediction"],
        "token_counts": [None],
        "doc_hash": digest(json.dumps(doc, indent=2, ensure_ascii=False)),
        "image_id": row["image_id"],
        "score": row["score"],
        **{name: value for name, value in own.items() if math.isfinite(value)},
        "input": row["question"],
    }


def results(store: Store, found: Mapping[str, Any], task: str, count: int) -> dict[str, Any]:
    """The parts of the results that are by task."""
    numbers: dict[str, Any] = {"alias": task, "samples": count}
    higher: dict[str, bool] = {}
    for metric, value in found["metrics"].items():
        name = metric.removeprefix(f"{task}.")
        if name == metric:
            continue
        higher[name] = not lower_is_better(metric)
        numbers[f"{name},{FILTER}"] = value
        error = error_of(store, metric)
        numbers |= {f"{name}_stderr,{FILTER}": error, f"{name}_stderr_clustered,{FILTER}": error}
    shots = shots_of(task, found["metrics"])
    return {
        "results": {task: numbers},
        "group_subtasks": {task: []},
        "configs": {task: {"task": task, "output_type": "generate_until", "num_fewshot": shots, "score_key": "score"}},
        "versions": {task: store.evaluation["metric_versions"][task]},
        "n-shot": {task: shots},
        "higher_is_better": {task: higher},
        "n-samples": {task: {"original": count, "effective": count}},
    }


def shots_of(task: str, metrics: Mapping[str, float]) -> int:
    """Most examples that stood before a question: what the accuracy of `few_shot` is of."""
    if task != "few_shot":
        return 0
    start = f"{task}.accuracy.k"
    return max(int(name.removeprefix(start)) for name in metrics if name.startswith(start))


def error_of(store: Store, metric: str) -> float | str:
    """The standard error; "N/A", lmms-eval's word, of what is not made of several pictures' samples."""
    if metric not in store.metrics:
        return "N/A"
    scored = store.scored(metric)
    several = len(set(scored.clusters_N.tolist())) > 1
    return resample(scored, store.evaluation["seed"]).standard_error if several else "N/A"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def sanitized(model: str) -> str:
    """The last two parts of a path or hub id, as one folder's name."""
    return re.sub(r'["<>:/|\\?*\[\]]+', "__", "/".join(Path(model).parts[-2:]).strip("/"))
