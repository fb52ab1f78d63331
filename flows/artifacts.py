"""What a person wants to see of a stage in Prefect's UI, from the files that the stage leaves. What is missing is
skipped: which files there are depends on the profile and on where a run stopped."""

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from vlmpipe.evaluate import waivers
from vlmpipe.evaluate.gate import explain
from vlmpipe.shards import read_json

PICTURES, PICTURE_PX = 8, 128


def show(stage: str, root: Path, params: Mapping[str, Any]) -> None:
    """Publish the artifacts of a stage that has just run or was found unchanged.

    Args:
        stage: its name in dvc.yaml, such as `select` or `gate_data`.
    """
    kind, _, instance = stage.partition("@")[0].partition("_")
    if kind not in SHOWN:
        return
    try:
        SHOWN[kind](Places(root, params), instance)
    except Exception:  # hours of work in a stage must not fail for a picture of it
        get_run_logger().warning("the artifacts of %s could not be made", stage, exc_info=True)


class Places:
    """Where a profile's files are."""

    def __init__(self, root: Path, params: Mapping[str, Any]):
        self.root, self.profile = root, str(params.get("profile", "default"))
        self.data, self.results = root / str(params.get("root", "data")), root / str(params.get("results", "results"))

    def key(self, *words: str) -> str:
        """An artifact's key: one for each profile, so that its history stays together in the UI."""
        return re.sub(r"[^a-z0-9]+", "-", "-".join([self.profile, *words]).lower()).strip("-")


def _selection(where: Places, _instance: str) -> None:
    path = where.data / "selection" / "funnel.json"
    if path.exists():
        funnel = read_json(path)
        steps = funnel["steps"] if isinstance(funnel, Mapping) else funnel
        create_table_artifact(scalars(steps), key=where.key("funnel"), description="Rows that each rule dropped")


def _audit(where: Places, _instance: str) -> None:
    audit = where.data / "audit"
    if (audit / "bias.json").exists():
        rows = bias_rows(read_json(audit / "bias.json"))
        create_table_artifact(rows, key=where.key("bias"), description="How groups fared in the selection")
    if (audit / "expectations.json").exists():
        text = expectations_text(read_json(audit / "expectations.json"), audit / "data_docs" / "index.html")
        create_markdown_artifact(text, key=where.key("expectations"), description="Great Expectations on the metadata")


def _evaluation(where: Places, instance: str) -> None:
    metrics = where.results / "metrics" / f"{instance}.json"
    if metrics.exists():
        found = read_json(metrics)
        rows = [{"metric": name, "value": value, "n": found.get("n", {}).get(name)}
                for name, value in found["metrics"].items()]
        create_table_artifact(rows, key=where.key("metrics", instance), description=f"Metrics of {instance}")
    samples = where.data / "evaluation" / instance
    if (samples / "samples.parquet").exists():
        text = samples_text(samples)
        create_markdown_artifact(text, key=where.key("samples", instance), description=f"Predictions of {instance}")


def _gate(where: Places, instance: str) -> None:
    path = where.results / "gates" / instance / "verdict.json"
    if path.exists():
        text = verdict_text(read_json(path))
        create_markdown_artifact(text, key=where.key("gate", instance), description=f"Verdict of the gate '{instance}'")


def _report(where: Places, _instance: str) -> None:
    page = where.data / "report" / "index.html"
    if page.exists():
        create_link_artifact(page.resolve().as_uri(), link_text="The report", key=where.key("report"),
                             description=f"One page with everything; opens from disk: {page}")


# By the stage's name in dvc.yaml before the first `_`; what follows it is the instance.
SHOWN: dict[str, Callable[[Places, str], None]] = {
    "select": _selection, "audit": _audit, "evaluate": _evaluation, "gate": _gate, "report": _report,
}


# --- texts and tables --------------------------------------------------------------------------------------

def scalars(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with what fits a cell."""
    return [{key: value for key, value in row.items() if not isinstance(value, (list, dict))} for row in rows]


def bias_rows(bias: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each group of each grouping."""
    return [
        {"grouping": name, **cells}
        for name, grouping in bias["groupings"].items() for cells in scalars(grouping["groups"])
    ]


def expectations_text(records: Sequence[Mapping[str, Any]], docs: Path) -> str:
    """Markdown: how many hold, those that don't, and where Data Docs are."""
    failed = [record for record in records if not record["success"]]
    lines = [f"**{len(records) - len(failed)} of {len(records)} expectations hold.**", ""]
    lines += [f"- **{cell(record['suite'])}**: {cell(record['message'])}" for record in failed]
    if docs.exists():
        lines += ["", f"[Data Docs]({docs.resolve().as_uri()}) (opens from disk: `{docs}`)"]
    return "\n".join(lines)


def verdict_text(verdict: Mapping[str, Any]) -> str:
    """Markdown: the verdict, the reasons unless it passed, the waivers, and every number behind it."""
    lines = [f"## {verdict['gate']}: {verdict['verdict']}", ""]
    lines += [f"- **{cell(explain(check))}**" for check in waivers.unmet(verdict)]
    lines += [f"- {cell(waivers.line(waiver))}" for waiver in waivers.used(verdict)]
    lines += ["", f"Champion: {cell(verdict['champion']) or 'none yet'}", "",
              "| | metric | slice | rule | value | limit | champion | interval | n |",
              "|---|---|---|---|---:|---:|---:|---|---:|"]
    for check in verdict["rules"]:
        said = check["verdict"] if check["passed"] else f"**{check['verdict']}**"
        facts = [check["metric"], part(check), *(check[key] for key in ("rule", "value", "limit", "champion")),
                 interval(check), check["n"]]
        lines.append("| " + " | ".join([said + (" (waived)" if check["waived"] else ""), *map(cell, facts)]) + " |")
    return "\n".join(lines)


def part(check: Mapping[str, Any]) -> str | None:
    """`question_type color`: the slice that a check is of."""
    return "{name} {value}".format(**check["slice"]) if check["slice"] else None


def interval(check: Mapping[str, Any]) -> str | None:
    """Of the difference to the champion."""
    return "{:+.4g} to {:+.4g}".format(*check["interval"]) if check["interval"] else None


def samples_text(directory: Path) -> str:
    """Markdown: some samples with their picture, question, prediction and answers."""
    import pyarrow.parquet as pq

    columns = ["task", "sample_id", "question", "prediction", "answers", "score"]
    rows = pq.read_table(directory / "samples.parquet", columns=columns).to_pylist()
    lines = ["| picture | question | prediction | answers | score |", "|---|---|---|---|---:|"]
    stored = {path.stem: path for path in sorted((directory / "attention").glob("*.npz"))}
    names = {f"{row['task']}-{slug(row['sample_id'])}": row for row in rows}
    for name in [name for name in names if name in stored][:PICTURES]:
        row, path = names[name], stored[name]
        answers = ", ".join(sorted(set(row["answers"])))
        facts = [row["question"] or "(caption)", row["prediction"], answers, row["score"]]
        lines.append("| " + " | ".join([f"![]({data_uri(path)})", *map(cell, facts)]) + " |")
    return "\n".join(lines)


def slug(sample_id: str) -> str:
    """How `evaluate` names a sample's file."""
    return re.sub(r"\W+", "_", sample_id.strip().lower()).strip("_") or "none"


def data_uri(path: Path) -> str:
    """The `picture` [Y, X, 3] of an npz as a data URI."""
    import numpy as np
    from PIL import Image

    with np.load(path) as stored:
        picture = Image.fromarray(stored["picture"])
    picture.thumbnail((PICTURE_PX, PICTURE_PX))
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def cell(value: Any) -> str:
    """Text that can't break out of its cell: captions and answers come from the web."""
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    text = " ".join(text.split()).replace("\\", "\\\\")
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(sign, entity)
    return re.sub(r"([|`*_\[\]!])", r"\\\1", text)
