"""The flows: which part of DVC's graph to walk, and what follows."""

import contextlib
import logging
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.task_runners import ThreadPoolTaskRunner

from flows import artifacts, ask
from flows.launch import STATE, workspace
from flows.walk import Node, StageFailed, Undecided, Walk, below, read_plan, restrict, stage_environment
from vlmpipe import process
from vlmpipe.config import parse
from vlmpipe.errors import GateFailed, UserError
from vlmpipe.evaluate.waivers import waivers_path
from vlmpipe.publish import PublishConfig, Registry

LAST_OF_CURATE, FIRST_OF_TRAIN = "pack", "pretrain"


def curated(nodes: Sequence[Node]) -> list[Node]:
    return restrict(nodes, [LAST_OF_CURATE])


def trained(nodes: Sequence[Node]) -> list[Node]:
    return below(nodes, FIRST_OF_TRAIN)


@flow(task_runner=ThreadPoolTaskRunner(), persist_result=False)
def curate(profile: str | None = None, overrides: list[str] | None = None, targets: list[str] | None = None):
    """Pools to a packed, audited dataset: everything up to `pack`."""
    _run(curated, profile, overrides or (), targets or ())


@flow(task_runner=ThreadPoolTaskRunner(), persist_result=False)
def train(profile: str | None = None, overrides: list[str] | None = None, targets: list[str] | None = None):
    """The packed dataset as it is to a gated, promoted model: everything from `pretrain` on."""
    _run(trained, profile, overrides or (), targets or ())


@flow(task_runner=ThreadPoolTaskRunner(), persist_result=False)
def pipeline(profile: str | None = None, overrides: list[str] | None = None, targets: list[str] | None = None):
    """The whole graph: pools to promoted model."""
    _run(list, profile, overrides or (), targets or ())


FLOWS = {"pipeline": pipeline, "curate": curate, "train": train}


def _run(part: Callable, profile: str | None, overrides: Sequence[str], targets: Sequence[str]) -> None:
    root = workspace()
    _print_errors_briefly()
    with process.run_lock(root / STATE / "run.lock"):
        _close_killed_runs(root)
        params = _params(profile, overrides)
        everything = read_plan(root)
        nodes = part(everything)
        if targets:
            wanted = {node.name for node in restrict(everything, targets)}
            nodes = [node for node in nodes if node.name in wanted]
        _say_what_is_left_out(everything, nodes)
        states = _walk(root, params, nodes, everything)
        cached = sum(state == "Cached" for state in states.values())
        get_run_logger().info("%d stages: %d ran, %d cached", len(states), len(states) - cached, cached)
        _publish(root, params, nodes)


def _walk(root: Path, params: Mapping[str, Any], nodes: Sequence[Node], everything: Sequence[Node]) -> dict[str, str]:
    """Walk the nodes to the end, over gates that a person lets pass; the state of each stage."""
    names = {node.name for node in nodes}
    while True:
        walk = Walk(root, [node for node in everything if node.name in names], ray=_ray, needs_ray=_ray_decider(params),
                    show=lambda node: artifacts.show(node.name, root, params))
        try:
            return walk.run()
        except (GateFailed, StageFailed, UserError) as error:
            _report_what_there_is(root, everything)  # which a person may want to see before they answer
            if not (isinstance(error, Undecided) and _let_pass(error.gate, params)):
                raise
        everything = read_plan(root)  # the gate's waivers are others now


def _let_pass(gate: Node, params: Mapping[str, Any]) -> bool:
    """Whether a person, if the workspace asks one, says that a gate which can't decide may pass."""
    publish = parse(PublishConfig, params.get("publish"), "params.yaml: publish")
    if not publish.ask:
        return False
    waivers = waivers_path(params["results"], gate.verdict.parent.name)
    return ask.ask(gate.verdict, waivers, publish.ask_hours)


def _params(profile: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    from vlmpipe import compose
    from vlmpipe.stages import validate

    if profile is None:
        if overrides:
            raise UserError(f"found overrides {' '.join(overrides)} without a profile; expected both; name the profile")
        return compose.read_params()
    params = compose.compose(profile, overrides)
    validate(params, "configs")
    compose.write_params(params)
    return params


def _say_what_is_left_out(everything: Sequence[Node], nodes: Sequence[Node]) -> None:
    chosen = {node.name for node in nodes}
    above = {name for node in nodes for name in node.upstream} - chosen
    stale = [node.name for node in everything if node.name in above and node.changed]
    if stale:
        get_run_logger().warning("changed, but not in this flow: %s; their last outputs are used", ", ".join(stale))


def _publish(root: Path, params: Mapping[str, Any], nodes: Sequence[Node]) -> None:
    registry = Registry(root, params)
    judged = any(node.verdict == root / registry.verdict_path for node in nodes)

    def run() -> None:
        for line in registry.publish(promote=judged):
            get_run_logger().info(line)

    task(run, name="publish", task_run_name="publish", cache_policy=NO_CACHE, persist_result=False)()


def _report_what_there_is(root: Path, nodes: Sequence[Node]) -> None:
    """After a failure DVC doesn't reach `report`, so its command runs by itself on what exists."""
    commands = [node.command for node in nodes if node.name == "report"]
    if not commands:
        return

    def run() -> None:
        child = process.start(shlex.split(commands[0]), env=stage_environment(), cwd=root)
        with contextlib.closing(child.stdout):
            for line in filter(None, map(str.rstrip, child.stdout)):
                get_run_logger().info(line)
        if child.wait():
            get_run_logger().warning("no report could be made of what there is; the lines above say why")

    task(run, name="report", task_run_name="report of what there is", cache_policy=NO_CACHE, persist_result=False)()


# --- Ray ---------------------------------------------------------------------------------------------------

def _ray() -> contextlib.AbstractContextManager:
    from vlmpipe.dispatch import local_ray  # imports ray, which an unchanged run does without

    return local_ray()


def _ray_decider(params: Mapping[str, Any]) -> Callable[[Node], bool]:
    """Whether a stage wants a Ray that is started here: it dispatches work, and no other cluster is configured."""
    from vlmpipe.stages import STAGES

    cluster = params.get("cluster") or {}
    ours = cluster.get("backend") == "ray" and not (cluster.get("address") or os.environ.get("RAY_ADDRESS"))

    def needs(node: Node) -> bool:
        words = shlex.split(node.command)
        stage = words[words.index("vlmpipe") + 1] if "vlmpipe" in words[:-1] else None
        return ours and stage in STAGES and STAGES[stage].cluster

    return needs


# --- around a run ------------------------------------------------------------------------------------------

def workspace_tag(root: Path) -> str:
    """The tag of this workspace's flow runs: a server may serve several."""
    return f"workspace:{root}"


def _close_killed_runs(root: Path) -> None:
    """Whoever holds the run lock is the only live run: others that still say "Running" or "Paused" were killed."""
    from prefect import runtime
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.states import Crashed

    ours = {"tags": {"all_": [workspace_tag(root)]}, "state": {"type": {"any_": ["RUNNING", "PAUSED"]}}}
    with get_client(sync_client=True) as client:
        which = FlowRunFilter.model_validate(ours)
        for run in client.read_flow_runs(flow_run_filter=which, sort=FlowRunSort.ID_DESC, limit=200):
            if str(run.id) != str(runtime.flow_run.id):
                client.set_flow_run_state(run.id, Crashed(message="killed: a later run found it gone"), force=True)


def deployment(name: str, parameters: Mapping[str, Any], schedule: Mapping[str, Any]):
    """A deployment of the flow `name`; `schedule` is {}, {cron: text} or {interval: timedelta}."""
    from prefect.flows import EntrypointType

    return FLOWS[name].to_deployment(
        name="scheduled" if schedule else "by hand", parameters=dict(parameters), tags=[workspace_tag(workspace())],
        entrypoint_type=EntrypointType.MODULE_PATH, **schedule,
    )


def flush() -> None:
    """Wait until Prefect has sent its events and logs: a temporary server ends right after."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (EventsWorker, APILogWorker):
        worker.drain_all(timeout=10)


def _print_errors_briefly() -> None:
    for handler in logging.getLogger().handlers:
        if not any(isinstance(known, _Brief) for known in handler.filters):
            handler.addFilter(_Brief())


class _Brief(logging.Filter):
    """On the terminal our own failures are one line, of the state; Prefect's UI keeps the traceback and the rest."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], (GateFailed, StageFailed, UserError)):
            return False
        record.msg, record.args = record.getMessage().split("\\n")[0].rstrip("\n"), ()
        return True
