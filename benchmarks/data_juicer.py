"""annotate + select against Data-Juicer on the same 10,000 pictures, with the operators that both have.

    make bench-data-juicer        python benchmarks/data_juicer.py [--pictures N] [--processes N] [--cache DIR]

Sizes, aspect, file size, caption length, words, repeated characters and words, special characters, perceptual-hash
duplicates. Both read the same bytes from this disk (we from shards, Data-Juicer from files, as each likes it best),
use as many processes, and start from nothing; the keep-or-drop decisions are compared row by row.
Data-Juicer gets an environment of its own under --cache, made on the first run (needs a package index).

Pictures: the textbook figures of --data where they are, else made ones of 384 pixels; each again mirrored and cropped
until there are enough, and 5% of the rows repeat an earlier picture under another caption.
"""

import argparse
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

PACKAGES = (
    "py-data-juicer==1.6.1", "aiohttp", "av", "fastapi", "uvicorn", "opencv-python-headless", "PyWavelets",
    "scipy", "scikit-learn", "tqdm",
)
WITHOUT_DEPENDENCIES = ("imagededup",)  # it asks for torch and torchvision, which its hashes don't need
TARGET = 5.0
REPEATED = 0.05
LIMITS = {
    "side": 100, "aspect": 3.0, "bytes": 2048, "chars": (20, 600), "words": (4, 100), "char_repetition": 0.1,
    "word_repetition": 0.2, "special": 0.25,
}


# --- Data-Juicer's side: run by the Python of its environment ----------------------------------------------

def run_peer(config: str) -> None:
    """Run Data-Juicer on a config file, as its command does."""
    import importlib.util
    import types

    # imagededup's packages import torch for its neural method; its hashes are reached past them.
    root = Path(importlib.util.find_spec("imagededup").submodule_search_locations[0])
    for name in ("methods", "utils"):
        package = types.ModuleType(f"imagededup.{name}")
        package.__path__ = [str(root / name)]
        sys.modules[package.__name__] = package
    from imagededup.methods import hashing

    for name in ("PHash", "DHash", "WHash", "AHash"):
        setattr(sys.modules["imagededup.methods"], name, getattr(hashing, name))
    from data_juicer.config import init_configs
    from data_juicer.core import DefaultExecutor

    DefaultExecutor(init_configs(["--config", config])).run()


def peer_recipe(folder: Path, processes: int) -> dict:
    """Data-Juicer's config, as json is yaml."""
    side, most = LIMITS["side"], LIMITS["aspect"]
    return {
        "project_name": "bench", "dataset_path": str(folder / "pairs.jsonl"), "np": processes,
        "export_path": str(folder / "peer/kept.jsonl"), "use_cache": False, "open_tracer": False,
        "process": [
            {"image_shape_filter": {"min_width": side, "min_height": side}},
            {"image_aspect_ratio_filter": {"min_ratio": 1 / most, "max_ratio": most}},
            {"image_size_filter": {"min_size": str(LIMITS["bytes"])}},
            {"text_length_filter": dict(zip(("min_len", "max_len"), LIMITS["chars"]))},
            {"words_num_filter": {"lang": "en", **dict(zip(("min_num", "max_num"), LIMITS["words"]))}},
            {"character_repetition_filter": {"rep_len": 10, "max_ratio": LIMITS["char_repetition"]}},
            {"word_repetition_filter": {"lang": "en", "rep_len": 5, "max_ratio": LIMITS["word_repetition"]}},
            {"special_characters_filter": {"max_ratio": LIMITS["special"]}},
            {"image_deduplicator": {"method": "phash"}},
        ],
    }


def peer_python(cache: Path) -> Path:
    """The Python of Data-Juicer's environment, which is made when it is not there."""
    home = cache / PACKAGES[0].replace("==", "-")
    python, ready = home / "bin/python", home / ".ready"
    if not ready.exists():
        print(f"making {home} for {PACKAGES[0]} (once, some minutes)", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, *PACKAGES], check=True)
        subprocess.run([*pip, "--no-deps", *WITHOUT_DEPENDENCIES], check=True)
        ready.touch()
    return python


# --- our side ----------------------------------------------------------------------------------------------

def run_ours(folder: Path, processes: int) -> None:
    from vlmpipe.config import parse
    from vlmpipe.curate.annotate import AnnotateConfig, annotate
    from vlmpipe.curate.filters import SelectConfig, select
    from vlmpipe.dispatch import Cluster

    off = dict.fromkeys(("quality", "language", "pii", "embeddings"))
    settings = parse(AnnotateConfig, {**off, "hashes": {"pixels": False}, "threads": 0}, "annotate")
    start = time.perf_counter()
    cluster = Cluster(backend="processes", tasks=processes)
    annotate("pairs", folder / "pools/pairs", folder / "no scorer", folder / "notes/pairs", settings, cluster)
    annotated = time.perf_counter()
    config = parse(SelectConfig, our_rules(), "select")
    select(folder / "pools", folder / "notes", folder / "no questions", folder / "selection", config)
    times = {"annotate": annotated - start, "select": time.perf_counter() - annotated}
    (folder / "ours.json").write_text(json.dumps(times))


def our_rules() -> dict:
    least, most = LIMITS["chars"]
    fewest, many = LIMITS["words"]
    rules = {
        "file_size": {"column": "bytes", "min": LIMITS["bytes"]},
        "char_repetition": {"column": "char_repetition", "max": LIMITS["char_repetition"]},
        "word_repetition": {"column": "word_repetition", "max": LIMITS["word_repetition"]},
        "special_characters": {"column": "special_characters", "max": LIMITS["special"]},
    }
    order = ["downloaded", "decoded", "small", "elongated", "file_size", "caption_chars", "caption_words",
             "char_repetition", "word_repetition", "special_characters", "near_duplicate"]
    return {
        "order": order, "prefer": "first", "rules": rules, "small": {"min_side": LIMITS["side"]},
        "elongated": {"max_aspect": LIMITS["aspect"]}, "caption_chars": {"min": least, "max": most},
        "caption_words": {"min": fewest, "max": many},
        "near_duplicate": {"radius": 0, "match": -1.0},  # as Data-Juicer: equal hashes, colours unseen
    }


# --- pictures ----------------------------------------------------------------------------------------------

def pairs(data: Path, count: int) -> list[tuple[bytes, str]]:
    """(jpeg, caption) of `count` pairs, the same on every run."""
    sources = textbook_pairs(data) if (data / "pairs.parquet").exists() else made_pairs(count // 3 + 1)
    fresh = count - int(count * REPEATED)
    made = [varied(*sources[number % len(sources)], number // len(sources)) for number in range(fresh)]
    return made + [(made[7 * n % fresh][0], f"again: {made[n][1]}") for n in range(count - fresh)]


def textbook_pairs(data: Path) -> list:
    import pyarrow.parquet as pq

    from vlmpipe.images import decode_rgb

    table = pq.read_table(data / "pairs.parquet", columns=["file", "alt", "caption"])
    rows = zip(*(column.to_pylist() for column in table.columns))
    return [(decode_rgb((data / file).read_bytes()), caption or alt or "") for file, alt, caption in rows]


def made_pairs(count: int) -> list:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (count, 12, 16, 3), np.uint8)
    return [
        (Image.fromarray(p).resize((384, 288), Image.Resampling.BICUBIC), f"a scene of coloured areas, number {n}")
        for n, p in enumerate(pictures)
    ]


def varied(image: object, caption: str, variant: int) -> tuple[bytes, str]:
    from PIL import ImageOps

    if variant == 1:
        image = ImageOps.mirror(image)
    elif variant > 1:
        image = ImageOps.crop(image, min(image.size) // 12 + variant)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue(), caption


def write_inputs(folder: Path, rows: list[tuple[bytes, str]], processes: int) -> None:
    """The same pairs as a pool of shards and as files with a list."""
    import pyarrow as pa

    from vlmpipe import shards
    from vlmpipe.images import decode_rgb

    (folder / "files").mkdir(parents=True)
    lines, records = [], []
    for number, (data, caption) in enumerate(rows):
        uid = f"{number:032x}"
        file = folder / f"files/{uid}.jpg"
        file.write_bytes(data)
        width, height = decode_rgb(data).size
        lines.append(json.dumps({"text": caption, "images": [str(file)], "uid": uid}))
        records.append({
            "uid": uid, "url": f"http://pairs.test/{uid}", "caption": caption, "status": "downloaded", "reason": None,
            "bytes": len(data), "sha256": uid, "original_width": width, "original_height": height, "pool": "pairs",
        })
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    size = -(-len(rows) // (4 * processes))
    entries = []
    for number in range(0, len(rows), size):
        table = pa.Table.from_pylist(records[number : number + size])
        table = table.set_column(4, "reason", pa.nulls(len(table), pa.string()))
        members = ((f"{r['uid']}.jpg", rows[int(r["uid"], 16)][0]) for r in records[number : number + size])
        entries.append(shards.write_shard(folder / "pools/pairs", f"{number:05d}", table, members))
    shards.write_manifest(folder / "pools/pairs", "pool", entries)


# --- the comparison ----------------------------------------------------------------------------------------

def timed(command: list[str], log: Path) -> float:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MALLOC_ARENA_MAX": "4"}
    with log.open("w") as file:
        start = time.perf_counter()
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
        took = time.perf_counter() - start
    if code:
        sys.exit(f"{command[0]} ended with {code}:\n" + "\n".join(log.read_text().splitlines()[-15:]))
    return took


def operator_seconds(log: Path) -> float:
    """What Data-Juicer says that its operators took."""
    done = re.findall(r"Done in ([\d.]+)s", re.sub(r"\x1b\[[\d;]*m", "", log.read_text()))
    return sum(map(float, done))


def compare(folder: Path, rows: list[tuple[bytes, str]]) -> None:
    import pyarrow.parquet as pq

    with (folder / "peer/kept.jsonl").open() as file:
        theirs = {json.loads(line)["uid"] for line in file}
    decisions = pq.read_table(folder / "selection/decisions.parquet", columns=["uid", "kept", "reason"]).to_pylist()
    ours = {row["uid"] for row in decisions if row["kept"]}
    print(f"kept: ours {len(ours)}, Data-Juicer {len(theirs)}; the same decision on "
          f"{100 * (1 - len(ours ^ theirs) / len(rows)):.2f}% of {len(rows)} rows")
    counts: dict[str, int] = {}
    for row in decisions:
        if row["uid"] in ours ^ theirs:
            why = f"only Data-Juicer keeps it; ours: {row['reason']}" if not row["kept"] else _their_reason(
                rows[int(row["uid"], 16)][1])
            counts[why] = counts.get(why, 0) + 1
    for why, count in sorted(counts.items(), key=lambda item: -item[1]):
        print(f"  {count:5d}  {why}")


def _their_reason(caption: str) -> str:
    """Why Data-Juicer drops a row that we keep."""
    from vlmpipe.curate.annotators.caption import strip_special

    words = [word for word in re.split(r"[ \n\t]", caption) if strip_special(word)]
    if not LIMITS["words"][0] <= len(words) <= LIMITS["words"][1]:
        return "only we keep it; its words without lone punctuation and numbers are too few or many"
    return "only we keep it; its other hash (with the constant row and column) or list of characters"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=2, help="worker processes of each side")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/vlmpipe", help="of environments")
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared/data/textbooks")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        run_peer(options.peer)
    elif options.ours:
        run_ours(options.ours, options.processes)
    else:
        return side_by_side(options)
    return 0


def side_by_side(options: argparse.Namespace) -> int:
    import tempfile

    python = peer_python(options.cache)
    with tempfile.TemporaryDirectory(prefix="bench-data-juicer-") as name:
        folder = Path(name)
        rows = pairs(options.data, options.pictures)
        write_inputs(folder, rows, options.processes)
        recipe = folder / "recipe.yaml"
        recipe.write_text(json.dumps(peer_recipe(folder, options.processes)))
        script = str(Path(__file__).resolve())
        ours = timed([sys.executable, "-P", script, "--ours", name, "--processes", str(options.processes)],
                     folder / "ours.log")
        theirs = timed([str(python), "-P", script, "--peer", str(recipe)], folder / "peer.log")
        stages, operators = json.loads((folder / "ours.json").read_text()), operator_seconds(folder / "peer.log")
        print(f"{len(rows)} pictures, {options.processes} processes each, {os.cpu_count()} cores")
        print(f"whole process: ours {ours:.1f} s, Data-Juicer {theirs:.1f} s")
        print(f"at work: annotate {stages['annotate']:.1f} s + select {stages['select']:.1f} s, "
              f"Data-Juicer's operators {operators:.1f} s: {operators / sum(stages.values()):.1f} times")
        compare(folder, rows)
        print(f"ratio {theirs / ours:.2f} (target {TARGET:g})")
    return 0 if theirs / ours >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
