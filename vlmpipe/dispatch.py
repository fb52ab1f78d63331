"""Where work runs: in this process, in local processes, or on Ray.

`map_shards` runs a function over independent items, `run_training` a training worker; both take a `Cluster`
and give the same result wherever they run. This and `vlmpipe.cluster` are the only importers of ray.
"""

import errno
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, TypeVar

from vlmpipe.cluster import Cluster, check_resources, cores, joined, local_ray
from vlmpipe.errors import UserError, disk_full
from vlmpipe.progress import progress, shown_while

__all__ = ["Cluster", "local_ray", "map_shards", "run_training"]

Item = TypeVar("Item")
Result = TypeVar("Result")
Report = Callable[[dict], None]


# --- independent items -------------------------------------------------------------------------------------

def map_shards(
    function: Callable[[Item], Result], items: Sequence[Item], cluster: Cluster, label: str
) -> list[Result]:
    """Run `function` on every item and return the results in the order of `items`.

    `function` and the items travel to other processes: a module-level function or a `functools.partial` of
    one. A worker process that dies is replaced, and its item done again, up to `cluster.max_failures` times.

    Raises:
        UserError: `function` raised one; the message names the item.
        OSError: `function` raised one; the item stands in a note.
        RuntimeError: anything else that failed; the message names the item.
    """
    items = list(items)
    run = {"inline": _map_inline, "processes": _map_processes, "ray": _map_ray}[cluster.backend]
    results: dict[int, Result] = {}
    with closing(run(function, items, cluster, label)) as finished:
        for index, result in progress(finished, len(items), label):
            results[index] = result
    return [results[index] for index in range(len(items))]


def _map_inline(function: Callable, items: list, cluster: Cluster, label: str) -> Iterator[tuple[int, Any]]:
    for index, item in enumerate(items):
        try:
            result = _single_threaded(function, item)
        except Exception as error:
            raise _failure(label, item, error) from error
        yield index, result


def _map_processes(function: Callable, items: list, cluster: Cluster, label: str) -> Iterator[tuple[int, Any]]:
    waiting = dict(enumerate(items))
    deaths = 0
    while waiting:
        try:
            for index, result in _one_pool(function, dict(waiting), cluster, label):
                del waiting[index]
                yield index, result
        except BrokenProcessPool:
            deaths += 1
            if deaths > cluster.max_failures:
                names = ", ".join(_name(item) for item in list(waiting.values())[: cluster.tasks or cores()])
                raise _deaths(label, names, deaths) from None


def _one_pool(function: Callable, waiting: dict, cluster: Cluster, label: str) -> Iterator[tuple[int, Any]]:
    context = multiprocessing.get_context("spawn")  # fork would copy threads and locks of torch and arrow
    size = min(cluster.tasks or cores(), len(waiting))
    pool = ProcessPoolExecutor(size, context, initializer=_die_with_parent)
    try:
        futures = {
            pool.submit(_single_threaded, function, item): index
            for index, item in waiting.items()
        }
        for future in as_completed(futures):
            index = futures[future]
            try:
                result = future.result()
            except BrokenProcessPool:
                raise
            except Exception as error:
                raise _failure(label, waiting[index], error) from error
            yield index, result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _die_with_parent() -> None:
    """End this worker when its parent is gone, killed included: the pool's own workers would wait for ever."""
    sentinel = multiprocessing.parent_process().sentinel

    def watch() -> None:
        wait_for([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides


def _map_ray(function: Callable, items: list, cluster: Cluster, label: str) -> Iterator[tuple[int, Any]]:
    with joined(cluster):
        import ray

        check_resources(1, {"CPU": 1, "GPU": cluster.gpus_per_task}, "cluster.gpus_per_task")
        task = ray.remote(_single_threaded).options(
            num_cpus=1, num_gpus=cluster.gpus_per_task, max_retries=cluster.max_failures
        )
        at_once = cluster.tasks or max(1, int(ray.cluster_resources().get("CPU", 1)))
        waiting = list(enumerate(items))[::-1]
        running: dict[Any, int] = {}
        while waiting or running:
            while waiting and len(running) < at_once:
                index, item = waiting.pop()
                running[task.remote(function, item)] = index
            (done,), _ = ray.wait(list(running), num_returns=1)
            index = running.pop(done)
            try:
                result = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise _failure(label, items[index], error.cause or error) from None
            except ray.exceptions.RayError:  # of its own: a worker or node is gone, and so are the retries
                raise _deaths(label, _name(items[index]), cluster.max_failures + 1) from None
            yield index, result


def _single_threaded(function: Callable[[Item], Result], item: Item) -> Result:
    limit_threads(1)  # the same bits wherever and beside whatever the item runs
    return function(item)


def limit_threads(threads: int) -> None:
    """Let torch compute with `threads` threads here: the number of threads changes the last bits of a sum."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    else:  # torch reads it when it is imported, and most items never import it
        os.environ["OMP_NUM_THREADS"] = str(threads)


def _name(item: Any) -> str:
    name = str(getattr(item, "name", item))
    return name if len(name) <= 120 else name[:117] + "..."


def _failure(label: str, item: Any, error: BaseException) -> BaseException:
    if isinstance(error, UserError):
        return UserError(f"{label}, {_name(item)}: {error}")
    if isinstance(error, OSError):  # a full disk must still be seen as one
        error.add_note(f"{label} failed on {_name(item)}")
        return error
    return RuntimeError(f"{label} failed on {_name(item)}: {type(error).__name__}: {error}")


def _deaths(label: str, names: str, times: int) -> RuntimeError:
    return RuntimeError(
        f"{label}: a worker process died {times} time(s), at work on {names}; expected it to finish; "
        f"the usual reason is memory: lower cluster.tasks, or look for the kernel's out-of-memory killer"
    )


# --- training ----------------------------------------------------------------------------------------------

Worker = Callable[[Any, Report, Callable[[], bool]], dict]


def run_training(worker: Worker, config: Any, cluster: Cluster, state: Path, name: str) -> dict:
    """Run `worker(config, report, stopped)` on every training worker and return what the first one returns.

    `report(facts)` is for rank 0 (`step`, `steps`, numbers to show); the facts go to the terminal here and to
    `state/progress.jsonl`. `stopped()` turns true when this process gets SIGTERM: the worker saves and
    returns. With more than one worker torch.distributed is ready when `worker` starts. `state` must be
    storage that every worker can reach. A worker that dies restarts all, up to `cluster.max_failures` times:
    `worker` resumes by itself from what it saved in `state`.

    Raises:
        UserError: `worker` raised one, or the cluster can't hold the workers.
        RuntimeError: training failed; the message holds the first worker's error.
    """
    state = Path(state).absolute()
    state.mkdir(parents=True, exist_ok=True)
    task = {
        "worker": worker, "config": config, "threads": cluster.worker_threads,
        "progress": str(state / "progress.jsonl"), "stop": str(state / "stop"),
    }
    Path(task["progress"]).unlink(missing_ok=True)
    with _stop_file(Path(task["stop"])), _shown(Path(task["progress"]), name):
        result = _run_worker(task) if cluster.backend != "ray" else _train_on_ray(task, cluster, state, name)
    if "user_error" in result:
        raise UserError(result["user_error"])
    if "disk_full" in result:
        raise OSError(errno.ENOSPC, result["disk_full"])
    return result["value"]


def _run_worker(task: dict) -> dict:
    """One training worker, wherever it runs. What a retry would not mend comes back as a value."""
    limit_threads(task["threads"])
    report = partial(_append_line, Path(task["progress"]))
    try:
        return {"value": task["worker"](task["config"], report, Path(task["stop"]).exists)}
    except Exception as error:
        full = disk_full(error)
        alone = int(os.environ.get("WORLD_SIZE", 1)) == 1  # else others may wait for this worker: let Ray end them
        if not alone or not (full or isinstance(error, UserError)):
            raise
        return {"disk_full" if full else "user_error": str(error)}


def _train_on_ray(task: dict, cluster: Cluster, state: Path, name: str) -> dict:
    with joined(cluster):
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.train.v2.api.config import LoggingConfig
        from ray.train.v2.api.exceptions import TrainingFailedError

        resources = {"CPU": cluster.worker_cpus, "GPU": cluster.gpus_per_worker}
        check_resources(cluster.workers, resources, "cluster.workers, cluster.cpus_per_worker or gpus_per_worker")
        trainer = TorchTrainer(
            _run_worker,
            train_loop_config=task,
            scaling_config=ScalingConfig(
                num_workers=cluster.workers, use_gpu=cluster.gpus_per_worker > 0,
                resources_per_worker={key: value for key, value in resources.items() if value},
            ),
            run_config=RunConfig(
                name=name, storage_path=str(state / "ray"),
                # A group that can't start counts as a failure of the controller, by default for ever.
                failure_config=FailureConfig(
                    max_failures=cluster.max_failures, controller_failure_limit=cluster.max_failures
                ),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            return trainer.fit().return_value
        except TrainingFailedError as error:
            raise _training_failure(name, error) from error


def _training_failure(name: str, error: Exception) -> Exception:
    failures = list(getattr(error, "worker_failures", {}).values()) or [error]
    causes = [getattr(failure, "cause", failure) for failure in failures]
    user = next((cause for cause in causes if isinstance(cause, UserError) or disk_full(cause)), None)
    return user or RuntimeError(f"{name} failed on Ray: {type(causes[0]).__name__}: {causes[0]}")


def _append_line(path: Path, facts: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


@contextmanager
def _stop_file(path: Path) -> Iterator[None]:
    """Turn SIGTERM into a file: Ray trains in other processes, and outside their main thread."""
    path.unlink(missing_ok=True)
    with _sigterm(lambda *_: path.touch()):
        yield
    path.unlink(missing_ok=True)


@contextmanager
def _sigterm(handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _shown(path: Path, label: str) -> AbstractContextManager[None]:
    """Show the facts that the workers append to `path` while a block runs."""
    terminal, shown = sys.stderr.isatty(), None

    def show(last: bool) -> None:
        nonlocal shown
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        line = text.rpartition("\n")[0].rpartition("\n")[2]  # the last complete one
        if line and line != shown:
            end = "\r" if terminal and not last else "\n"
            print(progress_line(label, json.loads(line)), file=sys.stderr, flush=True, end=end)
            shown = line

    return shown_while(show, 0.5 if terminal else 5.0)


def progress_line(label: str, facts: dict) -> str:
    """`pretrain: 120/600 (20%) loss 2.3100 samples_per_second 180 …` from a report of a training worker."""
    facts = dict(facts)
    step, steps = facts.pop("step"), facts.pop("steps")
    rest = " ".join(f"{key} {value:.4g}" for key, value in facts.items() if isinstance(value, int | float))
    return f"{label}: {step}/{steps} ({100 * step // max(steps, 1)}%) {rest}"
