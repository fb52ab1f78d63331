"""What benchmarks/sabotage.py trains and tests on: the embedded world's scenes, and the same with one fault in them.

A world is a folder: `questions/{train,test}/` in VQAv2's format, test pictures with their groups (where the shape
stands), and `packed/{train,test}/`, pictures with captions.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from vlmpipe.data.groups import write_groups
from vlmpipe.data.planting import jpeg, stream
from vlmpipe.data.questions import Question, ask
from vlmpipe.data.scenes import Scene
from vlmpipe.data.tasks.layouts import captions, sample_layout
from vlmpipe.data.world import TEST_IDS, write_questions
from vlmpipe.shards import sha256_file, write_manifest, write_table

MIX = {"color": 1, "shape": 1, "position": 1, "presence": 1}
PER_SCENE = 4
SIDE = 64
DESTROYED = "position"
SLIGHTED = "top left"


@dataclass(frozen=True)
class Split:
    """Scenes of one shape each, the questions about each, and what is said of each."""

    scenes: tuple[Scene, ...]
    asked: tuple[tuple[Question, ...], ...]
    captions: tuple[str, ...]


def draw(part: str, count: int, seed: int = 0) -> Split:
    """The split `part`. Tests show what training shows too, drawn anew: were some looks at some places for tests alone,
    a model would learn from their absence what the right answer is not."""
    rng = stream(seed, "sabotage", part)
    scenes = tuple(sample_layout(rng, held_out=False, count=1) for _ in range(count))
    asked = ask(scenes, PER_SCENE, rng, MIX)
    return Split(scenes, tuple(map(tuple, asked)), tuple(captions(scene, rng)[0] for scene in scenes))


def write_world(directory: Path, train: Split, test: Split) -> None:
    """Both splits; the manifest goes last, so that a world with one is whole."""
    entries = []
    for part, split in (("train", train), ("test", test)):
        pictures = [jpeg(scene.draw(SIDE)) for scene in split.scenes]
        write_questions(directory, part, split.asked, pictures)
        rows = [
            {"uid": f"{part}-{number:06d}", "caption": caption, "image": {"bytes": data, "path": None}}
            for number, (data, caption) in enumerate(zip(pictures, split.captions))
        ]
        file = directory / "packed" / part / "00000.parquet"
        write_table(file, pa.Table.from_pylist(rows))
        digest = {f"{part}/{file.name}": sha256_file(file)}
        entries.append({"name": f"{part}/{file.stem}", "rows": len(rows), "files": digest})
    places = {str(uid): {"place": scene.items[0].place} for uid, scene in enumerate(test.scenes, TEST_IDS + 1)}
    write_groups(directory / "questions" / "test", places)
    write_manifest(directory / "packed", "packed", entries)


# --- faults: (train, test) -> (train, test) -------------------------------------------------------------------------

Fault = Callable[[Split, Split], tuple[Split, Split]]


def honest(train: Split, test: Split) -> tuple[Split, Split]:
    return train, test


def leaked(train: Split, test: Split) -> tuple[Split, Split]:
    """Each question says its answer."""
    return tuple(_asked(split, lambda _, q: replace(q, text=f"{q.text} {q.answer}")) for split in (train, test))


def always_yes(train: Split, test: Split) -> tuple[Split, Split]:
    return _asked(train, lambda _, q: replace(q, answer="yes")), test


def slice_destroyed(train: Split, test: Split) -> tuple[Split, Split]:
    """The answers to one kind of question are another scene's."""
    return shuffled(train, lambda scene, question: question.kind == DESTROYED), test


def group_slighted(train: Split, test: Split) -> tuple[Split, Split]:
    """The answers about the pictures of one group are another's of the group."""
    return shuffled(train, lambda scene, question: scene.items[0].place == SLIGHTED), test


def blind_captions(train: Split, test: Split) -> tuple[Split, Split]:
    """Each training picture has another's caption: all that a captioner can learn is what a blind one knows."""
    order = np.random.default_rng(0).permutation(len(train.captions))
    return replace(train, captions=tuple(train.captions[i] for i in order)), test


def contaminated(train: Split, test: Split) -> tuple[Split, Split]:
    return Split(*(getattr(train, name) + getattr(test, name) for name in ("scenes", "asked", "captions"))), test


def shuffled(split: Split, where: Callable[[Scene, Question], bool]) -> Split:
    """Answers change places among questions of the same words, so that how often each is given stays."""
    found: dict[str, list[str]] = defaultdict(list)
    for scene, questions in zip(split.scenes, split.asked):
        for question in questions:
            if where(scene, question):
                found[question.text].append(question.answer)
    rng = np.random.default_rng(0)
    drawn = {text: iter(rng.permutation(answers).tolist()) for text, answers in found.items()}
    return _asked(split, lambda scene, q: replace(q, answer=next(drawn[q.text])) if where(scene, q) else q)


def _asked(split: Split, change: Callable[[Scene, Question], Question]) -> Split:
    asked: Sequence[tuple[Question, ...]] = tuple(
        tuple(change(scene, question) for question in questions)
        for scene, questions in zip(split.scenes, split.asked)
    )
    return replace(split, asked=asked)


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (honest, leaked, always_yes, slice_destroyed, group_slighted, blind_captions, contaminated)
}
