"""The download stage: a URL list becomes shards, every row accounted for.

img2dataset fetches each row: its `download_image` asks for it and honours the opt-out header. What goes around it is
ours: the guard (its network), the schedule (which row when), the decoders' processes, the spool (finished
rows that survive a killed process) and the writer of our shards. The only importer of img2dataset.
"""

import atexit
import fcntl
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from vlmpipe import shards
from vlmpipe.curate import convert, notes, refresh
from vlmpipe.curate.assemble import finish
from vlmpipe.curate.lane import Fetch, lane
from vlmpipe.curate.pixels import DecoderPool
from vlmpipe.curate.pool import PoolConfig, ShardTask
from vlmpipe.curate.resume import is_done, open_again, reuse
from vlmpipe.curate.sources.listing import places, split
from vlmpipe.dispatch import Cluster, cores, map_shards
from vlmpipe.errors import UserError

OPT_OUT = {"noai", "noimageai", "noindex", "noimageindex"}
BATCHES_A_TASK = 4  # so that workers that are done early find more to do
BATCH_MOST = 8  # shards


# --- the stage ---------------------------------------------------------------------------------------------

def download(
    name: str, urls: str | Path, out: Path, state: Path, config: PoolConfig, cluster: Cluster | None = None
) -> None:
    """Download the pool `name` into the shard directory `out`; resume and retry what `out` and `state` leave open.

    Finished shards stay, finished rows of unfinished or changed shards are reused, retriable rows are tried again.
    Times and attempts go to `state`, never to `out`.

    Raises:
        UserError: the list is unusable, another download of this pool runs, or no row gave an image (then `out`
            is complete nevertheless: every row stands there with its reason).
    """
    out, state, started = Path(out), Path(state), time.time()
    source = config.urls if "://" in config.urls else str(urls)
    with _only_one(name, state):
        rows = split(source, config.source, config.columns, config.max_bytes, config.samples_per_shard, state)
        tasks = _plan(name, rows, out, state, config, source)
        known = open_again(out, state)
        names = [task.name for task in tasks]
        resting = refresh.resting(state, names)
        todo = [task for task in tasks if not is_done(task, known.get(task.name), len(resting.get(task.name, ())))]
        reuse(todo, tasks, known, out, state, set().union(*resting.values()))
        notes.forget(state)
        cluster = cluster or Cluster(backend="inline")
        with _hosts(config, out) as hosts, notes.watched(f"download {name}", state, tasks, todo):
            run = partial(fetch_batch, hosts=hosts)
            batches = map_shards(run, _batches(todo, cluster), cluster, f"download {name} shards")
        done = [entry for batch in batches for entry in batch]
        entries = finish(name, tasks, known, done, out, config)
        notes.write_timing(state, started, entries, done)
        refresh.finish(state, names)
    _expect_images(name, entries, out, config)


def _plan(name: str, rows: list, out: Path, state: Path, config: PoolConfig, source: str) -> list[ShardTask]:
    settings = config.settings(source)
    tasks = []
    for shard, count in rows:
        own = f"{settings} {config.store} {name} {shards.sha256_file(state / 'list' / f'{shard}.parquet')}"
        fingerprint = hashlib.sha256(own.encode()).hexdigest()[:16]
        tasks.append(ShardTask(shard, name, count, fingerprint, settings, out.absolute(), state.absolute(), config,
                               places(source, config.source, state)))
    return tasks


@contextmanager
def _only_one(name: str, state: Path) -> Iterator[None]:
    state.mkdir(parents=True, exist_ok=True)
    with open(state / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"found another download of pool '{name}' at work on {state}; expected one at a time; "
                            f"wait for it to end or stop it") from None
        yield


@contextmanager
def _hosts(config: PoolConfig, out: Path) -> Iterator[dict[str, tuple[str, int]]]:
    """The hosts that a served pool's URLs are really fetched from."""
    if config.serve is None:
        yield {}
        return
    from vlmpipe.data import web

    with web.serve(config.serve.kind, Path(config.serve.path), config.serve.hosts) as hosts:
        yield dict(hosts)


def _expect_images(name: str, entries: Sequence[dict], out: Path, config: PoolConfig) -> None:
    if any(entry["downloaded"] for entry in entries):
        return
    reasons = sum((Counter(entry["reasons"]) for entry in entries), Counter())
    top = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(4))
    what, check = ("URLs", "network and the list") if config.source.kind == "list" else ("rows", "pool's source")
    raise UserError(f"pool '{name}': found no image behind any of its {sum(reasons.values())} {what} ({top}); expected "
                    f"at least one; every row's reason stands in {out}; check the {check}, then rerun")


# --- some shards -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Batch:
    """Shards that one process downloads, and how many decoders it may have."""

    tasks: tuple[ShardTask, ...]
    decoders: int

    @property
    def name(self) -> str:
        return f"{self.tasks[0].name}-{self.tasks[-1].name}" if len(self.tasks) > 1 else self.tasks[0].name


def _batches(tasks: Sequence[ShardTask], cluster: Cluster) -> list[Batch]:
    if cluster.backend == "inline":
        return [Batch(tuple(tasks), cores())] if tasks else []
    at_once = cluster.tasks or cores()
    size = min(max(1, len(tasks) // (BATCHES_A_TASK * at_once)), BATCH_MOST)
    return [Batch(tuple(tasks[at : at + size]), 1) for at in range(0, len(tasks), size)]


def fetch_batch(batch: Batch, hosts: Mapping[str, tuple[str, int]]) -> list[dict]:
    """Download shards, or what is left of them, and write their files; return their entries for the manifest."""
    config = batch.tasks[0].config
    decoders = _decoders(config, batch.decoders)  # they start while img2dataset is imported
    return lane(batch.name, batch.tasks, config.rules(hosts), _fetcher(config), decoders).run()


def _fetcher(config: PoolConfig) -> Fetch:
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it asks the network for a newer version of itself
    from img2dataset.downloader import download_image

    return partial(
        download_image, timeout=config.connect_timeout, user_agent_token=config.user_agent.strip().lower(),
        disallowed_header_directives=OPT_OUT if config.opt_out else None,
    )


_started: dict[tuple, DecoderPool] = {}


def _decoders(config: PoolConfig, size: int) -> DecoderPool:
    """This process's decoders for the pool, started once."""
    settings = json.dumps(asdict(config.wanted), sort_keys=True)
    key = (settings, config.decode_timeout, size, os.environ.get("PYTHONPATH"))
    if key not in _started:
        while _started:  # of another pool
            _started.popitem()[1].close()
        command = [sys.executable, "-m", convert.__name__, settings]
        _started[key] = DecoderPool(command, config.decode_timeout, size)
        atexit.register(_started[key].close)
    return _started[key]
