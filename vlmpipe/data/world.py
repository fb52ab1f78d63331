"""The world stage: what stands in for the web, so that the pipeline runs with nothing from outside.

A world is URL lists (`pools/`), what their URLs answer (`web/`), a small trusted set for the scorer (`trusted/`),
questions in VQA format (`questions/{train,test}/`), the tasks that are asked for (`tasks/<task>/{train,test}/`), and
aside from what curation may read, `planted.parquet`.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from vlmpipe import shards
from vlmpipe.config import nearest
from vlmpipe.data import textbooks
from vlmpipe.data.captions import PAINTERS, caption
from vlmpipe.data.planting import SHARES, Row, jpeg, plant, stream
from vlmpipe.data.questions import Question, ask
from vlmpipe.data.scenes import LEFT_OUT, Scene
from vlmpipe.data.task_world import SMALLEST, TASKS, write_tasks
from vlmpipe.data.vqa import VqaExample, answer_type, write_vqa
from vlmpipe.data.web import FOLDERS, PAGES, write_pages
from vlmpipe.errors import UserError
from vlmpipe.images import decode_rgb
from vlmpipe.progress import progress

POOLS = {"scenes": {"scenes": 3000}, "textbooks": {"textbooks": 4000}}
TEST_IDS = 100_000  # image ids of the test questions start above it
MOST_FAULTS = 0.7
PLANTED = pa.schema({
    "pool": pa.string(), "url": pa.string(), "caption": pa.string(), "fault": pa.string(), "recovers": pa.bool_(),
    "group": pa.string(), "language": pa.string(), "true_caption": pa.string(), "twin_url": pa.string(),
    "evaluation_image": pa.int64(),
})


@dataclass(frozen=True)
class QuestionsConfig:
    """How many pictures are asked about, how many questions each (textbook figures have two), and the pictures' side
    in pixels (textbook figures keep theirs)."""

    train_pictures: int = 5000
    train_each: int = 6
    test_pictures: int = 300
    test_each: int = 2
    size: int = 128


@dataclass(frozen=True)
class TasksConfig:
    """Which tasks of other kinds to write in their datasets' own formats (`data.task_world`; a world of scenes only),
    how many training scenes of each, and the pictures' side in pixels."""

    names: tuple[str, ...] = ()
    scenes: int = 2000
    size: int = 64

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in TASKS:
                raise UserError(f"names: found '{name}'{nearest(name, TASKS)}; expected some of {', '.join(TASKS)}")
        if self.scenes < SMALLEST:
            raise UserError(f"scenes: found {self.scenes}; expected at least {SMALLEST}; raise it")


@dataclass(frozen=True)
class WorldConfig:
    """What to build.

    pools: pool name -> pairs in it (of textbooks: at most; hostile images come on top). trusted: pairs of the
    scorer's training set. size: side of a scene in pixels. women: share of scenes painted by a woman, the planted
    skew. leave_out: whether no picture to learn from (pools, trusted set, training questions) shows one of the
    combinations of colour and shape in `scenes.LEFT_OUT`. faults: fault -> share of a pool's rows, in place of the
    default (`planting.SHARES`); 0 plants none.
    path: the folder that holds `textbooks/` and `hostile-images/`.
    """

    kind: Literal["scenes", "textbooks"] = "scenes"
    seed: int = 0
    pools: dict[str, int] = field(default_factory=dict)
    trusted: int = 1500
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    size: int = 224
    women: float = 0.35
    leave_out: bool = False
    faults: dict[str, float] = field(default_factory=dict)
    path: str = "../shared/data"

    def __post_init__(self) -> None:
        counts = {f"pools.{name}": count for name, count in self.pools.items()} | {"trusted": self.trusted}
        counts |= {f"questions.{name}": count for name, count in asdict(self.questions).items()}
        for name, count in counts.items():
            if count < 1:
                raise UserError(f"{name}: found {count}; expected at least 1; raise it")
        if self.seed < 0 or self.size < 32:
            raise UserError(f"found seed {self.seed}, size {self.size}; expected a seed from 0, a size from 32 pixels")
        if not 0 <= self.women <= 1:
            raise UserError(f"women: found {self.women}; expected a share from 0 to 1")
        self._check_faults()

    def _check_faults(self) -> None:
        for name, share in self.faults.items():
            if name not in SHARES:
                known = ", ".join(SHARES)
                raise UserError(f"faults: unknown fault '{name}'{nearest(name, SHARES)}; expected one of: {known}")
            if not 0 <= share <= 1:
                raise UserError(f"faults.{name}: found {share}; expected a share from 0 to 1")
        if sum(self.shares.values()) > MOST_FAULTS:
            raise UserError(f"faults: found shares that sum to {sum(self.shares.values()):.2f}; expected at most "
                            f"{MOST_FAULTS}, so that sound pairs are left; lower some")

    @property
    def without(self) -> frozenset[tuple[str, str]]:
        """The (colour, shape) pairs that nothing to learn from shows."""
        return LEFT_OUT if self.leave_out else frozenset()

    @property
    def shares(self) -> dict[str, float]:
        return SHARES | self.faults

    @property
    def sizes(self) -> dict[str, int]:
        """Pool name -> rows."""
        return self.pools or POOLS[self.kind]


def build(name: str, out: Path, config: WorldConfig) -> None:
    """Build the world `name` in `out`; the same config gives the same bytes.

    Raises:
        UserError: what a textbook world is made of is missing.
    """
    out = Path(out)
    for part in ("pools", PAGES, "trusted", "questions", "tasks"):
        shutil.rmtree(out / part, ignore_errors=True)
    (out / "planted.parquet").unlink(missing_ok=True)
    {"scenes": _build_scenes, "textbooks": _build_textbooks}[config.kind](name, out, config)


# --- scenes ------------------------------------------------------------------------------------------------

def _build_scenes(name: str, out: Path, config: WorldConfig) -> None:
    questions, tested = config.questions, _scenes(config, "test", config.questions.test_pictures)
    trained = _scenes(config, "train", questions.train_pictures, config.without)
    _ask_scenes(out, "train", trained, questions.train_each, config)
    _ask_scenes(out, "test", tested, questions.test_each, config)
    write_pairs(out / "trusted", "trusted", progress(_trusted(config), config.trusted, f"world {name} trusted"))
    evaluation = _evaluation(tested, config)
    planted = []
    for pool, rows in config.sizes.items():
        planned = plant(pool, rows, config.seed, config.size, config.women, config.shares, evaluation, config.without)
        listed = list(progress(planned, rows, f"world {name} pool {pool}"))
        write_pages(out / PAGES / f"{pool}.parquet", (row.page for row in listed))
        shards.write_table(out / "pools" / f"{pool}.parquet", _table(listed, ("url", "caption")))
        planted += [_truth(pool, row) for row in listed]
    shards.write_table(out / "planted.parquet", pa.Table.from_pylist(planted, PLANTED))
    if config.tasks.names:
        write_tasks(out / "tasks", config.tasks.scenes, config.seed, config.tasks.size, config.tasks.names)


def _evaluation(tested: Sequence[Scene], config: WorldConfig) -> list[tuple[int, Scene]]:
    """(image id, scene) of the test questions that the pools may hold copies of.

    Raises:
        UserError: all show what is left out.
    """
    found = [
        (number, scene) for number, scene in enumerate(tested, TEST_IDS + 1)
        if config.without.isdisjoint((item.color, item.shape) for item in scene.items)
    ]
    if not found and config.shares["in_evaluation"]:
        raise UserError(
            f"questions.test_pictures: found {len(tested)}, all with a combination that is left out; expected one "
            f"without, to plant copies of; raise it or set faults.in_evaluation to 0"
        )
    return found


def _scenes(
    config: WorldConfig, part: str, count: int, without: frozenset[tuple[str, str]] = frozenset()
) -> list[Scene]:
    rng = stream(config.seed, part)
    return [Scene.sample(rng, without) for _ in range(count)]


def _ask_scenes(out: Path, part: str, scenes: Sequence[Scene], each: int, config: WorldConfig) -> None:
    asked = ask(scenes, each, stream(config.seed, "questions", part))
    pictures = (jpeg(scene.draw(config.questions.size)) for scene in scenes)
    write_questions(out, part, asked, progress(pictures, len(scenes), f"world {part} questions"))


def _trusted(config: WorldConfig) -> Iterator[tuple[str, str, bytes]]:
    painters = [painter for group in PAINTERS.values() for painter in group]
    for number in range(config.trusted):
        rng = stream(config.seed, "trusted", number)
        scene = Scene.sample(rng, config.without)
        said = caption(scene, painters[int(rng.integers(len(painters)))], rng)
        yield f"http://trusted.scenes.test/{number:05d}.jpg", said, jpeg(scene.draw(config.size))


def _table(rows: Iterable[Row], columns: Sequence[str]) -> pa.Table:
    rows = list(rows)
    return pa.table({name: pa.array([getattr(row, name) for row in rows], pa.string()) for name in columns})


def _truth(pool: str, row: Row) -> dict:
    return {name: pool if name == "pool" else getattr(row, name) for name in PLANTED.names}


# --- textbooks ---------------------------------------------------------------------------------------------

def _build_textbooks(name: str, out: Path, config: WorldConfig) -> None:
    path = Path(config.path)
    figures, hostile = textbooks.read_figures(path, config.seed), textbooks.read_hostile(path)
    tested, trained, trusted, listed = _split(figures, config)
    for part, chosen in (("test", tested), ("train", trained)):
        pictures = _figure_pictures(path, chosen, f"world {part} questions")
        write_questions(out, part, textbooks.ask_subjects(chosen), pictures)
    pictures = _figure_pictures(path, trusted, f"world {name} trusted")
    write_pairs(out / "trusted", "trusted", ((f.url, f.alt, data) for f, data in zip(trusted, pictures)))
    pool = next(iter(config.sizes))
    rows = [{"url": f.url, "caption": f.alt, "book": f.book, "module": f.module} for f in listed]
    rows += [{"url": url, "caption": said, "book": None, "module": None} for url, said, _ in hostile]
    schema = pa.schema(dict.fromkeys(("url", "caption", "book", "module"), pa.string()))
    shards.write_table(out / "pools" / f"{pool}.parquet", pa.Table.from_pylist(rows, schema))
    shards.write_table(out / "planted.parquet", _hostile_truth(pool, rows, hostile))
    shards.write_json(out / PAGES / FOLDERS, textbooks.folders(path))


def _split(figures: list[textbooks.Figure], config: WorldConfig) -> tuple[list[textbooks.Figure], ...]:
    """Test, train, trusted and pool figures: no figure stands in two of them."""
    if len(config.sizes) != 1:
        raise UserError(f"pools: found {', '.join(config.sizes)}; expected one pool in a world of textbooks")
    sizes = (config.questions.test_pictures, config.questions.train_pictures, config.trusted)
    if len(figures) <= sum(sizes):
        raise UserError(
            f"found {len(figures)} figures in {config.path}; expected more than {sum(sizes)} (test and train pictures "
            f"of the questions, and trusted pairs), so that some are left for the pool; lower those"
        )
    edges = np.cumsum(sizes).tolist()
    parts = [figures[start:end] for start, end in zip([0, *edges], [*edges, None])]
    return *parts[:3], parts[3][: next(iter(config.sizes.values()))]


def _figure_pictures(path: Path, figures: Sequence[textbooks.Figure], label: str) -> Iterator[bytes]:
    for figure in progress(figures, len(figures), label):
        yield jpeg(decode_rgb((path / "textbooks" / figure.file).read_bytes()))


def _hostile_truth(pool: str, rows: Sequence[Mapping], hostile: Sequence[tuple[str, str, bool]]) -> pa.Table:
    broken = {url for url, _, decodes in hostile if not decodes}
    truth = [
        {"pool": pool, "url": row["url"], "caption": row["caption"], "recovers": False, "language": "en",
         "fault": "broken_image" if row["url"] in broken else None}
        for row in rows
    ]
    return pa.Table.from_pylist(truth, PLANTED)


# --- what both write ---------------------------------------------------------------------------------------

def write_questions(out: Path, part: str, asked: Sequence[Sequence[Question]], pictures: Iterable[bytes]) -> None:
    """Write `questions/<part>`: a list of questions for each picture, in the same order."""
    first = 1 + (TEST_IDS if part == "test" else 0)
    examples = [
        VqaExample(image_id * 10 + i, image_id, q.text, (q.answer,), answer_type(q.answer), q.kind)
        for image_id, questions in enumerate(asked, first) for i, q in enumerate(questions)
    ]
    write_vqa(out / "questions" / part, examples, enumerate(pictures, first), part)


def write_pairs(directory: Path, pool: str, pairs: Iterable[tuple[str, str, bytes]], per_shard: int = 1000) -> None:
    """Write (url, caption, jpeg) triples as a pool's shard directory, all of them downloaded."""
    entries = []
    for number, chunk in enumerate(shards.batched(pairs, per_shard)):
        rows = [_pair_row(pool, *pair) for pair in chunk]
        table = pa.Table.from_pylist(rows)
        entries.append(shards.write_shard(directory, f"{number:05d}", table, _members(rows, chunk)))
    shards.write_manifest(directory, "pool", entries, pool=pool)


def _pair_row(pool: str, url: str, said: str, data: bytes) -> dict:
    width, height = decode_rgb(data).size
    return {
        "uid": sha256(f"{url}\0{said}\0{0}".encode()).hexdigest()[:32], "url": url, "caption": said,
        "status": "downloaded", "reason": None, "bytes": len(data), "sha256": sha256(data).hexdigest(),
        "width": width, "height": height, "pool": pool,
    }


def _members(rows: Sequence[dict], pairs: Sequence[tuple[str, str, bytes]]) -> Iterator[tuple[str, bytes]]:
    for row, (_, said, data) in zip(rows, pairs):
        yield f"{row['uid']}.jpg", data
        yield f"{row['uid']}.txt", said.encode()
        yield f"{row['uid']}.json", json.dumps(row, sort_keys=True).encode()
