"""The folder of an evaluation, written by hand: what two models said to a few samples, and what it scored."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from vlmpipe.evaluate.store import CHALLENGER, CHAMPION, Counts, tables, write_scores
from vlmpipe.evaluate.tasks.base import Sample
from vlmpipe.evaluate.tasks.run import STORE, store_row
from vlmpipe.evaluate.verdict import seal
from vlmpipe.shards import write_json, write_table

FILES = {CHALLENGER: "samples.parquet", CHAMPION: "champion.parquet"}


def asked(key: str, question: str = "what color?", answers: Sequence[str] = ("red",), image="", **slices) -> Sample:
    return Sample(key, image or f"{key}.png", "other.png", question, tuple(answers), slices)


def write_evaluation(
    directory: Path, task: str, samples: Sequence[Sample], said: Mapping[str, Mapping[str, str | dict | None]],
    counts: Mapping[str, Mapping[str, Counts]],
) -> Path:
    """`said`: for each model, by sample, its answer or more of its row; `counts`: for each model, by metric without its
    task."""
    parts = []
    for model, answers in said.items():
        rows = [store_row(task, sample, _scored(answers[sample.id]), str(sample.image)) for sample in samples]
        write_table(directory / FILES[model], pa.Table.from_pylist(rows, schema=STORE))
        named = {f"{task}.{metric}": found for metric, found in counts[model].items()}
        clusters = {sample.id: str(sample.image) for sample in samples}
        parts += tables(model, named, clusters, {sample.id: sample.slices for sample in samples})
    write_scores(directory, parts)
    write_json(directory / "evaluation.json", {"champion": "v1" if CHAMPION in said else None})
    return directory


def _scored(said: str | dict | None) -> dict:
    return said if isinstance(said, dict) else {"prediction": said}


def means(values: Mapping[str, float]) -> Counts:
    return Counts("ratio", {key: [value, 1.0] for key, value in values.items()})


def check(name: str, metric: str, verdict: str = "FAIL", **facts) -> dict:
    """A rule's record as a verdict has it."""
    record = dict.fromkeys((
        "slice", "champion", "difference", "interval", "p", "p_adjusted", "margin", "min_n", "power", "samples_needed",
        "note", "detail", "waived",
    ))
    numbers = {"rule": "min", "value": 0.5, "limit": 0.85, "n": 80, "clusters": 40}
    return record | {"name": name, "metric": metric, "verdict": verdict, "passed": verdict == "PASS"} | numbers | facts


def verdict(checks: Sequence[dict], said: str = "FAIL", **facts) -> dict:
    """As a gate writes it, if not of everything that a gate writes."""
    return seal({"gate": "finetune", "verdict": said, "passed": said == "PASS", "rules": list(checks),
                 "champion": "v1", "alpha": 0.05, "seed": 0, "replicates": 4000, "evaluation": None} | facts)
