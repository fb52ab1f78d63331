"""Bad input through the command line: one line that says what was found, expected and to do, a status that is not 0,
and nothing half-written that a later stage takes for whole."""

import contextlib
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.by_hand import (
    ANNOTATE,
    DOWNLOAD,
    PACK,
    PICTURES,
    PRETRAIN,
    ROOT,
    SELECT,
    Said,
    call,
    change,
    contents,
    curate,
    lay_out,
    refused,
    surroundings,
    typed,
)
from tests.conftest import Workspace, copy_workspace
from vlmpipe import shards
from vlmpipe.curate import ledger

REAL_LIST = ROOT.parent / "shared/data/url-lists/laion_like_10000.parquet"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A workspace by hand in which every stage up to `pack` is done."""
    place = tmp_path_factory.mktemp("whole")
    lay_out(place)
    curate(place)
    return place


@pytest.fixture
def place(whole, tmp_path, monkeypatch) -> Path:
    """A copy of it to spoil, and to stand in."""
    shutil.copytree(whole, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


# --- configs -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path, value, words, expected", [
    ("pool.p.thredas", 5, DOWNLOAD, ("params.yaml: pool.p: unknown key 'thredas'; did you mean 'threads'?",)),
    ("pool.p.columns.captoin", "c", DOWNLOAD, ("pool.p.columns: unknown key 'captoin'; did you mean 'caption'?",)),
    ("pool.p.threads", "many", DOWNLOAD, ("pool.p.threads: found str 'many'; expected int",)),
    ("pool.p.serve.kind", "folders", DOWNLOAD, ("pool.p.serve.kind: found 'folders'", "did you mean 'folder'?")),
    ("pool", {"q": {"urls": "list.csv"}}, DOWNLOAD, ("found no section 'p'; expected one of: q",)),
    ("modle.architecture", {"a": 1}, DOWNLOAD, ("params.yaml: unknown key 'modle'; did you mean 'model'?",)),
    ("curation.selct", {"order": []}, DOWNLOAD, ("unknown key 'curation.selct'; did you mean 'select'?",)),
    ("cluster.worker", 2, DOWNLOAD, ("params.yaml: cluster: unknown key 'worker'; did you mean 'workers'?",)),
    ("curation.select.clip.top_fractoin", 0.3, SELECT, ("select.clip: unknown key 'top_fractoin'", "'top_fraction'")),
    ("model.architecture.text.transformer.dept", 3, PRETRAIN, ("text.transformer: unknown key 'dept'", "'depth'")),
])
def test_an_unknown_or_unfit_key_is_named_with_its_path_and_the_nearest(place, capfd, path, value, words, expected):
    change(path, value)
    before = contents(place / "data")
    refused(call(capfd, *words), *expected)
    assert contents(place / "data") == before


@pytest.mark.parametrize("data, expected", [
    (b"pool: {p: [", "params.yaml is not yaml"), (b"\xff\xfe\x00\x01", "params.yaml is not yaml"),
    (b"", "params.yaml: found NoneType; expected a mapping"),
])
def test_a_params_file_that_is_none_is_refused_and_can_be_composed_anew(tmp_path, monkeypatch, capfd, data, expected):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_bytes(data)
    assert "vlmpipe compose" in refused(call(capfd, *DOWNLOAD), expected)
    assert call(capfd, "compose", "--profile", "tiny").status == 0
    assert yaml.safe_load(Path("params.yaml").read_text())["profile"] == "tiny"


@pytest.mark.parametrize("words, expected", [
    (["--set", "curation.select.clip.mni=0.3"], ("unknown key 'mni'; did you mean 'min'?",)),
    (["--set", "train.pretrian.steps=3"], ("unknown key 'train.pretrian'; did you mean 'pretrain'?",)),
    (["--set", "train.pretrain.steps=lots"], ("train.pretrain.steps: found str 'lots'; expected int",)),
    (["--set", "modle=clip"], ("modle", "did you mean 'model'?")),
    (["--set", "rot=data/x"], ("rot", "did you mean 'root'?")),
    (["--set", "pool=[scenes,mroe]"], ("found pool=[scenes,mroe]", "did you mean 'more'?")),
    (["--set", "model=clop"], ("clop", "did you mean 'clip'?")),
    (["--set", "model"], ("'model'", "expected KEY=VALUE")),
    (["--profile", "tinny"], ("tinny", "did you mean 'tiny'?")),
])
def test_what_is_set_wrongly_is_refused_before_anything_is_written(tmp_path, monkeypatch, capfd, words, expected):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    refused(call(capfd, "compose", *words), *expected)
    assert not Path("params.yaml").exists()


@pytest.mark.parametrize("words, expected", [
    (["run"], "found no dvc.yaml"), (["ui"], "found no dvc.yaml"), (["serve"], "found no dvc.yaml"),
    (["compose"], "found no configs"), (["models"], "found no params.yaml"), (DOWNLOAD, "found no params.yaml"),
    (["rollback", "v0.0.1"], "found no params.yaml"),
])
def test_outside_a_workspace_every_command_says_so(tmp_path, monkeypatch, capfd, words, expected):
    monkeypatch.chdir(tmp_path)
    refused(call(capfd, *words), expected, str(tmp_path))
    assert not list(tmp_path.iterdir())


# --- lists and pools ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, data, expected", [
    ("list.csv", b"URL,ALT\nhttp://a.test/1,a\n", ("found columns URL, ALT", "did you mean 'URL'?", "columns.url")),
    ("list.csv", b"url,caption\n", ("found no rows", "expected at least one pair")),
    ("none.parquet", None, ("found no URL list none.parquet", "set the pool's `urls`")),
    ("list.parquet", b"PAR1 and then nothing", ("list.parquet: found damaged parquet", "mend it")),
    ("list.xlsx", b"PK", ("found an unknown kind of file", ".parquet")),
])
def test_a_list_that_is_none_leaves_no_pool(place, capfd, name, data, expected):
    shutil.rmtree("data/pools/p")
    shutil.rmtree("data/state")
    if data is not None:
        Path(name).write_bytes(data)
    change("pool.p.urls", name)
    words = [name if word == "list.csv" else word for word in DOWNLOAD]
    refused(call(capfd, *words), *expected)
    refused(call(capfd, *ANNOTATE), "data/pools/p has no manifest.json", "rerun the stage that writes it")


def test_thousands_of_dead_urls_end_by_themselves_and_keep_their_evidence(place):
    rows = [f"http://host{number % 900}.invalid/{number}.jpg,caption {number}\n" for number in range(4000)]
    Path("list.csv").write_text("url,caption\n" + "".join(rows))
    change("pool.p", {"urls": "list.csv"})
    dead_end("list.csv", rows=4000, seconds=120)


@pytest.mark.slow
@pytest.mark.skipif(not REAL_LIST.exists(), reason="no ../shared/data with the list of real web addresses")
def test_ten_thousand_real_urls_without_a_network(place):
    change("pool.p", {"urls": str(REAL_LIST), "columns": {"url": "URL", "caption": "TEXT"}})
    dead_end(str(REAL_LIST), rows=10_000, seconds=300)


def dead_end(urls: str, rows: int, seconds: float) -> None:
    started = time.monotonic()
    said = typed(*(urls if word == "list.csv" else word for word in DOWNLOAD))
    assert time.monotonic() - started < seconds
    refused(said, f"pool 'p': found no image behind any of its {rows} URLs (", "check the network and the list")
    assert "download p: " in said.text  # how far it is
    table = shards.read_rows(Path("data/pools/p"), ["status", "reason"])
    assert set(table["status"].to_pylist()) <= {"retriable", "refused"} and table["reason"].null_count == 0
    assert len(table) == rows == ledger.summary(Path("data/state/download/p"))["rows"]


def test_a_selection_that_keeps_nothing_is_not_packed(place, capfd):
    change("curation.select.clip.min", 2.0)
    refused(typed(*SELECT), f"found no row of {PICTURES + 1} kept", f"clip {PICTURES} of {PICTURES}", "loosen the rule")
    assert shards.read_json(Path("data/selection/funnel.json"))["kept"] == 0
    packed = contents(place / "data/packed")
    refused(call(capfd, *PACK), "data/selection has no manifest.json", "rerun")
    assert contents(place / "data/packed") == packed
    change("curation.select.clip.min", -1.0)
    assert call(capfd, *SELECT).status == call(capfd, *PACK).status == 0


# --- more than there is ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ray_of_one() -> Iterator[dict[str, str]]:
    """A Ray of one CPU: the environment in which commands join it."""
    from vlmpipe.dispatch import local_ray

    with local_ray(cpus=1):
        joined = {key: value for key, value in os.environ.items() if key.startswith(("RAY_", "VLMPIPE_"))}
        for key in ("RAY_ADDRESS", "VLMPIPE_OWN_RAY"):  # other tests are not to join it
            del os.environ[key]
        yield joined


@pytest.mark.slow
def test_more_workers_than_ray_has_are_refused_at_once(place, ray_of_one):
    change("cluster", {"backend": "ray", "workers": 64, "cpus_per_worker": 1, "gpus_per_task": 99})
    shutil.rmtree("data/annotations/p")
    refused(typed(*PRETRAIN, **ray_of_one), "found 64 worker(s) asked for", "1 CPU/0 GPU", "lower cluster.workers")
    refused(typed(*ANNOTATE, **ray_of_one), "with 1 CPU and 99 GPU each", "lower cluster.gpus_per_task")


def test_workers_without_ray_are_refused(place, capfd):
    change("cluster.workers", 3)
    refused(call(capfd, *PRETRAIN), "cluster: found workers: 3 with backend: inline", "ray")


def test_a_second_download_of_a_pool_is_refused_while_one_is_going(place, capfd):
    change("pool.p", {"urls": "list.csv", "allow_addresses": ["127.0.0.0/8"], "deadline": 60.0})
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = "http://{}:{}/1.jpg".format(*silent.getsockname())
        Path("list.csv").write_text(f"url,caption\n{address},never answered\n")
        first = subprocess.Popen([sys.executable, "-m", "vlmpipe", *DOWNLOAD], env=surroundings(),
                                 stderr=subprocess.DEVNULL)
        try:
            silent.settimeout(120)
            connection, _ = silent.accept()
            refused(call(capfd, *DOWNLOAD), "found another download of pool 'p' at work", "wait for it")
            assert first.poll() is None
            connection.close()
        finally:
            first.kill()
            first.wait()


def test_a_second_run_and_a_rollback_are_refused_while_one_is_going(place):
    from vlmpipe.process import run_lock

    Path("dvc.yaml").write_text("stages: {}\n")
    subprocess.run(["git", "init", "-q"], check=True)
    with run_lock(Path("data/state/run.lock")):
        for words in (["run"], ["rollback", "v0.0.1"]):
            refused(typed(*words), f"already going (pid {os.getpid()})", "wait for it or end it")


# --- the champion ------------------------------------------------------------------------------------------

def test_asking_without_a_picture_or_a_champion(place, capfd):
    subprocess.run(["git", "init", "-q"], check=True)
    Path("text.jpg").write_text("no picture")
    for words in (["ask", "text.jpg", "what colour?"], ["caption", "text.jpg"]):
        refused(call(capfd, *words), "text.jpg: not_an_image", "expected a picture")
    refused(call(capfd, "caption", "gone.jpg"), "found no file gone.jpg; expected a picture")
    refused(call(capfd, "caption", "pictures"), "pictures", "expected a picture")
    refused(call(capfd, "ask", "pictures/0.jpg", "what?"), "found no champion of vlm-hand", "`vlmpipe run` makes one")
    refused(call(capfd, "caption", "pictures/0.jpg", "--model", "pictures"), "found no config.json in pictures")
    refused(call(capfd, "rollback", "v0.0.7"), "found no version 'v0.0.7'", "none yet")
    assert call(capfd, "models").status == 0


# --- a full disk -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Disk:
    """A folder that can run out of room: a file system of its own, or else by a limit on each file."""

    folder: Path
    mounted: bool

    @contextlib.contextmanager
    def room(self, size: int) -> Iterator[None]:
        """Room for `size` bytes more than it holds."""
        if self.mounted:
            facts = os.statvfs(self.folder)
            self._resize((facts.f_blocks - facts.f_bfree) * facts.f_frsize + size)
            try:
                yield
            finally:
                self._resize(64 << 20)
            return
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(size, 4096), before[1]))  # what it says goes to a file too
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def _resize(self, size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.folder)], check=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    mounted = bool(shutil.which("mount")) and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    yield Disk(folder, mounted)
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def put_at(words: list[str], folder: Path) -> list[str]:
    """The command with its outs and state in `folder`."""
    moved = list(words)
    for flag in {"--out", "--state"} & set(words):
        place = moved.index(flag) + 1
        moved[place] = str(folder / flag.strip("-"))
    return moved


def fits_or_full(said: Said, out: Path) -> bool:
    """Whether the stage ended well; else it must say that the disk is full, and leave nothing that looks whole."""
    if said.status:
        refused(said, "the disk is full (writing ", str(out), "expected free space; free some and rerun")
        assert not (out / shards.MANIFEST).exists() and not (out / "config.json").exists()
        assert not [path for path in out.rglob("*.partial") if path.is_file()]
    return said.status == 0


@pytest.mark.parametrize("words, whole_out", [
    (DOWNLOAD, "data/pools/p"), (ANNOTATE, "data/annotations/p"), (PACK, "data/packed"),
])
def test_a_stage_on_a_full_disk_says_so_and_a_rerun_completes(place, disk, capfd, words, whole_out):
    expected, words, out = contents(Path(whole_out)), put_at(words, disk.folder), disk.folder / "out"
    size = sum(map(len, expected.values()))
    ended = []
    for share in (0.02, 0.3, 0.6):  # the room that each run finds: what it finished takes none in the next
        with disk.room(int(share * size)):
            said = call(capfd, *words)
        ended.append(fits_or_full(said, out))
    assert not ended[0]
    assert call(capfd, *words).status == 0
    assert contents(out) == expected


def test_training_on_a_full_disk_says_so_and_goes_on_from_its_checkpoint(place, disk, capfd):
    assert call(capfd, *PRETRAIN).status == 0
    expected, words, out = contents(Path("data/models/pretrain")), put_at(PRETRAIN, disk.folder), disk.folder / "out"
    size = sum(map(len, expected.values()))  # a checkpoint takes three times that: weights and two moments
    ended = []
    for times in (0.001, 2, 1, 5, 1):  # no checkpoint, half of one, less than half of the next, …
        with disk.room(int(times * size)):
            said = call(capfd, *words)
        ended.append(fits_or_full(said, out))
    assert not ended[0] and not ended[1]
    assert call(capfd, *words).status == 0
    assert contents(out) == expected
    assert not disk.mounted or shards.read_json(disk.folder / "state/timing.json")["resumed_from"] > 0


@pytest.mark.slow
def test_a_worker_on_ray_says_that_the_disk_is_full(place, disk, ray_of_one):
    change("cluster", {"backend": "ray", "cpus_per_worker": 1, "threads": 1})
    for words, size in ((ANNOTATE, 4096), (PRETRAIN, 200_000)):
        moved = put_at(words, disk.folder)
        with disk.room(size):
            assert not fits_or_full(typed(*moved, **ray_of_one), disk.folder / "out")
        said = typed(*moved, **ray_of_one)
        assert said.status == 0, said.text[-3000:]
        shutil.rmtree(disk.folder / "out")


# --- a corrupt shard ---------------------------------------------------------------------------------------

def flip(path: Path, share: float, silently: bool = False) -> None:
    """Flip a bit of the byte at `share` of a file; `silently` as a disk does it: the file's times stay."""
    facts, data = path.stat(), bytearray(path.read_bytes())
    data[int(share * len(data))] ^= 1
    path.write_bytes(data)
    if silently:
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


REDO = [*ANNOTATE[:-1], "data/annotations/again"]  # annotations that are there already would not be made again


@pytest.mark.parametrize("share", [0.3, 0.99])  # a page of data, the footer
@pytest.mark.parametrize("damaged, readers, remedy", [
    ("data/pools/p/00001.tar", [PACK, REDO], DOWNLOAD),
    ("data/pools/p/00001.parquet", [PACK, SELECT, REDO], DOWNLOAD),
    ("data/annotations/p/00001.parquet", [PACK, SELECT], ANNOTATE),
    ("data/selection/decisions.parquet", [PACK], SELECT),
    ("data/packed/train/train-00000-of-00001.parquet", [PRETRAIN], PACK),
])
def test_a_corrupt_shard_is_named_with_a_remedy_that_works(whole, place, capfd, damaged, readers, remedy, share):
    flip(Path(damaged), share)
    before = contents(place / "data/packed")
    for words in readers:
        refused(call(capfd, *words), "corrupt shard", damaged, "delete the file, then rerun that stage")
    assert contents(place / "data/packed") == before and not Path("data/annotations/again/manifest.json").exists()
    Path(damaged).unlink()
    assert call(capfd, *remedy).status == 0
    for folder in ("pools", "annotations/p", "packed"):
        assert contents(place / "data" / folder) == contents(whole / "data" / folder)
    for words in reversed(readers):
        assert call(capfd, *words).status == 0


def test_a_stage_that_resumes_makes_its_corrupt_shard_again_without_being_told(whole, place, capfd):
    for damaged, words in (("pools/p/00000.parquet", DOWNLOAD), ("annotations/p/00001.parquet", ANNOTATE)):
        flip(Path("data") / damaged, 0.3)
        assert call(capfd, *words).status == 0
        assert Path("data", damaged).read_bytes() == (whole / "data" / damaged).read_bytes()


# --- through dvc and through the flow ----------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_dvc_mends_a_corrupt_shard_and_stops_at_bad_input(tiny, tmp_path, monkeypatch):
    workspace = copy_workspace(tiny, tmp_path / "workspace")
    monkeypatch.chdir(workspace.root)
    data, before = Path("data/tiny"), (workspace.root / "dvc.lock").read_bytes()
    for damaged, stage in (
        ("pools/scenes/00001.tar", "annotate@scenes"), ("annotations/scenes/00000.parquet", "select"),
        ("packed/train/train-00000-of-00001.parquet", "pack"),
    ):
        whole = (data / damaged).read_bytes()
        flip(data / damaged, 0.4)
        workspace.done("dvc", "repro", stage)
        assert (data / damaged).read_bytes() == whole and Path("dvc.lock").read_bytes() == before

    # Bits that a disk has flipped: DVC trusts the file's times, the stage that reads it does not.
    damaged = data / "pools/scenes/00001.parquet"
    flip(damaged, 0.4, silently=True)
    repro = ("dvc", "repro", "--single-item", "--force", "select")
    line = refused(ran(workspace, *repro), f"corrupt shard {damaged}", "`dvc checkout`", status=255)
    assert "delete the file" in line
    damaged.unlink()
    workspace.done("dvc", "checkout", str(damaged.parent))
    workspace.done(*repro)
    assert Path("dvc.lock").read_bytes() == before

    change("curation.select.clip.top_fracton", 0.5)
    refused(ran(workspace, "dvc", "repro", "select"), "unknown key 'top_fracton'", "'top_fraction'", status=255)
    Path("params.yaml").write_text("pool: [")
    said = ran(workspace, "dvc", "repro", "select")
    assert said.status == 255 and "Traceback" not in said.text and "params.yaml" in said.text
    assert Path("dvc.lock").read_bytes() == before


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_flow_ends_in_the_stages_own_line(tiny, tmp_path):
    workspace = copy_workspace(tiny, tmp_path / "workspace")
    run = ("python", "-m", "vlmpipe", "run", "--profile", "tiny", "--set")
    head = workspace.done("git", "rev-parse", "HEAD")
    refused(ran(workspace, *run, "curation.select.clip.mni=1"), "unknown key 'mni'; did you mean 'min'?")
    refused(ran(workspace, *run, "curation.select.clip.min=2.0"), "stage select: found no row of 240 kept", "loosen")
    assert workspace.done("git", "rev-parse", "HEAD") == head
    assert "v0.0.1" in workspace.done("python", "-m", "vlmpipe", "models")
    refused(ran(workspace, "python", "-m", "vlmpipe", "rollback", "v0.0.9"), "found no version 'v0.0.9'", "'v0.0.1'")


def ran(workspace: Workspace, *command: str) -> Said:
    done = workspace.run(*command, timeout=900)
    return Said(done.returncode, done.stdout + done.stderr)
