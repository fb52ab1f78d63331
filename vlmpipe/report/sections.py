"""What each section of the report shows: plain values for its template, or None where its stage was not reached."""

import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from vlmpipe.curate.planted import caught
from vlmpipe.data.task import TaskConfig
from vlmpipe.report import charts, pictures
from vlmpipe.report.gates import block, tile, truth
from vlmpipe.shards import MANIFEST, read_json, read_rows

GATES = ("data", "pretrain", "finetune")


@dataclass(frozen=True)
class Workspace:
    """Where a profile's files are."""

    root: Path
    results: Path
    out: Path
    task: TaskConfig = field(default_factory=TaskConfig)

    @property
    def tested(self) -> pictures.TaskPictures:
        return pictures.TaskPictures(self.root / "packed", self.task)

    def json(self, *parts: str) -> Any | None:
        path = self.root.joinpath(*parts)
        return read_json(path) if path.exists() else None

    @property
    def verdicts(self) -> dict[str, dict]:
        paths = {name: self.results / "gates" / name / "verdict.json" for name in GATES}
        return {name: read_json(path) for name, path in paths.items() if path.exists()}

    @property
    def pools(self) -> list[Path]:
        """The pools that the selection decided about, or all where it was not reached."""
        chosen = (self.json("selection", MANIFEST) or {}).get("pools")
        found = sorted(path.parent for path in self.root.glob(f"pools/*/{MANIFEST}"))
        return [path for path in found if chosen is None or path.name in chosen]

    @cached_property
    def decisions(self) -> pa.Table | None:
        """uid, pool, kept, reason, value, threshold, other_uid and caption of every row."""
        path = self.root / "selection" / "decisions.parquet"
        if not path.exists() or not self.pools:
            return None
        table = pq.read_table(path)
        table = table.filter(pc.is_in(table["pool"], value_set=pa.array([pool.name for pool in self.pools])))
        rows = pa.concat_tables([read_rows(pool, ["uid", "caption"]) for pool in self.pools])
        place = pc.index_in(table["uid"], value_set=rows["uid"].combine_chunks())
        return table.append_column("caption", rows["caption"].take(place))


# --- the top -----------------------------------------------------------------------------------------------

def tiles(workspace: Workspace) -> list[dict]:
    """The few numbers that say how it went."""
    found = []
    if workspace.decisions is not None:
        kept = pc.sum(workspace.decisions["kept"]).as_py()
        found.append({"name": "pairs kept", "value": f"{kept:,}", "note": f"of {len(workspace.decisions):,}"})
    for name, label in (("vqa.accuracy", "questions answered"), ("vqa.accuracy_wrong_image", "with the wrong image")):
        value = _metrics(workspace, "finetune").get(name)
        if value is not None:
            found.append({"name": label, "value": f"{100 * value:.1f}%", "note": "held out"})
    return found + [tile(name, verdict) for name, verdict in workspace.verdicts.items()]


def gates(workspace: Workspace, config: Any) -> dict | None:
    """Every rule of every verdict with what it found, and the samples behind those that did not pass."""
    evaluations = workspace.root / "evaluation"
    shown = {
        name: block(verdict, evaluations / name, workspace.tested, config.worsened)
        for name, verdict in workspace.verdicts.items()
    }
    return {"verdicts": shown, "reached": GATES} if shown else None


# --- curation ----------------------------------------------------------------------------------------------

def funnel(workspace: Workspace, config: Any) -> dict | None:
    """The funnel as a picture and as a table."""
    found = workspace.json("selection", "funnel.json")
    if found is None:
        return None
    steps = [("pool", found["rows"], 0)]
    steps += [(step["reason"].replace("_", " "), step["rows_out"], step["dropped"]) for step in found["steps"]]
    return {"chart": charts.funnel(steps), "kept": found["kept"], "rows": found["rows"], "reasons": found["reasons"]}


def planted(workspace: Workspace, config: Any) -> dict | None:
    """For each kind of fault how many were planted and how many were caught; only the embedded world knows."""
    plans = sorted(workspace.root.glob("world/*/planted.parquet"))
    decisions = workspace.root / "selection" / "decisions.parquet"
    if not plans or not decisions.exists():
        return None
    return caught(plans[0], decisions)


def scores(workspace: Workspace, config: Any) -> dict | None:
    """Histograms of what the thresholds were set on, kept rows in the keeping colour."""
    if workspace.decisions is None:
        return None
    notes = [read_rows(workspace.root / "annotations" / pool.name) for pool in workspace.pools]
    notes = pa.concat_tables(
        [table.drop_columns([c for c in table.column_names if c.endswith("embedding")]) for table in notes],
        promote_options="default",
    )
    place = pc.index_in(notes["uid"], value_set=workspace.decisions["uid"].combine_chunks())
    kept = pc.fill_null(workspace.decisions["kept"].take(place), False).to_numpy()
    drawn = []
    for column, rule in (("clip_score", "clip"), ("caption_words", None), ("aspect", None)):
        if column not in notes.column_names:  # its annotator is switched off
            continue
        values = pc.fill_null(notes[column].cast(pa.float64()), np.nan).to_numpy()
        threshold = _threshold(workspace.decisions, rule) if rule else None
        drawn.append(charts.histogram(values, kept, threshold, column.replace("_", " ")))
    return {"charts": drawn}


def _threshold(decisions: pa.Table, reason: str) -> float | None:
    mask = pc.fill_null(pc.equal(decisions["reason"], reason), False)
    used = pc.drop_null(decisions.filter(mask)["threshold"])
    return used[0].as_py() if len(used) else None


def walls(workspace: Workspace, config: Any) -> dict | None:
    """A few samples that were kept, and of every reason a few that were not, with the numbers behind it."""
    table = workspace.decisions
    if table is None:
        return None
    random = np.random.default_rng(config.seed)
    groups = {"kept": np.flatnonzero(table["kept"].to_numpy())}
    reasons = pc.fill_null(table["reason"], "").to_numpy(zero_copy_only=False)
    for entry in sorted(pc.value_counts(table["reason"]).to_pylist(), key=lambda entry: -entry["counts"]):
        if entry["values"] is not None:
            groups[entry["values"]] = np.flatnonzero(reasons == entry["values"])
    chosen = {name: np.sort(random.permutation(rows)[: config.wall]) for name, rows in groups.items()}
    rows = table.take(np.concatenate(list(chosen.values()))).to_pylist()
    found = _pictures_of(workspace, rows)
    built, start = [], 0
    for name, places in chosen.items():
        cards = [_card(row, found) for row in rows[start : start + len(places)]]
        built.append({"name": name, "count": len(groups[name]), "cards": cards})
        start += len(places)
    return {"walls": built}


def _pictures_of(workspace: Workspace, rows: list[dict]) -> dict[str, str]:
    wanted = {row["uid"] for row in rows} | {row["other_uid"] for row in rows if row["other_uid"]}
    found: dict[str, str] = {}
    for pool in workspace.pools:
        found |= pictures.thumbnails(pool, wanted - found.keys())
    return found


def _card(row: dict, found: dict[str, str]) -> dict:
    why = None
    if row["value"] is not None and row["threshold"] is not None:
        why = f"{row['value']:.3g} against {row['threshold']:.3g}"
    return {"picture": found.get(row["uid"]), "twin": found.get(row["other_uid"] or ""), "caption": row["caption"],
            "uid": row["uid"], "why": why}


# --- audit -------------------------------------------------------------------------------------------------

def groups(workspace: Workspace, config: Any) -> dict | None:
    """The bias tables with their intervals drawn."""
    found = workspace.json("audit", "bias.json")
    if found is None:
        return None
    for grouping in found["groupings"].values():
        for group in grouping["groups"]:
            group["chart"] = charts.interval(group["retention"], group["retention_low"], group["retention_high"])
        impact = grouping["impact"]
        if impact["ratio"] is not None:
            impact["chart"] = charts.interval(impact["ratio"], impact["low"], impact["high"], found["limit"])
    return found


def expectations(workspace: Workspace, config: Any) -> dict | None:
    """Expectation results, failures first, with the way to Data Docs."""
    found = workspace.json("audit", "expectations.json")
    if found is None:
        return None
    found = [*found, *(workspace.json("packed", "expectations.json") or [])]
    pages = {what: workspace.root / stage / "data_docs" / "index.html" for stage, what in (
        ("audit", "Data Docs of the pools and the selection"), ("packed", "Data Docs of the packed data"))}
    return {
        "failed": [record for record in found if not record["success"]],
        "records": found,
        "docs": {what: _relative(page, workspace.out) for what, page in pages.items() if page.exists()},
    }


def _relative(path: Path, start: Path) -> str:
    return Path(os.path.relpath(path, start)).as_posix()


# --- training and evaluation -------------------------------------------------------------------------------

def training(workspace: Workspace, config: Any) -> dict | None:
    """Loss, learning rate and gradient norm of every training, and the batches that it left out."""
    found = []
    for name in ("scorer", "models/pretrain", "models/finetune"):
        path = workspace.root / name / "curves.jsonl"
        if path.exists():
            points = [json.loads(line) for line in path.read_text().splitlines()]
            loss = [(point["step"], point["loss"]) for point in points]
            rate = [(point["step"], point["lr"]) for point in points]
            norm = [(point["step"], point["grad_norm"]) for point in points]
            found.append({
                "name": Path(name).name, "steps": len(points), "last": np.mean([loss for _, loss in loss[-20:]]).item(),
                "loss": charts.lines({"loss": loss}, "loss by step", smooth=max(1, len(loss) // 100)),
                "rate": charts.lines({"learning rate": rate}, "learning rate by step"),
                "norm": charts.lines({"gradient norm": norm}, "gradient norm by step"),
                "skipped": [number for point in points for number in point.get("skipped", ())],
            })
    return {"runs": found} if found else None


def evaluation(workspace: Workspace, config: Any) -> dict | None:
    """Every metric of both evaluations, side by side: (value, samples) or nothing where one has it not."""
    paths = {name: workspace.results / "metrics" / f"{name}.json" for name in GATES}
    found = {name: read_json(path) for name, path in paths.items() if path.exists()}
    if not found:
        return None
    metrics = sorted(set().union(*(part["metrics"] for part in found.values())))
    rows = [(name, [(part["metrics"].get(name), part["n"].get(name)) for part in found.values()]) for name in metrics]
    return {"names": list(found), "rows": rows}


def _metrics(workspace: Workspace, name: str) -> dict:
    path = workspace.results / "metrics" / f"{name}.json"
    return read_json(path)["metrics"] if path.exists() else {}


def predictions(workspace: Workspace, config: Any) -> dict | None:
    """What the last evaluated model said, by task: beside the truth, with where it looked and what it said to a wrong
    picture."""
    for name in reversed(GATES):
        directory = workspace.root / "evaluation" / name
        if (directory / "samples.parquet").exists():
            break
    else:
        return None
    maps = {path.stem: path for path in (directory / "attention").glob("*.npz")}
    tasks: dict[str, list[dict]] = {}
    for row in pq.read_table(directory / "samples.parquet").to_pylist():
        tasks.setdefault(row["task"], []).append(row)
    found = [{"task": task, "cards": _answers(rows, maps, workspace.tested, config.predictions)}
             for task, rows in tasks.items()]
    return {"name": name, "tasks": found}


def _answers(rows: list[dict], maps: dict[str, Path], tested: pictures.TaskPictures, count: int) -> list[dict]:
    """Cards of those with a map of attention, or else of rows spread evenly."""
    mapped = [row for row in rows if _map_name(row) in maps]
    spread = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))
    chosen = sorted(mapped, key=_map_name)[:count] or [rows[place] for place in spread]
    numbers = {row["score"] for row in rows} - {None}
    rates = all(0 <= number <= 1 for number in numbers)
    shown = tested.thumbnails({name for row in chosen for name in row["images"]} if not mapped else (), 160)
    cards = []
    for row in chosen:
        views = _attended(maps[_map_name(row)]) if mapped else [shown.get(name) for name in row["images"]]
        right = "" if row["score"] is None or not rates else "good" if row["score"] >= 0.5 else "bad"
        cards.append({**row, "pictures": views, "truth": truth(row["answers"]), "state": right,
                      "plain": numbers <= {0.0, 1.0}})  # right or wrong: its colour says the score
    return cards


def _map_name(row: dict) -> str:
    return f"{row['task']}-{row['sample_id']}"


def _attended(path: Path) -> list[str]:
    """The picture, and the picture with where the model looked."""
    with np.load(path, allow_pickle=False) as stored:
        picture = Image.fromarray(stored["picture"])
        return [pictures.data_address(picture, 160), pictures.overlay(picture, stored["map"])]
