"""POPE: yes or no to whether something is in a picture; json lines, a file a strategy.

Format: https://github.com/RUCAIBox/POPE, output/coco/coco_pope_adversarial.json, arXiv 2305.10355.
"""

from pathlib import Path

from vlmpipe.data.fields import Entry, filled, found_files, lines, unique
from vlmpipe.data.records import QuestionRecord


def read_pope(path: Path) -> list[QuestionRecord]:
    """One record a line of each file, in a directory all `*pope*.json`; slice `strategy`: how the file's name ends,
    such as adversarial.

    Raises:
        UserError: a line or field is missing or wrong.
    """
    path = Path(path)
    files = [path] if path.is_file() else found_files(path, "*pope*.json", "*pope*.jsonl")
    records = []
    for file in files:
        seen: set[str] = set()
        records += [_question(entry, file.stem.rpartition("_")[2], seen) for entry in lines(file)]
    return filled(records, path, "questions")


def _question(entry: Entry, strategy: str, seen: set[str]) -> QuestionRecord:
    label = entry.field("label", str).lower()
    if label not in ("yes", "no"):
        raise entry.wrong("label", "yes or no")
    return QuestionRecord(
        f"{strategy}-{unique(entry, seen, 'question_id')}", (entry.field("image", str),), entry.field("text", str),
        (label,), slices={"strategy": strategy},
    )
