"""What a model is fine-tuned on and tested with: records of one dataset's official files, and their pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmpipe.config import nearest
from vlmpipe.data.pictures import Pictures, pictures
from vlmpipe.data.readers import READERS
from vlmpipe.data.records import ClassRecord, QuestionRecord, Record, StatementRecord
from vlmpipe.data.vqa import ANSWERS
from vlmpipe.errors import UserError

# How a class is asked for, and said.
CLASS_QUESTION = "what is it?"
CLASS_CAPTION = "a photo of a {}"
# How a statement is judged.
WORDS = {True: "yes", False: "no"}


@dataclass(frozen=True)
class TaskConfig:
    """reader: of the files' format, see `data.readers`. path: the folder that holds `train/` and `test/`, which the
    pipeline hands to its stages. images: where the pictures lie in each of them."""

    reader: str = "vqav2"
    path: str = ""
    images: str = "images"

    def __post_init__(self) -> None:
        if self.reader not in READERS:
            known = ", ".join(READERS)
            raise UserError(f"reader: found '{self.reader}'{nearest(self.reader, READERS)}; expected one of {known}")


def read_records(split: Path, task: TaskConfig) -> Sequence[Record]:
    """The records of `train/` or `test/`.

    Raises:
        UserError: as the reader says.
    """
    return READERS[task.reader](Path(split))


def read_pictures(split: Path, task: TaskConfig) -> Pictures:
    """Their pictures by name.

    Raises:
        UserError: as `pictures` says.
    """
    return pictures(Path(split) / task.images)


# --- of one record -------------------------------------------------------------------------------------------

def teaches(record: Record) -> bool:
    """Whether there is an answer to learn."""
    if isinstance(record, QuestionRecord):
        return bool(record.answers)
    return record.label is not None if isinstance(record, StatementRecord) else True


def names_of(record: Record) -> tuple[str, ...]:
    """Of the record's pictures."""
    return record.images if hasattr(record, "images") else (record.image,)


def text_of(record: QuestionRecord | StatementRecord) -> str:
    return record.question if isinstance(record, QuestionRecord) else record.sentence


def answers_of(record: Record) -> tuple[str, ...]:
    """What people said, the commonest first; one answer counts as if ten had given it. Empty where nothing is asked."""
    if isinstance(record, ClassRecord):
        return (record.label,) * ANSWERS
    if isinstance(record, StatementRecord):
        return (WORDS[record.label],) * ANSWERS
    if not isinstance(record, QuestionRecord):
        return ()
    given = record.answers * ANSWERS if len(record.answers) == 1 else record.answers
    return tuple(sorted(given, key=lambda answer: (-given.count(answer), given.index(answer))))
