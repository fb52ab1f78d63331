"""Images per second of our download, of the plain `img2dataset` command and of the cores themselves, side by side.

    make bench-download        python benchmarks/download.py [--images N] [--repeats N] [--threads N]

The same loopback server (a process of its own), the same list, cores, number of threads, size and quality of what is
stored. Ours runs as a user runs it, with the guard, the spool and the ledger. The order alternates. The server
shares the cores with either downloader. "From the first request" leaves the start-up out: from the first picture
that the server is asked for to the last file that the downloader writes. CPU time beyond start-up (that of a run of
a few pictures) is what an image costs on a machine that others use too, where seconds say little. The ceiling is
decode, resize and encode alone, on all cores, from memory: once as img2dataset does it and once as we do.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import yaml
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # `picture_server` stands beside this file, wherever it is started

from picture_server import DISTINCT, picture  # noqa: E402

from vlmpipe.curate.convert import convert  # noqa: E402
from vlmpipe.curate.pixels import Wanted  # noqa: E402
from vlmpipe.shards import read_manifest, write_table  # noqa: E402

SIZE, QUALITY, PER_SHARD = 256, 95, 1000
TARGET = 1.2
FEW = 32  # pictures of the run that shows what the start-up costs
CEILING_SECONDS = 4.0
ADDRESSES = [f"127.0.0.{n}" for n in range(1, 9)] if sys.platform == "linux" else ["127.0.0.1"]
OURS, PEER = "vlmpipe download", "img2dataset"


@dataclass(frozen=True)
class Result:
    """One run: images stored, seconds in all and from the first request, CPU seconds of the downloader."""

    images: int
    whole: float
    working: float
    cpu: float


@contextmanager
def server() -> Iterator[int]:
    child = subprocess.Popen([sys.executable, str(HERE / "picture_server.py")],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield int(child.stdout.readline())
    finally:
        child.stdin.close()
        child.wait()


def write_list(path: Path, count: int, port: int) -> None:
    urls = [f"http://{ADDRESSES[i % len(ADDRESSES)]}:{port}/{i}.jpg" for i in range(count)]
    write_table(path, pa.table({"url": urls, "caption": [f"picture {i}" for i in range(count)]}))


def run_ours(urls: Path, out: Path, threads: int, cores: int) -> int:
    pool = {"urls": str(urls), "image_size": SIZE, "jpeg_quality": QUALITY, "allow_addresses": ["127.0.0.0/8"],
            "samples_per_shard": PER_SHARD, "threads": threads, "host_connections": 0}
    params = {"pool": {"bench": pool}, "cluster": {"backend": "inline"}}
    (out / "params.yaml").write_text(yaml.safe_dump(params))
    _run([sys.executable, "-m", "vlmpipe", "download", "bench", "--urls", urls, "--out", out / "pool",
          "--state", out / "state", "--params", out / "params.yaml"], out / "log")
    return read_manifest(out / "pool")["downloaded"]


def run_peer(urls: Path, out: Path, threads: int, cores: int) -> int:
    command = shutil.which("img2dataset", path=str(Path(sys.executable).parent)) or "img2dataset"
    _run([command, "--url_list", urls, "--input_format", "parquet", "--url_col", "url", "--caption_col", "caption",
          "--output_format", "webdataset", "--output_folder", out / "pool", "--number_sample_per_shard", PER_SHARD,
          "--image_size", SIZE, "--resize_mode", "keep_ratio_largest", "--resize_only_if_bigger", "True",
          "--encode_quality", QUALITY, "--processes_count", cores, "--thread_count", threads // cores], out / "log")
    import pyarrow.parquet as pq

    tables = [pq.read_table(path) for path in (out / "pool").glob("*.parquet")]
    return sum(table["status"].to_pylist().count("success") for table in tables)


def _run(command: Sequence, log: Path) -> None:
    with open(log, "w") as file:
        code = subprocess.run([str(part) for part in command], stdout=file, stderr=subprocess.STDOUT, check=False)
    if code.returncode:
        raise SystemExit(f"{command[:4]} ended with {code.returncode}:\n{log.read_text()[-2000:]}")


def measure(run, urls: Path, port: int, threads: int, cores: int) -> Result:
    out = Path(tempfile.mkdtemp(prefix="bench-download-"))
    try:
        _first_request(port)
        spent, started = _cpu(), time.time()
        images = run(urls, out, threads, cores)
        ended = time.time()
        last = max(path.stat().st_mtime for path in (out / "pool").rglob("*"))
        return Result(images, ended - started, last - _first_request(port), _cpu() - spent)
    finally:
        shutil.rmtree(out)


def _first_request(port: int) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/since") as answer:
        text = answer.read().decode()
    return float("nan") if text == "None" else float(text)


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


# --- the ceiling -------------------------------------------------------------------------------------------

def ceiling(kind: str, cores: int) -> float:
    """Images per second that the cores decode, resize and encode, nothing else done."""
    with ProcessPoolExecutor(cores) as pool:
        return sum(pool.map(_decode_rate, [kind] * cores))


def _decode_rate(kind: str) -> float:
    step = {OURS: _our_step, PEER: _peer_step}[kind]()
    bodies = [picture(seed) for seed in range(DISTINCT)]
    for body in bodies[:20]:
        step(body)
    started, done = time.process_time(), 0  # of a core that is all ours, even where others use it
    while time.process_time() - started < CEILING_SECONDS:
        step(bodies[done % len(bodies)])
        done += 1
    return done / (time.process_time() - started)


def _our_step():
    wanted = Wanted(image_size=SIZE, jpeg_quality=QUALITY)
    return lambda body: convert(body, wanted)


def _peer_step():
    import io

    from img2dataset.resizer import Resizer

    resizer = Resizer(SIZE, "keep_ratio_largest", True, encode_quality=QUALITY)
    return lambda body: resizer(io.BytesIO(body))


# --- the page ----------------------------------------------------------------------------------------------

def main() -> int:
    options = _options()
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    runs: dict[str, list[Result]] = {OURS: [], PEER: []}
    with server() as port, tempfile.TemporaryDirectory() as folder:
        urls, few = Path(folder) / "list.parquet", Path(folder) / "few.parquet"
        write_list(urls, options.images, port)
        write_list(few, FEW, port)
        starts = {name: measure(run, few, port, options.threads, cores).cpu
                  for name, run in ((OURS, run_ours), (PEER, run_peer))}
        print(f"  start-up: {', '.join(f'{name} {cpu:.1f} s of CPU' for name, cpu in starts.items())}", flush=True)
        for turn in range(options.repeats):
            order = [(OURS, run_ours), (PEER, run_peer)]
            for name, run in order if turn % 2 else order[::-1]:
                result = measure(run, urls, port, options.threads, cores)
                runs[name].append(result)
                print(f"  {name:18} {result.images} images, {result.whole:.1f} s in all, "
                      f"{result.working:.1f} s from the first request, {result.cpu:.1f} s of CPU", flush=True)
    return _show(runs, {name: ceiling(name, cores) for name in (PEER, OURS)}, starts, options.images, cores)


def _show(
    runs: dict[str, list[Result]], limits: dict[str, float], starts: dict[str, float], asked: int, cores: int
) -> int:
    table = Table(title=f"{asked} JPEGs of 640x480 or so to {SIZE} px, {cores} cores, server included; medians")
    for name in ("", "images/s", "with start-up", "CPU ms an image beyond start-up", "pure decode-resize-encode",
                 "share of it"):
        table.add_column(name, justify="right" if name else "left")
    rates, each = {}, {}
    for name, results in runs.items():
        assert all(result.images == asked for result in results), f"{name} stored {[r.images for r in results]}"
        working, whole = (statistics.median(asked / getattr(r, k) for r in results) for k in ("working", "whole"))
        rates[name] = working, whole
        each[name] = 1000 * (statistics.median(r.cpu for r in results) - starts[name]) / (asked - FEW)
        table.add_row(name, f"{working:.0f}", f"{whole:.0f}",
                      f"{each[name]:.2f}", f"{limits[name]:.0f}/s", f"{working / limits[name]:.0%}")
    Console(width=130).print(table)
    working, whole = (rates[OURS][k] / rates[PEER][k] for k in range(2))
    print(f"ratio {working:.2f} from the first request, {whole:.2f} with start-up; target {TARGET}; "
          f"{'met' if min(working, whole) >= TARGET else 'not met'}; "
          f"{rates[OURS][0] / limits[PEER]:.0%} of img2dataset's own pure decode-resize-encode rate; "
          f"img2dataset takes {each[PEER] / each[OURS]:.2f} times the CPU beyond start-up")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=4, help="runs of either, in alternating order")
    parser.add_argument("--threads", type=int, default=64, help="connections at once, of either")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
