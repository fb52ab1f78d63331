"""Where work runs: in this process, in local processes, or on Ray. The only importer of ray.

`map_shards` runs a function over independent items, `run_training` a training worker; both take a `Cluster`
and give the same result wherever they run. Ray is joined by address (`RAY_ADDRESS` or `cluster.address`) or
started for the length of one call; `local_ray` starts one that every stage of a run joins.
"""

import errno
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, Literal, TypeVar

from vlmpipe.errors import UserError, disk_full
from vlmpipe.shards import progress

Item = TypeVar("Item")
Result = TypeVar("Result")
Report = Callable[[dict], None]

OBJECT_STORE_BYTES = 256 * 2**20  # shards travel by path, so Ray's own store stays small
OWN_RAY = "VLMPIPE_OWN_RAY"  # address of the Ray that `local_ray` started: this machine, this code
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # the cluster may be busy with others for a while
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


@dataclass(frozen=True)
class Cluster:
    """Where a stage runs and how much it takes.

    `address` (host:port) names an existing Ray cluster; RAY_ADDRESS wins over it; with neither, Ray is started here.
    What is null follows the machine. A worker or task whose process dies is replaced up to `max_failures` times.
    """

    backend: Literal["inline", "processes", "ray"] = "ray"
    address: str | None = None
    workers: int = 1  # of training
    cpus_per_worker: int | None = None  # null: this machine's cores shared among them, 1 on a cluster
    gpus_per_worker: float = 0.0
    threads: int | None = None  # of torch in a training worker; null: as many as its CPUs
    tasks: int | None = None  # items of `map_shards` at once, of one CPU and one thread each; null: one for each CPU
    gpus_per_task: float = 0.0
    max_failures: int = 2

    def __post_init__(self) -> None:
        least = {
            "workers": 1, "cpus_per_worker": 1, "gpus_per_worker": 0, "threads": 1, "tasks": 1, "gpus_per_task": 0,
            "max_failures": 0,
        }
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise UserError(f"found {name}: {value}; expected at least {minimum}; change it in the cluster section")

    @property
    def joins(self) -> str | None:
        """The address of the Ray cluster to join, if there is one."""
        return os.environ.get("RAY_ADDRESS") or self.address

    @property
    def worker_cpus(self) -> int:
        """CPUs of a training worker."""
        if self.cpus_per_worker is not None:
            return self.cpus_per_worker
        elsewhere = self.backend == "ray" and self.joins and self.joins != os.environ.get(OWN_RAY)
        return 1 if elsewhere else max(1, cores() // self.workers)

    @property
    def worker_threads(self) -> int:
        return self.threads or self.worker_cpus


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


@contextmanager
def _shown(path: Path, label: str, every_s: float = 5.0) -> Iterator[None]:
    """Show the facts that the workers append to `path` while the block runs."""
    finished = threading.Event()
    every = 0.5 if sys.stderr.isatty() else every_s
    viewer = threading.Thread(target=_follow, args=(path, label, every, finished), daemon=True)
    viewer.start()
    try:
        yield
    finally:
        finished.set()
        viewer.join()


def _follow(path: Path, label: str, every_s: float, finished: threading.Event) -> None:
    shown = None
    last = False
    while not last:
        last = finished.wait(every_s)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        line = text.rpartition("\n")[0].rpartition("\n")[2]  # the last complete one
        if line and line != shown:
            end = "\r" if sys.stderr.isatty() and not last else "\n"
            print(progress_line(label, json.loads(line)), file=sys.stderr, flush=True, end=end)
            shown = line


def progress_line(label: str, facts: dict) -> str:
    """`pretrain: 120/600 (20%) loss 2.3100 samples_per_second 180 …` from a report of a training worker."""
    facts = dict(facts)
    step, steps = facts.pop("step"), facts.pop("steps")
    rest = " ".join(f"{key} {value:.4g}" for key, value in facts.items() if isinstance(value, int | float))
    return f"{label}: {step}/{steps} ({100 * step // max(steps, 1)}%) {rest}"


# --- Ray itself --------------------------------------------------------------------------------------------

@contextmanager
def joined(cluster: Cluster) -> Iterator[None]:
    """Have this process in a Ray cluster: the one at the address, or one of its own for this block.

    Raises:
        UserError: nothing answers at the address, or what answers is not a Ray that this machine belongs to.
    """
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    with ExitStack() as stack:
        address = cluster.joins or stack.enter_context(local_ray())
        _check_reachable(address)
        _use_known_token()
        import ray  # only now: it reads the environment once

        if not ray.is_initialized():
            handler = signal.getsignal(signal.SIGTERM)
            _connect(ray, address)
            stack.callback(ray.shutdown)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # ray.init replaces it
        yield


def _connect(ray: Any, address: str) -> None:
    own = address == os.environ.get(OWN_RAY)
    options = {"job_config": _same_path(ray)} if own else {"runtime_env": _shipped_code()}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", **options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[-1]
        raise UserError(
            f"the Ray cluster at {address} could not be joined ({reason}); expected a cluster of Ray "
            f"{ray.__version__} that this machine is a node of; `ray start --address={address}` here, and set "
            f"RAY_AUTH_MODE=token and RAY_AUTH_TOKEN if it asks for a token"
        ) from error


def _same_path(ray: Any) -> Any:
    """Give workers on this machine the driver's own import path, whatever directory Ray was started in."""
    inside = (sys.prefix, sys.base_prefix)
    paths = [str(Path(entry).absolute()) for entry in sys.path if not entry.startswith(inside)]
    return ray.job_config.JobConfig(_py_driver_sys_path=paths)


def _shipped_code() -> dict:
    """Send this package along: a cluster that others started has another copy of it, or none."""
    return {"py_modules": [str(Path(__file__).parent)], "excludes": ["**/__pycache__"]}


def _check_reachable(address: str) -> None:
    host, _, port = address.rpartition(":")
    expected = "expected host:port of a running Ray head"
    mend = "start one (`ray start --head`), or unset RAY_ADDRESS and cluster.address to run here"
    if not host or not port.isdigit() or "://" in address:
        raise UserError(f"found cluster address '{address}'; {expected}; {mend}")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as connection:
            answer = _greet(connection)
    except OSError as error:
        raise UserError(f"nothing answers at the cluster address {address} ({error}); {expected}; {mend}") from None
    if not answer:
        raise UserError(f"what answers at the cluster address {address} is not Ray; {expected}; {mend}")


def _greet(connection: socket.socket) -> bool:
    """Whether HTTP/2 is spoken there, as gRPC does: against another service Ray itself tries for minutes."""
    if os.environ.get("RAY_USE_TLS") == "1":
        return True
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
    frame = connection.recv(9)
    return len(frame) > 3 and frame[3] == 4  # the type of a SETTINGS frame


def _use_known_token() -> None:
    """Ray turns tokens on by itself for clusters that it starts, but never for one that is named by address."""
    known = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if known or (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def check_resources(count: int, each: dict[str, float], setting: str) -> None:
    """Refuse what the cluster can never place: Ray would wait for it for ever. `setting` is what a user can lower.

    Raises:
        UserError: fewer than `count` of `each` fit on the cluster's nodes when all of them are idle.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {name: amount for name, amount in each.items() if amount}
    room = sum(
        min(int(node.get(name, 0) / amount + 1e-6) for name, amount in wanted.items()) for node in nodes
    )
    if room < count:
        have = " + ".join(f"{node.get('CPU', 0):g} CPU/{node.get('GPU', 0):g} GPU" for node in nodes)
        asked = " and ".join(f"{amount:g} {name}" for name, amount in wanted.items())
        raise UserError(
            f"found {count} worker(s) asked for with {asked} each, on a Ray cluster of {have}; expected at most {room} "
            f"of these; lower {setting}, or join a larger cluster (RAY_ADDRESS)"
        )


@contextmanager
def local_ray(cpus: int | None = None) -> Iterator[str]:
    """Start one Ray on this machine and yield its address; it ends with the block or this process.

    Inside the block RAY_ADDRESS and Ray's token stand in this process's environment, so that every stage
    started from it joins. `cpus` defaults to all cores.
    """
    environment = {**QUIET, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _token()}
    interface = "lo0" if sys.platform == "darwin" else "lo"
    head = subprocess.Popen(
        [sys.executable, "-c", "from vlmpipe.dispatch import _head; _head()", str(cpus or cores())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env={"GLOO_SOCKET_IFNAME": interface, **os.environ, **environment, "PYTHONPATH": _import_path()},
    )
    try:
        address = head.stdout.readline().strip()
        if not address:
            raise RuntimeError("Ray did not start on this machine; its reason stands above")
        with _environment({**environment, "RAY_ADDRESS": address, OWN_RAY: address}):
            yield address
    finally:
        head.stdin.close()  # the head waits for this end of the pipe, which also closes when we are killed
        try:
            head.wait(timeout=60)
        except subprocess.TimeoutExpired:
            head.kill()  # Ray's own reaper then ends the rest


@cache
def _token() -> str:
    """One for all of this process, because Ray reads it once; in no file, so that it ends with us."""
    return os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)


def _import_path() -> str:
    here = str(Path(__file__).parents[1])
    return os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))


def _head() -> None:
    """The process behind `local_ray`: hold a Ray head until the parent closes our standard input."""
    import ray

    answer = os.dup(1)
    os.dup2(2, 1)  # nobody reads our standard output beyond the address, and a full pipe would block Ray
    os.environ.pop("RAY_ADDRESS", None)
    # Short on purpose: Ray puts sockets below it, whose paths may have 107 bytes.
    folder = tempfile.mkdtemp(prefix="vlmpipe-ray-", dir="/tmp")
    try:
        context = ray.init(
            address="local", num_cpus=int(sys.argv[1]), object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False,
            log_to_driver=False, logging_level="error", _temp_dir=folder,
        )
        os.write(answer, f"{context.address_info['gcs_address']}\n".encode())
        os.close(answer)
        sys.stdin.read()
        ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value
