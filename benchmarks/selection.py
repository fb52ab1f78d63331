"""Selection and deduplication of simulated metadata: time and memory at two sizes, and how they grow.

    make bench-selection        python benchmarks/selection.py [--rows 1000000 10000000] [--folder DIR]

Counted: `select` from the pools on disk to the decisions on disk. Not counted, but shown: what a process does once,
whatever the rows, which is importing and loading (or, the first time on a machine, compiling) the loops of
`vlmpipe.curate.kernels`; for that the process selects from 1,000 rows first. With it the growth would look smaller.

The metadata is drawn (sizes, captions, languages, scores, hashes; 1% exact and 9% near-duplicates of hash and
thumbnail) and written as a pool and its annotations, then `select` runs in a process of its own with the default rules:
sizes, captions, language, evaluation overlap left out (there are no pictures), score, exact and perceptual
duplicates. No embeddings are written: no default rule reads one. The folder is deleted at the end.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from vlmpipe import shards
from vlmpipe.curate.duplicates import THUMBNAIL
from vlmpipe.curate.filters import ORDER, SelectConfig, select
from vlmpipe.progress import progress

SHARD = 100_000
FEW = 1000  # to select from before the clock starts
GROWTH = 1.2  # no worse than linear, times this
TARGET_GIB = 4.0
RULES = tuple(name for name in ORDER if name != "evaluation_overlap")
# Of the pool: no picture came, the picture repeats an earlier one exactly or nearly.
LOST, EXACT, NEAR = 0.2, 0.01, 0.09
PALETTE = 4096  # base thumbnails: noise on one of them compresses as real ones do


def main() -> None:
    options = parse_arguments()
    if options.select:
        measure_select(*options.select)
        return
    folder = Path(tempfile.mkdtemp(prefix="bench-selection-", dir=options.folder))
    try:
        simulate(folder / "few", FEW)
        results = [measure(folder / str(rows), rows, folder / "few") for rows in options.rows]
    finally:
        shutil.rmtree(folder)
    show(results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000], help="sizes, ascending")
    parser.add_argument("--folder", type=Path, help="where the simulated metadata lies meanwhile (3 GB)")
    parser.add_argument("--select", type=Path, nargs=2, help=argparse.SUPPRESS)  # the measured process
    return parser.parse_args()


def measure(folder: Path, rows: int, few: Path) -> dict:
    """Simulate, select in a fresh process that has selected from `few` rows, and forget the metadata."""
    simulate(folder, rows)
    disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    command = [sys.executable, __file__, "--select", few, folder]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(folder)
    return {"rows": rows, "disk": disk, **json.loads(ran.stdout)}


def measure_select(few: Path, folder: Path) -> None:
    start = time.perf_counter()
    run_select(few)
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    run_select(folder)
    seconds, used = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    funnel = shards.read_json(folder / "selection" / "funnel.json")
    steps = {step["reason"]: (step["rows_in"], step["dropped"]) for step in funnel["steps"]}
    print(json.dumps({
        "seconds": seconds, "cpu": cpu, "peak": peak, "once": begin - start, "kept": funnel["kept"], "steps": steps,
    }))


def run_select(folder: Path) -> None:
    config = SelectConfig(order=RULES)
    select(folder / "pools", folder / "annotations", folder / "nowhere", folder / "selection", config)


# --- the simulation ----------------------------------------------------------------------------------------

def simulate(folder: Path, rows: int) -> None:
    """Write pools/p and annotations/p, shard by shard; a duplicate repeats a row of its own or an earlier shard."""
    pool, notes = folder / "pools" / "p", folder / "annotations" / "p"
    rng = np.random.default_rng(rows)
    palette = rng.integers(0, 256, (PALETTE, THUMBNAIL), np.uint8)
    entries: list[list[dict]] = [[], []]
    earlier = np.zeros(0, np.uint64)  # what later rows repeat
    for number in progress(range(-(-rows // SHARD)), -(-rows // SHARD), f"simulate {rows:,} rows"):
        count = min(SHARD, rows - number * SHARD)
        origins = rng.integers(1, 2**64, count, np.uint64)
        kind = rng.choice(3, count, p=[1 - EXACT - NEAR, EXACT, NEAR])
        source = rng.choice(np.concatenate([earlier, origins]), count)
        origins = np.where(kind > 0, source, origins)
        raw, measured = draw(rng, origins, kind, palette)
        for directory, table, listed in ((pool, raw, entries[0]), (notes, measured, entries[1])):
            name = f"{number:05d}"
            shards.write_table(directory / f"{name}.parquet", table)
            digest = shards.sha256_file(directory / f"{name}.parquet")
            listed.append({"name": name, "rows": len(table), "files": {f"{name}.parquet": digest}})
        earlier = np.concatenate([earlier, origins[:: max(rows // 1_000_000, 1)]])
    shards.write_manifest(pool, "pool", entries[0])
    shards.write_manifest(notes, "annotations", entries[1])


def draw(
    rng: np.random.Generator, origins: np.ndarray, kind: np.ndarray, palette: np.ndarray
) -> tuple[pa.Table, pa.Table]:
    """One shard's rows. A picture is its origin: that gives its hash, thumbnail and, unless re-encoded, its bytes."""
    count = len(origins)
    here = rng.random(count) >= LOST
    width = np.exp(rng.normal(6.3, 0.6, count)).astype(np.int32) + 20
    height = (width / np.exp(rng.normal(0.15, 0.4, count))).astype(np.int32) + 20
    digest = np.where(kind == 2, rng.integers(1, 2**64, count, np.uint64), origins)
    raw = pa.table({
        "uid": hexes(rng.integers(0, 2**64, (count, 2), np.uint64)),
        "status": np.where(here, "downloaded", "refused"),
        "reason": pa.array(rng.choice(["http_404", "timeout", "too_large"], count), mask=here),
        "sha256": pa.array(hexes(np.repeat(digest[:, None], 4, axis=1)), mask=~here),
        "original_width": width, "original_height": height,
    })
    flips = np.where(kind == 2, rng.integers(0, 7, count), 0)  # bits that re-encoding moves
    hashes = origins.copy()
    for bit in range(6):
        hashes ^= np.where(flips > bit, np.uint64(1) << rng.integers(0, 64, count, np.uint64), np.uint64(0))
    thumbnails = palette[origins % PALETTE]
    words = rng.poisson(8, count).astype(np.int32)
    measured = pa.table({
        "uid": raw["uid"], "caption_words": words, "caption_chars": words * rng.integers(3, 8, count).astype(np.int32),
        "language": rng.choice(["en", "de", "fr", "zh", "und"], count, p=[0.5, 0.2, 0.15, 0.1, 0.05]),
        "language_score": rng.random(count).astype(np.float32),
        "clip_score": rng.normal(0.24, 0.06, count).astype(np.float32),
        "phash": hashes,
        "thumbnail": pa.Array.from_buffers(pa.binary(THUMBNAIL), count, [None, pa.py_buffer(thumbnails.tobytes())]),
        "error": pa.array(np.where(rng.random(count) < 0.002, "broken_image", None), pa.string()),
    })
    return raw, measured.filter(pa.array(here))


def hexes(numbers: np.ndarray) -> pa.Array:
    """uint64 [n, k] as texts of 16 k hex digits."""
    data = numbers.astype(">u8").tobytes().hex().encode()
    width = 16 * numbers.shape[1]
    offsets = pa.py_buffer(np.arange(0, len(data) + 1, width, dtype=np.int32))
    return pa.Array.from_buffers(pa.string(), len(numbers), [None, offsets, pa.py_buffer(data)])


# --- the result --------------------------------------------------------------------------------------------

def show(results: list[dict]) -> None:
    console = Console(width=110)
    table = Table("rows", "seconds", "of CPU", "rows/s", "peak memory", "kept", "metadata on disk", "once, not counted")
    for found in results:
        table.add_row(
            f"{found['rows']:,}", f"{found['seconds']:.1f}", f"{found['cpu']:.1f}",
            f"{found['rows'] / found['seconds']:,.0f}",
            f"{found['peak'] / 2**30:.2f} GiB", f"{found['kept']:,}", f"{found['disk'] / 1e9:.2f} GB",
            f"{found['once']:.1f} s",
        )
    console.print(table)
    for name, (rows_in, dropped) in results[-1]["steps"].items():
        console.print(f"  {name}: {dropped:,} of {rows_in:,}")
    first, last = results[0], results[-1]
    if first is last:
        return
    linear, grown = last["rows"] / first["rows"], last["seconds"] / first["seconds"]
    verdict = "met" if grown <= linear * GROWTH else "NOT met"
    target = f"target at most x{linear * GROWTH:.1f}: {verdict}"
    cpu = last["cpu"] / first["cpu"]
    console.print(f"growth in time: x{grown:.1f} for x{linear:.1f} rows (CPU time: x{cpu:.1f}); {target}")
    verdict = "met" if last["peak"] <= TARGET_GIB * 2**30 else "NOT met"
    console.print(f"peak memory at {last['rows']:,} rows: target at most {TARGET_GIB:.0f} GiB: {verdict}")


if __name__ == "__main__":
    main()
