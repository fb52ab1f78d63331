"""Every small preset through the one pipeline: trained, evaluated beside its blind twin, gated, compared.

    make zoo [MODELS="clip clipseg"] [JOBS=2] [SET="train.pretrain.steps=100 ..."]

Works in a clone of the committed code at `--workspace` (default zoo/), whose curation runs once; then each model is a
`dvc exp run -S model=NAME`. With jobs, so many train at a time, each in a copy of the workspace and on its share of the
cores: small models use one core better than two. A model that has finished is skipped, so an interrupted run goes on;
for changed code or settings take another workspace. What was measured so far is written to docs/zoo.md, with pictures
of what each says.
"""

import argparse
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.zoo_page import Row, picture, rows_of, write_page  # noqa: E402
from vlmpipe.compose import read_params  # noqa: E402
from vlmpipe.dispatch import cores  # noqa: E402
from vlmpipe.errors import UserError  # noqa: E402
from vlmpipe.shards import read_json, write_json  # noqa: E402

WIDTH = 128  # of the words in a small preset; the published sizes are wider
WORLD = "world.scenes.tasks.names=[captions,classes,detection,regions]"
PARENTS = ("pack", "scorer")  # what all models start from
LAST = "gate_finetune"


def small_presets() -> list[str]:
    """The presets that train on two cores in minutes."""
    files = sorted((ROOT / "configs" / "model").glob("*.yaml"))
    return [file.stem for file in files if width(yaml.safe_load(file.read_text(encoding="utf-8"))) <= WIDTH]


def width(preset: dict) -> int:
    """Of the words; a preset that swaps other groups holds its model one level deeper."""
    return preset.get("model", preset)["architecture"]["text"]["transformer"]["width"]


def main() -> int:
    options = parse_arguments()
    space = options.workspace.resolve()
    known = small_presets()
    for name in options.models:
        if name not in known:
            raise UserError(f"found model '{name}'; expected some of {', '.join(known)}")
    wanted = options.models or known
    done = [name for name in wanted if done_before(space, name, options.set)]
    for name in done:
        print(f"{name}: done before", flush=True)
    prepare(space, options.set)
    publish(space, known)
    train_all(space, [name for name in wanted if name not in done], known, options)
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="default: every small preset")
    parser.add_argument("--workspace", type=Path, default=Path("zoo"), help="default: zoo")
    parser.add_argument("--jobs", type=int, default=1, help="models that train at a time; default: 1")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of all models' params")
    options = parser.parse_args()
    if options.jobs < 1:
        raise UserError(f"--jobs: found {options.jobs}; expected at least 1")
    return options


def done_before(space: Path, name: str, settings: Sequence[str]) -> bool:
    """Whether a model was measured with these settings.

    Raises:
        UserError: it was measured with others.
    """
    rows = read_rows(space, name)
    if rows and rows[0].settings != tuple(settings):
        raise UserError(
            f"{space}: found {name} measured with {' '.join(rows[0].settings) or 'the defaults'}; expected "
            f"{' '.join(settings) or 'the defaults'}; set the same, name other models or take another --workspace"
        )
    return bool(rows)


# --- the workspace -----------------------------------------------------------------------------------------

def read_rows(space: Path, name: str) -> list[Row]:
    """What was measured of a model; nothing if it was not run."""
    path = space / "rows" / f"{name}.json"
    found = read_json(path) if path.exists() else []
    return [Row(**{**row, "settings": tuple(row["settings"])}) for row in found]


def prepare(space: Path, chosen: Sequence[str]) -> None:
    """Clone the code, and run what all models start from."""
    if not (space / ".git").exists():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(space)], check=True)
    (space / "rows").mkdir(exist_ok=True)
    overrides = [word for setting in [WORLD, *chosen] for word in ("--set", setting)]
    call(space, [sys.executable, "-m", "vlmpipe", "compose", "--profile", "scenes", *overrides], live=True)
    call(space, ["dvc", "repro", *PARENTS], live=True)


def train_all(space: Path, names: Sequence[str], known: Sequence[str], options: argparse.Namespace) -> None:
    """Every model, `jobs` at a time; the page is written anew behind each."""
    free: SimpleQueue[Path] = SimpleQueue()
    for place in [space] if options.jobs == 1 else [copy_of(space, number) for number in range(options.jobs)]:
        free.put(place)
    lock = threading.Lock()

    def one(name: str) -> None:
        place = free.get()
        try:
            train(space, place, name, options)
            with lock:
                if place != space:  # DVC keeps experiments as git references
                    call(space, ["git", "fetch", "--quiet", str(place), "+refs/exps/*:refs/exps/*"])
                publish(space, known)
        finally:
            free.put(place)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, names))


def copy_of(space: Path, number: int) -> Path:
    """A copy of the workspace, its data and cache; one that is there goes on from where it is."""
    place = space / "jobs" / str(number)
    if not place.exists():
        half = place.with_name(f".{number}.partial")
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(space, half, symlinks=True, ignore=shutil.ignore_patterns("jobs", "rows"))
        half.rename(place)
    return place


def train(space: Path, place: Path, name: str, options: argparse.Namespace) -> None:
    """One experiment in `place`; its rows and its picture, also where a gate stopped it behind its last evaluation."""
    print(f"{name}: training", flush=True)
    for stale in place.glob("results/*/metrics/*.json"):
        stale.unlink()
    # As `vlmpipe compose` does: a value can be set that its config file leaves at its default.
    settings = [WORLD, *options.set]
    if options.jobs > 1:
        settings.append(f"cluster.threads={max(1, cores() // options.jobs)}")
    plain = [f"++{setting}" if "." in setting.partition("=")[0] else setting for setting in settings]
    overrides = [word for setting in [f"model={name}", *plain] for word in ("-S", setting)]
    call(place, ["dvc", "exp", "remove", name], check=False)  # of a run that was interrupted
    code = call(place, ["dvc", "exp", "run", "--name", name, *overrides, LAST], live=True, check=False)
    params = read_params(place / "params.yaml")
    try:
        rows = rows_of(name, place, params, passed=code == "0", settings=options.set)
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        return
    picture(place, params, rows[0], ROOT / "docs" / "images" / "zoo" / f"{name}.jpg")
    write_json(space / "rows" / f"{name}.json", [vars(row) for row in rows])
    print(f"{name}: {'passed its gates' if code == '0' else 'stopped by a gate'}", flush=True)


def publish(space: Path, known: Sequence[str]) -> None:
    """The page of all that was measured so far."""
    found = [row for file in sorted((space / "rows").glob("*.json")) for row in read_rows(space, file.stem)]
    shown = call(space, ["dvc", "exp", "show", "--csv", "--only-changed"], check=False)
    write_page(ROOT / "docs" / "zoo.md", found, known, shown)


def call(space: Path, command: Sequence[str], live: bool = False, check: bool = True) -> str:
    """Run in the workspace with this interpreter's commands; what it wrote, or, live, its exit status."""
    home = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{home}{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    output = {} if live else {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    done = subprocess.run(command, cwd=space, env=environment, text=True, **output)
    if check and done.returncode:
        raise UserError(f"found status {done.returncode} from {' '.join(command[:4])} in {space}; see above")
    return str(done.returncode) if live else done.stdout


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
