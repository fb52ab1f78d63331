"""A workspace made by hand: pictures behind the loopback web, a small scorer, and stages typed one by one."""

import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from shlex import split

import yaml

from tests.curate.made_pools import jpeg, picture
from vlmpipe import shards
from vlmpipe.__main__ import main

ROOT = Path(__file__).parents[1]
PICTURES = 24
TRANSFORMER = {"width": 32, "depth": 2, "heads": 4, "hidden": 48}
POOL = {
    "urls": "list.csv", "serve": {"kind": "folder", "path": ".", "hosts": ["images.test=pictures"]},
    "samples_per_shard": 12, "threads": 4, "deadline": 5.0, "max_wait": 1.0,
}
PARAMS = {
    "profile": "hand", "root": "data", "results": "results", "trusted": "none", "questions": "none",
    "cluster": {"backend": "inline", "threads": 1},
    "pool": {"p": POOL},
    "curation": {
        "annotate": {}, "pack": {"validation": 0.1, "test": 0.1},
        "select": {"order": ["downloaded", "decoded", "clip"], "clip": {"min": -1.0}},
    },
    "model": {"architecture": {
        "vision": {"image_size": 32, "patch_size": 8, "stem": "conv", "stem_width": 8, "transformer": TRANSFORMER},
        "text": {"context": 48, "transformer": TRANSFORMER},
        "fusion": {"kind": "prefix", "merge": 2, "attention": "full"}, "heads": {"language_model": {}},
    }},
    "train": {"pretrain": {"steps": 6, "batch_size": 8, "checkpoint_every": 2, "log_every": 2}},
    "publish": {},
}
DOWNLOAD = split("download p --urls list.csv --out data/pools/p --state data/state/download/p")
ANNOTATE = split("annotate p --pool data/pools/p --scorer data/scorer --out data/annotations/p")
SELECT = split("select --pools data/pools --annotations data/annotations --questions none --out data/selection")
PACK = split("pack --pools data/pools --annotations data/annotations --selection data/selection --verdict verdict.json "
             "--out data/packed")
PRETRAIN = split("pretrain --packed data/packed --scorer data/scorer --out data/models/pretrain "
                 "--state data/state/pretrain")


def lay_out(place: Path) -> None:
    """What the first stage needs: pictures, their list with one dead link, a scorer, params.yaml, a gate's verdict."""
    from tests.models.tiny import make
    from vlmpipe.models.directory import save

    (place / "pictures").mkdir()
    for number in range(PICTURES):
        (place / f"pictures/{number}.jpg").write_bytes(jpeg(picture(number)))
    (place / "list.csv").write_bytes(url_list())
    (place / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    shards.write_json(place / "verdict.json", {"passed": True})
    save(*make("dual"), place / "data/scorer")


def url_list() -> bytes:
    rows = [f"http://images.test/{number}.jpg,picture number {number}" for number in range(PICTURES)]
    return "\n".join(["url,caption", *rows, "http://images.test/gone.jpg,a dead link"]).encode()


def curate(place: Path) -> None:
    """Every stage up to `pack`."""
    with contextlib.chdir(place):
        for words in (DOWNLOAD, ANNOTATE, SELECT, PACK):
            assert main(words) == 0


def change(path: str, value: object) -> None:
    """Set a dotted key of params.yaml in the current folder."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    *parents, last = path.split(".")
    section = params
    for key in parents:
        section = section.setdefault(key, {})
    section[last] = value
    Path("params.yaml").write_text(yaml.safe_dump(params))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# --- its command line --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Said:
    """How a command ended, and all that it printed that is not its result."""

    status: int
    text: str


def call(capfd, *words: str) -> Said:
    """The command line without the seconds that a new process takes."""
    capfd.readouterr()
    return Said(main(list(words)), capfd.readouterr().err)


def typed(*words: str, **environment: str) -> Said:
    """`python -m vlmpipe …` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "vlmpipe", *words], capture_output=True, text=True, timeout=600,
        env=surroundings(**environment), check=False,
    )
    return Said(done.returncode, done.stdout + done.stderr)


def surroundings(**more: str) -> dict[str, str]:
    outside = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "VLMPIPE_DEBUG")}
    return {**outside, "PYTHONPATH": str(ROOT), "DVC_NO_ANALYTICS": "1", **more}


def refused(said: Said, *expected: str, status: int = 2) -> str:
    """Insist on a user's error: the status, no traceback, one line of ours and in it what is expected."""
    lines = [line for line in said.text.splitlines() if line.startswith("error: ")]
    assert said.status == status and "Traceback" not in said.text and len(lines) == 1, said.text[-3000:]
    missing = [text for text in expected if text not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"
    return lines[0]
