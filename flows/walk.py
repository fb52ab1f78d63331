"""DVC's graph as Prefect tasks: one task a stage, in parallel where the graph allows. No second DAG.

DVC decides whether a stage runs. One in-process look at the graph finds what is unchanged (0.3 s for all stages,
instead of a DVC process for each); whatever has changed, or stands below something that ran, goes through
`dvc --wait-for-lock repro --single-item STAGE`, so that its lock entry is the one that `dvc repro` would write.
"""

import contextlib
import graphlib
import json
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from prefect import get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from vlmpipe import process
from vlmpipe.errors import GateFailed, UserError
from vlmpipe.evaluate.gate import explain
from vlmpipe.evaluate.waivers import unmet
from vlmpipe.shards import read_json

PERCENT = re.compile(r"\((\d{1,3})%\)")
UNCHANGED = re.compile(r"Stage '.*' (didn't change, skipping|is cached - skipping run)")
DVC_LINES = ("Running stage ", "> ", "ERROR: failed to reproduce")
DVC_CHATTER = (
    "Updating lock file", "Generating lock file", "To track the changes with git", "git add ", "To enable auto staging",
    "dvc config core.autostage", "Use `dvc push`",
)
RETRY_DELAY_S = 5
TAIL_LINES = 12


class StageFailed(RuntimeError):
    """A stage ended for a reason that is neither the user's input nor a gate's verdict."""


class Undecided(GateFailed):
    """A gate's verdict is INCONCLUSIVE; `gate` is its stage."""

    def __init__(self, message: str, gate: "Node"):
        super().__init__(message)
        self.gate = gate


@dataclass(frozen=True)
class Node:
    """A stage as the walk needs it. `verdict` is the file a gate writes; None for other stages."""

    name: str
    command: str
    upstream: tuple[str, ...]
    changed: bool
    retries: int
    verdict: Path | None


# --- the plan ----------------------------------------------------------------------------------------------

def read_plan(root: Path) -> list[Node]:
    """All stages of the dvc.yaml in `root`, which is the current folder (DVC names stages relative to it).
    Upstream comes first.

    Raises:
        UserError: DVC can't read the pipeline, or another DVC process is at work on it.
    """
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo

    try:
        with contextlib.closing(Repo(str(root))) as repo:
            clear_dead_locks(Path(repo.tmp_dir))
            with repo.lock:
                graph = repo.index.graph
                nodes = {stage.addressing: _node(stage, graph.successors(stage)) for stage in graph}
    except LockError as error:
        raise UserError(f"found another DVC process at work here ({_line(error)}); wait for it and rerun") from None
    except DvcException as error:
        raise UserError(f"DVC can't read the pipeline: {_line(error)}; mend dvc.yaml, params.yaml or dvc.lock "
                        f"(`git checkout dvc.lock` where a killed process left half of it)") from None
    order = graphlib.TopologicalSorter({node.name: node.upstream for node in nodes.values()}).static_order()
    return [nodes[name] for name in order]


def _node(stage, upstream: Iterable) -> Node:
    verdicts = [Path(out.fs_path) for out in stage.outs if Path(out.fs_path).name == "verdict.json"]
    return Node(
        name=stage.addressing,
        command=stage.cmd or "",
        upstream=tuple(sorted(node.addressing for node in upstream)),
        changed=stage.changed(),
        retries=int((stage.meta or {}).get("retries", 0)) if not verdicts else 0,
        verdict=verdicts[0] if verdicts else None,
    )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def restrict(nodes: Sequence[Node], targets: Iterable[str]) -> list[Node]:
    """The targets and everything above them. `download` stands for every `download@pool`.

    Raises:
        UserError: no stage has a target's name.
    """
    by_name = {node.name: node for node in nodes}
    wanted: set[str] = set()
    pending = [name for target in targets for name in matching(nodes, target)]
    while pending:
        name = pending.pop()
        if name not in wanted:
            wanted.add(name)
            pending.extend(by_name[name].upstream)
    return [node for node in nodes if node.name in wanted]


def below(nodes: Sequence[Node], start: str) -> list[Node]:
    """`start` and everything that depends on it."""
    wanted = set(matching(nodes, start))
    for node in nodes:  # upstream first
        if wanted.intersection(node.upstream):
            wanted.add(node.name)
    return [node for node in nodes if node.name in wanted]


def matching(nodes: Sequence[Node], target: str) -> list[str]:
    """Names of the stage `target` or of its instances."""
    found = [node.name for node in nodes if target in (node.name, node.name.partition("@")[0])]
    if not found:
        names = ", ".join(node.name for node in nodes)
        raise UserError(f"found no stage '{target}' in dvc.yaml; expected one of: {names}")
    return found


def clear_dead_locks(tmp_dir: Path) -> None:
    """Forget stage locks whose owners were killed.

    DVC itself does so only where the owner's pid is free: a pid that was given to another process blocks it, and a
    file that was half written when its writer was killed stops every later run.
    """
    from dvc.lock import make_lock

    path = tmp_dir / "rwlock"
    if not path.exists():
        return
    with make_lock(str(tmp_dir / "rwlock.lock"), tmp_dir=str(tmp_dir)):
        try:
            locks = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            locks = {}
        write = {key: info for key, info in locks.get("write", {}).items() if _holds(info)}
        read = {key: [info for info in infos if _holds(info)] for key, infos in locks.get("read", {}).items()}
        kept = {"write": write, "read": {key: infos for key, infos in read.items() if infos}}
        path.write_text(json.dumps({key: value for key, value in kept.items() if value}), encoding="utf-8")


def _holds(info: Mapping) -> bool:
    """Whether the process that took the lock still lives; DVC notes its pid and arguments."""
    arguments = info["cmd"].partition(" ")[2]
    try:
        return " ".join(psutil.Process(info["pid"]).cmdline()).endswith(arguments)
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False
    except psutil.AccessDenied:
        return True


# --- the walk ----------------------------------------------------------------------------------------------

class Walk:
    """One walk over some nodes, inside a Prefect flow with a thread pool.

    Args:
        jobs: how many stages run at once.
        ray: started, once, before the first stage that `needs_ray`; it puts RAY_ADDRESS into our environment.
        show: called with the name of each stage that has just run or was found unchanged, to publish its artifacts.
    """

    def __init__(
        self, root: Path, nodes: Sequence[Node], *, jobs: int | None = None,
        ray: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
        needs_ray: Callable[[Node], bool] = lambda node: False,
        show: Callable[[Node], None] = lambda node: None,
    ):
        self.root, self.nodes = root, list(nodes)
        self.ray, self.needs_ray, self.show = ray, needs_ray, show
        self.slots = threading.BoundedSemaphore(jobs or default_jobs())
        self.resources = contextlib.ExitStack()
        self.guard = threading.Lock()
        self.ray_started = self.stopping = False
        self.children: set = set()
        self.ran: set[str] = set()

    def run(self) -> dict[str, str]:
        """Run every node and return its state's name: Completed, Cached, Failed or NotReady.

        Raises:
            GateFailed, UserError, StageFailed: of the first failing stage; what doesn't depend on it has ended first.
        """
        with self.resources:
            try:
                futures = {}
                for node in self.nodes:
                    wait_for = [futures[name] for name in node.upstream if name in futures]
                    futures[node.name] = self._task(node).submit(wait_for=wait_for)
                for future in futures.values():
                    future.wait()
            except BaseException:  # Ctrl-C or SIGTERM: tasks block on their children, so these end first
                self._stop()
                raise
        states = {name: future.state for name, future in futures.items()}
        self._raise_first_failure(states)
        return {name: state.name for name, state in states.items()}

    def _task(self, node: Node):
        return task(
            lambda: self._run(node),
            name=node.name, task_run_name=node.name, retries=node.retries, retry_delay_seconds=RETRY_DELAY_S,
            retry_condition_fn=lambda _task, _run, state: self._worth_another_try(state),
            cache_policy=NO_CACHE, persist_result=False,
        )

    def _worth_another_try(self, state: State) -> bool:
        # A UserError or a verdict would only come again.
        return not self.stopping and isinstance(state.result(raise_on_failure=False), StageFailed)

    def _run(self, node: Node) -> State:
        if not node.changed and not self.ran.intersection(node.upstream):
            return self._cached(node)
        with self.slots:
            if self.needs_ray(node):
                self._start_ray()
            ran = self._reproduce(node)
        if not ran:
            return self._cached(node)
        with self.guard:
            self.ran.add(node.name)
        self.show(node)
        return Completed(message="ran")

    def _cached(self, node: Node) -> State:
        self.show(node)
        return Completed(name="Cached", message="unchanged since it last ran")

    def _start_ray(self) -> None:
        with self.guard:
            if not self.ray_started:
                get_run_logger().info("starting one Ray for this run")
                self.resources.enter_context(self.ray())
                self.ray_started = True

    def _reproduce(self, node: Node) -> bool:
        """Let DVC run the stage; whether its command ran, or DVC found nothing to do."""
        logger, progress, tail, unchanged = get_run_logger(), Progress(node.name), deque(maxlen=TAIL_LINES), False
        command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", node.name]
        with self._child(command) as child:
            for line in map(str.rstrip, child.stdout):
                if line and not line.lstrip().startswith(DVC_CHATTER):
                    logger.info(line)
                    progress.read(line)
                    tail.append(line)
                    unchanged = unchanged or bool(UNCHANGED.match(line))
            status = child.wait()
        if status and self.stopping:
            raise StageFailed(f"stage {node.name} was ended with the run")
        if status:
            error = failure(node, list(tail))
            if isinstance(error, GateFailed):
                self.show(node)  # the evidence is all there
            raise error
        progress.finish()
        return not unchanged

    @contextlib.contextmanager
    def _child(self, command: Sequence[str]):
        with self.guard:
            if self.stopping:
                raise StageFailed("the run is being stopped")
            child = process.start(command, env=stage_environment(), cwd=self.root)
            self.children.add(child)
        try:
            yield child
        finally:
            process.stop(child)
            self.children.discard(child)

    def _stop(self) -> None:
        with self.guard:
            self.stopping = True
            for child in tuple(self.children):
                process.stop(child)

    def _raise_first_failure(self, states: Mapping[str, State]) -> None:
        failed = [name for name, state in states.items() if state.is_failed() or state.is_crashed()]
        if not failed:
            return
        errors = {name: states[name].result(raise_on_failure=False) for name in failed}
        failed.sort(key=lambda name: isinstance(errors[name], Undecided))  # others stop the run whatever a person says
        skipped = [name for name, state in states.items() if state.is_pending()]
        logger = get_run_logger()
        if skipped:
            logger.warning("not run, because something above failed: %s", ", ".join(skipped))
        raise errors[failed[0]]


def default_jobs() -> int:
    """Two at least: a download waits for the network while something else computes."""
    return min(max(2, (os.cpu_count() or 2) // 2), 8)


def stage_environment() -> dict[str, str]:
    """Our environment, read when a stage starts (Ray's address may have come since), for DVC and the stage."""
    here = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": os.pathsep.join([here, os.environ.get("PATH", "")]),  # dvc.yaml says `python`
        "PYTHONUNBUFFERED": "1",
        "DVC_NO_ANALYTICS": "1",
        "NO_COLOR": "1",
    }


def failure(node: Node, tail: Sequence[str]) -> Exception:
    """The exception for a failed stage, from its verdict if it is a gate, else from its last lines of output.

    DVC exits 255 whatever the command returned, so the lines have to tell.
    """
    if node.verdict is not None and node.verdict.exists():
        verdict = read_json(node.verdict)
        if not verdict["passed"]:
            reasons = "; ".join(map(explain, unmet(verdict)))
            if verdict["verdict"] == "INCONCLUSIVE":
                return Undecided(f"gate {verdict['gate']} can't decide: {reasons}", node)
            return GateFailed(f"gate {verdict['gate']} failed: {reasons}")
    own = [line for line in tail if not line.startswith(DVC_LINES)]
    reason = own[-1] if own else tail[-1] if tail else "it said nothing"
    if reason.startswith("error: "):
        return UserError(f"stage {node.name}: {reason.removeprefix('error: ')}")
    return StageFailed("\n".join([f"stage {node.name} failed: {reason}", *own[:-1]]))


class Progress:
    """A live artifact from the lines of `vlmpipe.progress`: `label: 120/3000 (4%) 60.1/s`."""

    def __init__(self, stage: str, every_s: float = 2.0):
        self.stage, self.every_s = stage, every_s
        self.artifact = None
        self.percent, self.last = -1, 0.0

    def read(self, line: str) -> None:
        found = PERCENT.search(line)
        if not found or int(found[1]) == self.percent or int(found[1]) > 100:
            return
        now = time.monotonic()
        if now - self.last >= self.every_s:
            self._write(int(found[1]), line)
            self.last = now

    def finish(self) -> None:
        if self.artifact is not None:
            self._write(100, f"{self.stage}: done")

    def _write(self, percent: int, line: str) -> None:
        self.percent = percent
        if self.artifact is None:
            key = "progress-" + re.sub(r"[^a-z0-9]+", "-", self.stage.lower()).strip("-")
            self.artifact = create_progress_artifact(float(percent), key=key, description=line)
        else:
            update_progress_artifact(self.artifact, float(percent), description=line)
