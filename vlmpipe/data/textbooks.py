"""Real figures from open textbooks: an image-text pool with real formats, real captions and real skew.

Expected in one folder: `textbooks/` (pairs.parquet with file, alt, book, module; images/) and `hostile-images/`
(index.json with file, decodes). Questions are built from the one label that every figure surely has: its book.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from vlmpipe.data.questions import Question
from vlmpipe.errors import UserError

FIGURES_HOST, HOSTILE_HOST = "figures.textbooks.test", "hostile.textbooks.test"
COLUMNS = ("file", "alt", "book", "module")
# What a book is about, in the words of an answer; other books go by their own name.
SUBJECTS = {
    "osbooks-college-physics-bundle": "physics", "osbooks-microbiology": "microbiology",
    "osbooks-world-history": "world history", "osbooks-us-history": "american history",
    "osbooks-introduction-anthropology": "anthropology",
}


@dataclass(frozen=True)
class Figure:
    """One figure: its file below `textbooks/`, alt text, book and module."""

    file: str
    alt: str
    book: str
    module: str

    @property
    def url(self) -> str:
        return f"http://{FIGURES_HOST}/{quote(Path(self.file).name)}"

    @property
    def subject(self) -> str:
        return SUBJECTS.get(self.book, self.book.removeprefix("osbooks-").replace("-", " "))


def folders(path: Path) -> dict[str, str]:
    """Host -> the folder that stands for it."""
    return {FIGURES_HOST: f"{path}/textbooks/images", HOSTILE_HOST: f"{path}/hostile-images"}


def read_figures(path: Path, seed: int) -> list[Figure]:
    """All figures in an order that depends on their names and `seed` alone, so that a new figure moves no other.

    Raises:
        UserError: the folder or a column is missing.
    """
    table_file = _existing(path, "textbooks/pairs.parquet")
    _existing(path, "textbooks/images")
    try:
        table = pq.read_table(table_file)
    except pa.ArrowInvalid as error:
        raise UserError(f"{table_file}: found damaged parquet ({error}); expected a table of figures") from None
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise UserError(f"{table_file}: found columns {', '.join(table.column_names)}; expected '{missing[0]}' too")
    figures = [Figure(**row) for row in table.select(COLUMNS).to_pylist()]
    return sorted(figures, key=lambda figure: sha256(f"{seed} {figure.file}".encode()).digest())


def read_hostile(path: Path) -> list[tuple[str, str, bool]]:
    """(url, caption, decodes) of every hostile image.

    Raises:
        UserError: the folder or its index is missing or not as expected.
    """
    index = _existing(path, "hostile-images/index.json")
    try:
        entries = [(str(entry["file"]), bool(entry["decodes"])) for entry in json.loads(index.read_text())]
    except (ValueError, TypeError, KeyError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(f"{index}: found {why}; expected a list of objects with file and decodes") from None
    return [
        (f"http://{HOSTILE_HOST}/{quote(name)}", f"A sample picture in an unusual format, {Path(name).stem}", decodes)
        for name, decodes in entries
    ]


def _existing(path: Path, name: str) -> Path:
    if not (path / name).exists():
        raise UserError(
            f"found no {path / name}; expected a folder with textbooks/ (pairs.parquet, images/) and hostile-images/; "
            f"set `path` of this world to it, or use another profile"
        )
    return path / name


def ask_subjects(figures: Sequence[Figure]) -> list[list[Question]]:
    """Two questions on each figure: which subject, and whether it is a given one.

    The yes/no question asks for the figure's own subject or another so that for each subject yes and no stay even.
    """
    subjects = sorted({figure.subject for figure in figures})
    counts: dict[str, Counter] = defaultdict(Counter)
    asked = []
    for figure in figures:
        # The subject whose answer here is rarest so far, by name where they tie.
        def excess(subject: str, figure=figure) -> tuple[int, str]:
            right = subject == figure.subject
            return counts[subject][right] - counts[subject][not right], subject

        subject = min(subjects, key=excess)
        right = subject == figure.subject
        counts[subject][right] += 1
        asked.append([
            Question("subject", "Which subject is this figure from?", figure.subject),
            Question("is subject", f"Is this figure from a book on {subject}?", "yes" if right else "no"),
        ])
    return asked
