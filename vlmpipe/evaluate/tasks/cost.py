"""What a model costs beside the champion, and whether its checkpoint gives the same model again.

Each model runs in a process of its own, so that peak memory is its own. They take turns at every batch of the same
samples on the same machine, so that what else the machine does slows both; medians over many turns leave out the rest.
"""

import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from vlmpipe.dispatch import limit_threads
from vlmpipe.errors import UserError
from vlmpipe.evaluate.store import CHALLENGER, CHAMPION
from vlmpipe.evaluate.tasks.base import EvaluateConfig, Task, keys_of
from vlmpipe.evaluate.tasks.chunks import Chunk, Contender, device, predict_samples
from vlmpipe.evaluate.tasks.resume import fingerprint
from vlmpipe.models import read_model, save

TURNS = 24
MIB = 1 << 20


def measure(
    chunk: Chunk, task: Task, config: EvaluateConfig, champion: Contender | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`costs`, and `checkpoint.round_trip` (1 or 0) in the same form.

    Raises:
        UserError: the model can't do the task.
    """
    whole = {"checkpoint.round_trip": int(round_trip(chunk, task, config))}
    checkpoint = {"metrics": whole, "n": dict.fromkeys(whole, len(chunk.samples)), "details": {}}
    return costs(chunk, task, config, champion), checkpoint


def costs(
    chunk: Chunk, task: Task, config: EvaluateConfig, champion: Contender | None = None, turns: int = TURNS
) -> dict[str, Any]:
    """Seconds, samples per second and memory of the chunk's model, and the ratios to the champion's.

    A sample counts twice: it is asked with its right and with its wrong picture. `cost.seconds_per_sample` is one at a
    time, `cost.samples_per_second` in batches of `config.batch_size`, from the encoded picture on. Memory is the
    peak of the process, or of what torch holds on the accelerator if there is one.

    Returns:
        {"metrics", "n", "details", "models"}; without a champion, or with one that can't do the task (`details` says
        why), there are no ratios.

    Raises:
        UserError: the model can't do the task.
    """
    models = [chunk.model, *([champion] if champion else [])]
    chunks = [replace(chunk, model=model) for model in models]
    with subjects(chunks, task, config) as asked:
        single, many = (_in_turns(asked, len(chunk.samples), size, turns) for size in (1, config.batch_size))
        memory = {role: _answer(asked, role, None) for role in asked}
    found = {
        "seconds_per_sample": statistics.median(turn[CHALLENGER] for turn in single),
        "samples_per_second": 1 / statistics.median(turn[CHALLENGER] for turn in many),
        "peak_memory_mib": memory[CHALLENGER] / MIB,
    }
    problem = asked.problems.get(CHAMPION)
    if champion is not None and problem is None:
        found |= {
            "seconds_ratio": statistics.median(turn[CHALLENGER] / turn[CHAMPION] for turn in single),
            "throughput_ratio": statistics.median(turn[CHAMPION] / turn[CHALLENGER] for turn in many),
            "memory_ratio": memory[CHALLENGER] / memory[CHAMPION],
        }
    found = {f"cost.{name}": value for name, value in found.items()}
    return {
        "metrics": found, "n": dict.fromkeys(found, len(chunk.samples)),
        "details": {} if problem is None else dict.fromkeys(found, f"champion: {problem}"),
        "models": {model.role: model.sha256 for model in models},
    }


# --- a process for each model ------------------------------------------------------------------------------

class Subjects(dict[str, Connection]):
    """By role the processes that are ready; `problems`: why a champion's is not."""

    def __init__(self):
        super().__init__()
        self.problems: dict[str, str] = {}


@contextmanager
def subjects(chunks: Sequence[Chunk], task: Task, config: EvaluateConfig) -> Iterator[Subjects]:
    """Processes that have loaded the chunks' models.

    Raises:
        UserError: the challenger's can't.
    """
    context = multiprocessing.get_context("spawn")  # fork would copy threads and locks of torch
    found, workers = Subjects(), []
    try:
        for chunk in chunks:
            ours, theirs = context.Pipe()
            worker = context.Process(target=_serve, args=(theirs, chunk, task, config), daemon=True)
            worker.start()
            theirs.close()
            workers.append(worker)
            found[chunk.model.role] = ours
        for role in list(found):
            try:
                _received(found[role])
            except UserError as error:
                if role != CHAMPION:
                    raise
                found.problems[role] = str(error)
                del found[role]
        yield found
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _in_turns(asked: Mapping[str, Connection], samples: int, size: int, turns: int) -> list[dict[str, float]]:
    """Seconds of each model for a sample, of every turn; who goes first alternates."""
    found = []
    while len(found) < turns:
        for start in range(0, samples, size):
            part = start, min(start + size, samples)
            order = list(asked)[:: 1 if len(found) % 2 else -1]
            count = 2 * (part[1] - part[0])
            found.append({role: _answer(asked, role, part) / count for role in order})
    return found


def _answer(asked: Mapping[str, Connection], role: str, question: tuple[int, int] | None) -> float:
    asked[role].send(question)
    return _received(asked[role])


def _received(connection: Connection) -> Any:
    try:
        answer = connection.recv()
    except EOFError:
        raise RuntimeError("a process that measures costs died; it may have lacked memory") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _serve(connection: Connection, chunk: Chunk, task: Task, config: EvaluateConfig) -> None:
    """Load the model and say so; then for each range of samples the seconds that a batch of them takes, and for None
    the peak of memory in bytes."""
    limit_threads(1)
    try:
        model, processor = read_model(chunk.model.directory, device())
        pictures = task.pictures(chunk.place, keys_of(chunk.samples), chunk.files)
        # The warm-up, and whether the model can do it at all.
        for samples in (chunk.samples[:1], chunk.samples):
            predict_samples(task, model, processor, samples, pictures, config)
        connection.send("ready")
        while (part := connection.recv()) is not None:
            start = time.perf_counter()
            predict_samples(task, model, processor, chunk.samples[slice(*part)], pictures, config)
            if device() == "cuda":
                torch.cuda.synchronize()
            connection.send(time.perf_counter() - start)
        connection.send(peak_memory())
    except EOFError:
        return  # whoever asked is gone
    except Exception as error:
        connection.send(error)


def peak_memory() -> int:
    """Bytes: of torch on the accelerator, else of this process."""
    if device() == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # Linux hands a new process its parent's peak in `ru_maxrss`
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --- the checkpoint ----------------------------------------------------------------------------------------

def round_trip(chunk: Chunk, task: Task, config: EvaluateConfig) -> bool:
    """Whether the model that is loaded, saved and loaded again has the same weights and says the same, to the bit."""
    pictures = task.pictures(chunk.place, keys_of(chunk.samples), chunk.files)
    with tempfile.TemporaryDirectory(prefix="vlmpipe-") as folder:
        once, processor = read_model(chunk.model.directory, device())
        save(once, processor, Path(folder))
        said = fingerprint(predict_samples(task, once, processor, chunk.samples, pictures, config))
        again, processor = read_model(Path(folder), device())
        if fingerprint(predict_samples(task, again, processor, chunk.samples, pictures, config)) != said:
            return False
    return same_weights(once, again)


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """To the bit; NaN is the same as itself."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and ours[name].shape == theirs[name].shape
        and _bytes(ours[name]) == _bytes(theirs[name])
        for name in ours
    )


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
