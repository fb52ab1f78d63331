"""CLEVR: questions with their functional programs, and the scenes that they are asked of.

Format: https://cs.stanford.edu/people/jcjohns/clevr/ (CLEVR_train_questions.json, CLEVR_train_scenes.json).
CLEVR-CoGenT, CLEVR-Humans and what clevr-dataset-gen makes are laid out alike; test splits have neither answers nor
programs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vlmpipe.data.fields import Entry, entries, filled, find, unique
from vlmpipe.data.records import QuestionRecord, Step

# The last step of a program says what is asked for: the question types of the paper (Johnson et al. 2017, figure 2).
KINDS = {
    "count": "count", "exist": "exist", "equal_integer": "compare numbers", "less_than": "compare numbers",
    "greater_than": "compare numbers",
}


@dataclass(frozen=True)
class ClevrObject:
    """One thing: its look, and where it stands in the picture as (x, y) in pixels."""

    color: str
    shape: str
    size: str
    material: str
    pixel: tuple[float, float]


@dataclass(frozen=True)
class ClevrScene:
    """`relationships[r][i]`: numbers of the objects that stand in relation r to object i, such as left of it."""

    id: str
    image: str
    objects: tuple[ClevrObject, ...]
    relationships: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)


def read_clevr(path: Path) -> list[QuestionRecord]:
    """One record a question; slices `family` (number of the template) and `kind` (what is asked for).

    Raises:
        UserError: a file or field is missing or wrong, or a program's step uses a later one.
    """
    file, seen = find(path, "*questions.json"), set()
    return filled([_question(entry, seen) for entry in entries(file, "questions")], file, "questions")


def _question(entry: Entry, seen: set[str]) -> QuestionRecord:
    answer = entry.optional("answer", str, int, bool)
    program = _program(entry)
    family = entry.optional("question_family_index", int)
    slices = {"family": str(family)} if family is not None else {}
    return QuestionRecord(
        unique(entry, seen, "question_index"), (entry.field("image_filename", str),), entry.field("question", str),
        () if answer is None else (_word(answer),), slices=slices | ({"kind": _kind(program)} if program else {}),
        program=program,
    )


def _word(answer: str | int | bool) -> str:
    """clevr-dataset-gen writes counts as numbers and yes or no as booleans; the published files have words."""
    return {True: "yes", False: "no"}[answer] if isinstance(answer, bool) else str(answer)


def _program(entry: Entry) -> tuple[Step, ...]:
    if entry.values.get("program") is None:
        return ()
    return tuple(_step(step, number) for number, step in enumerate(entry.objects("program")))


def _step(entry: Entry, number: int) -> Step:
    """The published files say `function`, the generator's own `type`; `side_inputs` is the generator's older name."""
    values = next((name for name in ("value_inputs", "side_inputs") if entry.values.get(name) is not None), None)
    inputs = entry.field("inputs", list)
    if not all(isinstance(source, int) and 0 <= source < number for source in inputs):
        raise entry.wrong("inputs", "numbers of earlier steps")
    function = entry.field("function" if "function" in entry.values else "type", str)
    return Step(function, tuple(inputs), entry.texts(values) if values else ())


def _kind(program: tuple[Step, ...]) -> str:
    last = program[-1].function
    return KINDS.get(last, "compare attributes" if last.startswith("equal_") else "query")


def read_clevr_scenes(path: Path) -> list[ClevrScene]:
    """The scenes, in the order of the file.

    Raises:
        UserError: a file or field is missing or wrong, or a relation names an object that isn't there.
    """
    file, seen = find(path, "*scenes.json"), set()
    return filled([_scene(entry, seen) for entry in entries(file, "scenes")], file, "scenes")


def _scene(entry: Entry, seen: set[str]) -> ClevrScene:
    objects = tuple(_object(found) for found in entry.objects("objects"))
    relations = entry.object("relationships") if entry.values.get("relationships") is not None else None
    names = relations.values if relations else {}
    return ClevrScene(
        unique(entry, seen, "image_index"), entry.field("image_filename", str), objects,
        {name: _related(relations, name, len(objects)) for name in names},
    )


def _object(entry: Entry) -> ClevrObject:
    x, y, *_ = entry.numbers("pixel_coords", 3)
    return ClevrObject(*(entry.field(name, str) for name in ("color", "shape", "size", "material")), (x, y))


def _related(relations: Entry, name: str, count: int) -> tuple[tuple[int, ...], ...]:
    found = relations.field(name, list)
    sound = len(found) == count and all(
        isinstance(others, list) and all(isinstance(i, int) and 0 <= i < count for i in others) for others in found
    )
    if not sound:
        raise relations.wrong(name, f"a list of object numbers for each of {count} objects")
    return tuple(map(tuple, found))
