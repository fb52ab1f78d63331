"""The download stage: a URL list becomes shards, every row accounted for.

img2dataset does the work shard by shard: its Downloader runs the threads, its opt-out check reads the headers, its
Resizer resizes and encodes. What goes around it is ours: the guard (its network), `pixels` (its decoder), the spool
(finished rows that survive a killed process) and the writer of our shards. The only importer of img2dataset.
"""

import fcntl
import hashlib
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlmpipe import shards
from vlmpipe.curate.assemble import assemble, finish
from vlmpipe.curate.failures import parse_failure, status_of
from vlmpipe.curate.guard import Guard, tagged
from vlmpipe.curate.hosts import Hosts
from vlmpipe.curate.pixels import Decoded, Decoder, serve, to_ppm
from vlmpipe.curate.pool import PoolConfig, ShardTask
from vlmpipe.curate.resume import is_done, open_again, reuse
from vlmpipe.curate.sources.files import root_of
from vlmpipe.curate.sources.listing import split
from vlmpipe.curate.sources.read import is_placed, read_rows
from vlmpipe.curate.spool import Spool
from vlmpipe.dispatch import Cluster, map_shards
from vlmpipe.errors import UserError
from vlmpipe.images import NotAnImage, decode_rgb
from vlmpipe.progress import shown_while

PASSES = 20  # over the rows of a shard; a host that serves a few rows per wait can't hold a shard for ever
RESIZER_REASONS = {
    "image too small": "too_small", "image area too large": "too_large", "aspect ratio too large": "aspect_ratio",
}
DECODING = (
    "image_size", "resize_mode", "jpeg_quality", "min_size", "max_aspect_ratio", "max_pixels", "decode_timeout",
)
OPT_OUT = ["noai", "noimageai", "noindex", "noimageindex"]


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
        todo = [task for task in tasks if not is_done(task, known.get(task.name))]
        reuse(todo, tasks, known, out, state)
        _forget_hosts(state)
        with _hosts(config, out) as hosts, _watched(f"download {name}", state, tasks, todo):
            run = partial(fetch_shard, hosts=hosts)
            done = map_shards(run, todo, cluster or Cluster(backend="inline"), f"download {name} shards")
        entries = finish(name, tasks, known, done, out, config)
        _write_timing(state, started, entries, done)
    _expect_images(name, entries, out, config)


def _plan(name: str, rows: list, out: Path, state: Path, config: PoolConfig, source: str) -> list[ShardTask]:
    settings = config.settings(source)
    tasks = []
    for shard, count in rows:
        own = f"{settings} {config.store} {name} {shards.sha256_file(state / 'list' / f'{shard}.parquet')}"
        fingerprint = hashlib.sha256(own.encode()).hexdigest()[:16]
        tasks.append(ShardTask(shard, name, count, fingerprint, settings, out.absolute(), state.absolute(), config,
                               root_of(source)))
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


# --- one shard ---------------------------------------------------------------------------------------------

def fetch_shard(task: ShardTask, hosts: Mapping[str, tuple[str, int]]) -> dict:
    """Download one shard, or what is left of it, and write its files; return its entry for the manifest."""
    with Spool(task.spool_file) as spool:
        if task.done_file.exists():  # a process that outlived a killed run got here first
            return shards.read_json(task.done_file)
        table = pq.read_table(task.list_file)
        open_rows = [i for i, uid in enumerate(table["uid"].to_pylist()) if uid not in spool]
        placed = [row for row in open_rows if is_placed(table, row)]
        failures = read_rows(task, table, spool, placed, _decoder(task.config).decode) if placed else {}
        behind_urls = sorted({*open_rows} - {*placed})
        if behind_urls:
            failures |= _Fetch(task, table, spool, hosts).run(behind_urls)
        entry = assemble(task, table, spool, failures)
        shards.write_json(task.done_file, entry)
    task.spool_file.unlink()
    return entry


class _Fetch:
    """The rows of one shard on their way through img2dataset. It is img2dataset's resizer and its sample writer.

    img2dataset calls both from one thread, one row after the other: the resizer, then the writer for the same row.
    """

    def __init__(self, task: ShardTask, table: pa.Table, spool: Spool, hosts: Mapping[str, tuple[str, int]]):
        self.task, self.spool = task, spool
        self.urls, self.uids = table["url"].to_pylist(), table["uid"].to_pylist()
        rules = task.config.rules(hosts)
        self.guard = Guard(rules, Hosts(rules, _known_hosts(task.state)))
        self.failures: dict[int, dict] = {}
        self.batch: list[int] = []
        self.missing: set[int] = set()
        self.seen: dict[str, Any] = {}
        self.error: Exception | None = None
        self.progress = task.state / "progress" / task.name
        self.decoder = _decoder(task.config)

    def run(self, rows: Sequence[int]) -> dict[int, dict]:
        """Pass over `rows` until each is finished or given up; return the facts of those that may be retried."""
        self.progress.parent.mkdir(parents=True, exist_ok=True)
        pending = list(rows)
        try:
            for _ in range(PASSES):
                self._wait(pending)
                self._pass(pending)
                self.guard.hosts.end_pass()
                # Rows that were asked for before go first: where a host counts, they are the ones it lets through.
                pending = sorted(filter(self._again, pending), key=lambda row: -self.guard.record(row).attempts)
                if not pending:
                    break
        finally:
            _remember_hosts(self.task, self.guard.hosts)
            self._write_ledger(rows)
        return self.failures

    def _again(self, row: int) -> bool:
        failure = self.failures.get(row)
        return failure is not None and self.guard.may_retry(row, failure["reason"])

    def _wait(self, rows: Sequence[int]) -> None:
        """Sleep until every row may be asked again; no thread waits for a single host."""
        ready = max(self.guard.record(row).not_before for row in rows)
        time.sleep(min(max(0.0, ready - time.monotonic()), self.task.config.max_wait))

    def _pass(self, rows: list[int]) -> None:
        self.batch = rows
        self.missing = set(rows)
        work = self.task.state / "work"
        work.mkdir(parents=True, exist_ok=True)
        feed = work / f"{self.task.name}.arrow"
        addresses = pa.table({"url": [tagged(self.urls[row], row) for row in rows]})
        with pa.ipc.new_file(str(feed), addresses.schema) as file:
            file.write_table(addresses)
        with self.guard.installed():
            self._img2dataset(work, len(rows)).download_shard((0, str(feed)))
        if self.error is not None:
            raise self.error
        assert not self.missing, f"img2dataset lost rows {sorted(self.missing)[:5]}"

    def _img2dataset(self, work: Path, count: int) -> Any:
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it asks the network for a newer version of itself
        from img2dataset.downloader import Downloader

        config = self.task.config
        return Downloader(
            sample_writer_class=lambda *_: self, resizer=self, thread_count=min(config.threads, count),
            save_caption=False, extract_exif=False, output_folder=str(work), column_list=["url"],
            timeout=config.connect_timeout, number_sample_per_shard=count, oom_shard_count=5, compute_hash=None,
            verify_hash_type=None, encode_format="jpg", retries=0, user_agent_token=config.user_agent,
            disallowed_header_directives=OPT_OUT if config.opt_out else None,
        )

    def __call__(self, stream: Any, boxes: None = None) -> tuple:
        """img2dataset's resizer: (jpeg, width, height, original width, original height, error)."""
        data = stream.getvalue()
        self.seen = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        try:
            got = self.decoder.decode(data)
        except Exception as error:  # img2dataset would print it and go on without the row
            self._stop(error)
            got = Decoded(error="download_error: stopped")
        return got.image, got.width, got.height, got.original_width, got.original_height, got.error

    def write(self, image: bytes | None, key: str, caption: None, meta: dict) -> None:
        """img2dataset's sample writer; `key` is the row's place in the pass."""
        row = self.batch[int(key)]
        seen, self.seen = self.seen, {}
        try:
            self._finish(row, image, meta, seen)
        except Exception as error:
            self._stop(error)
        self.missing.discard(row)

    def _finish(self, row: int, image: bytes | None, meta: dict, seen: dict) -> None:
        sizes = {name: meta[name] for name in ("width", "height", "original_width", "original_height")}
        facts = {"uid": self.uids[row], "http_status": self.guard.record(row).http_status, **seen, **sizes}
        if image is not None:
            facts |= {"status": "downloaded", "reason": None, "detail": None}
        else:
            reason, detail = parse_failure(meta["error_message"])
            facts |= {"status": status_of(reason), "reason": reason, "detail": detail}
        if facts["status"] == "retriable":
            self.failures[row] = facts
        else:
            self.failures.pop(row, None)
            self.spool.append(facts, image)
        with open(self.progress, "w") as file:
            file.write(str(len(self.spool.uids()) + len(self.failures)))

    def _stop(self, error: Exception) -> None:
        self.error = self.error or error
        self.guard.cancel()

    def close(self) -> None:
        """img2dataset's sample writer: the shard is written when its last pass is over, not here."""

    def _write_ledger(self, rows: Sequence[int]) -> None:
        """Append what each row cost: times and attempts differ between runs, so they are no part of `out`."""
        path = self.task.state / "ledger" / f"{self.task.name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        now = round(time.time(), 3)
        with open(path, "a", encoding="utf-8") as file:
            for row in rows:
                uid, record = self.uids[row], self.guard.record(row)
                facts = self.spool.facts(uid) if uid in self.spool else self.failures.get(row, {"status": "open"})
                line = {
                    "uid": uid, "url": self.urls[row], "shard": self.task.name, "at": now,
                    "attempts": record.attempts, "seconds": round(record.spent, 4),
                    "status": facts["status"], "reason": facts.get("reason"), "bytes": facts.get("bytes"),
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


# --- the decoder's process ---------------------------------------------------------------------------------

_decoders: dict[str, Decoder] = {}


def _decoder(config: PoolConfig) -> Decoder:
    """This process's decoder for the pool, started once: it imports while the first images download."""
    wanted = json.dumps({name: getattr(config, name) for name in DECODING}, sort_keys=True)
    if wanted not in _decoders:
        for old in _decoders.values():
            old.close()
        _decoders.clear()
        program = "import sys; from vlmpipe.curate.fetch import serve_decoder; serve_decoder(sys.argv[1])"
        _decoders[wanted] = Decoder([sys.executable, "-c", program, wanted], config.decode_timeout)
        _decoders[wanted].start()
    return _decoders[wanted]


def serve_decoder(wanted: str) -> None:
    """The decoder process: Pillow to RGB, then img2dataset's Resizer."""
    config = PoolConfig(urls="", **json.loads(wanted))
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    from img2dataset.resizer import Resizer

    resizer = Resizer(
        image_size=config.image_size, resize_mode=config.resize_mode, resize_only_if_bigger=True,
        encode_quality=config.jpeg_quality, encode_format="jpg", min_image_size=config.min_size,
        max_aspect_ratio=config.max_aspect_ratio or float("inf"),
    )
    serve(lambda data: convert(data, resizer, config.max_pixels))


def convert(data: bytes, resizer: Any, max_pixels: int) -> Decoded:
    """Turn an image file into the stored jpeg. The Resizer gets plain RGB only: OpenCV gets other modes wrong."""
    try:
        ppm = to_ppm(decode_rgb(data, max_pixels))
    except NotAnImage as error:
        return Decoded(error=str(error))
    image, width, height, original_width, original_height, error = resizer(io.BytesIO(ppm))
    if error is not None:
        return Decoded(error=f"{RESIZER_REASONS.get(error, 'broken_image')}: {error}")
    return Decoded(image, width, height, original_width, original_height)


# --- what the processes of a run tell each other -----------------------------------------------------------

def _forget_hosts(state: Path) -> None:
    for folder in ("hosts", "progress"):
        for path in (state / folder).glob("*"):
            path.unlink()


def _remember_hosts(task: ShardTask, hosts: Hosts) -> None:
    shards.write_json(task.state / "hosts" / f"{task.name}.json", hosts.facts())


def _known_hosts(state: Path) -> dict:
    known: dict[str, Any] = {"dead": {}, "answered": False}
    for path in sorted((state / "hosts").glob("*.json")):
        facts = shards.read_json(path)
        known["dead"] |= facts["dead"]
        known["answered"] |= facts["answered"]
    return known


def _watched(label: str, state: Path, tasks: list[ShardTask], todo: list[ShardTask]) -> AbstractContextManager[None]:
    """Print `label: rows done/rows (%) rows/s` while shards are on their way, wherever they run."""
    total = sum(task.rows for task in tasks)
    before = total - sum(task.rows for task in todo)
    start = time.monotonic()

    def show(last: bool) -> None:
        counts = [path.read_text() for path in (state / "progress").glob("*")]
        done = before + sum(int(count or 0) for count in counts)
        rate = (done - before) / (time.monotonic() - start)
        print(f"{label}: {done}/{total} ({100 * done // total}%) {rate:.1f}/s", file=sys.stderr, flush=True)

    return shown_while(show)


def _write_timing(state: Path, started: float, entries: list[dict], done: list[dict]) -> None:
    seconds = time.time() - started
    images = sum(entry["downloaded"] for entry in done)
    shards.write_json(state / "timing.json", {
        "started": started, "seconds": seconds, "rows": sum(entry["rows"] for entry in entries),
        "shards_fetched": len(done), "images": images, "images_per_second": images / seconds,
    })
