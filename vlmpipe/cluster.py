"""What a stage may take of which machines, and the Ray behind it: joined by address, or started here.

Ray is joined at `RAY_ADDRESS` or `cluster.address`, or started for the length of one call; `local_ray` starts one that
every stage of a run joins.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from vlmpipe.errors import UserError

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
        if self.workers > 1 and self.backend != "ray":
            raise UserError(f"found workers: {self.workers} with backend: {self.backend}; expected one, as only Ray "
                            f"trains on several; set cluster.backend to ray, or workers to 1")

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
        [sys.executable, "-c", "from vlmpipe.cluster import _head; _head()", str(cpus or cores())],
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
