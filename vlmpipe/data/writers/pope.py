"""POPE: a file of json lines for each strategy."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from vlmpipe.data.records import QuestionRecord
from vlmpipe.data.writers.files import dump_lines


def write_pope(directory: Path, records: Sequence[QuestionRecord], name: str) -> None:
    """Records with a `strategy` slice, numbered from 1 within theirs, as `NAME_pope_STRATEGY.json`."""
    files: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        lines = files[record.slices["strategy"]]
        lines.append({
            "question_id": len(lines) + 1, "image": record.images[0], "text": record.question,
            "label": record.answers[0],
        })
    for strategy, lines in files.items():
        dump_lines(Path(directory) / f"{name}_pope_{strategy}.json", lines)
