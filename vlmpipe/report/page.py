"""The report: one page with everything that people look at, from the files that the stages left.

It reads what is there. After a gate stopped the run the later sections say that they were not reached, so a
failing run is looked at in the same place as a good one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmpipe.curate.bias import BiasConfig
from vlmpipe.data.task import TaskConfig
from vlmpipe.report import sections
from vlmpipe.report.explorer import PAGE, ExplorerConfig, explorer
from vlmpipe.report.sections import Workspace
from vlmpipe.report.templating import environment
from vlmpipe.shards import write_bytes_atomic


@dataclass(frozen=True)
class ReportConfig:
    """wall: pictures per wall; predictions: samples shown with what the model said; worsened: samples shown for each
    metric and slice with a rule that did not pass; title: the page's heading; explorer: the page of all samples."""

    title: str = "vlmpipe report"
    wall: int = 16
    predictions: int = 12
    worsened: int = 8
    seed: int = 0
    explorer: ExplorerConfig = field(default_factory=ExplorerConfig)


@dataclass(frozen=True)
class Section:
    """A part of the page: its template, what it is called, and where its evidence comes from."""

    id: str
    title: str
    build: Callable[[Workspace, ReportConfig], dict[str, Any] | None]


SECTIONS = (
    Section("gates", "Gates", sections.gates),
    Section("funnel", "Curation funnel", sections.funnel),
    Section("planted", "Faults planted and caught", sections.planted),
    Section("scores", "Scores and thresholds", sections.scores),
    Section("walls", "Kept and rejected", sections.walls),
    Section("bias", "Groups before and after", sections.groups),
    Section("expectations", "Expectations", sections.expectations),
    Section("training", "Training", sections.training),
    Section("evaluation", "Evaluation", sections.evaluation),
    Section("predictions", "Predictions", sections.predictions),
)


def report(
    root: Path, results: Path, out: Path, config: ReportConfig, bias: BiasConfig | None = None,
    task: TaskConfig | None = None,
) -> None:
    """Write `out`/index.html, one file that opens from disk, and beside it the explorer and its pictures.

    Args:
        root: the profile's data (pools, selection, audit, models, evaluation). results: its verdicts and metrics.
        bias: the audit's groups, to filter samples by. task: where the pictures are that the model was asked about.

    Raises:
        UserError: a file that is there can't be read.
    """
    workspace = Workspace(Path(root), Path(results), Path(out), task or TaskConfig())
    built = [(section, section.build(workspace, config)) for section in SECTIONS]
    lexicons = (bias or BiasConfig()).lexicons
    explored = explorer(
        workspace.root, workspace.pools, workspace.out, config.explorer, config.title, lexicons, config.seed
    )
    page = environment().get_template("page.html.j2").render(
        title=config.title, profile=workspace.root.name, sections=built, tiles=sections.tiles(workspace),
        explorer=PAGE if explored else None,
    )
    write_bytes_atomic(workspace.out / "index.html", page.encode())
