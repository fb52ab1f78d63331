"""VizWiz: one list a split, with ten answers and their confidences."""

from collections.abc import Sequence
from pathlib import Path

from vlmpipe.data.pictures import write_pictures
from vlmpipe.data.records import QuestionRecord
from vlmpipe.data.writers.coco import Named
from vlmpipe.data.writers.files import dump


def write_vizwiz(directory: Path, records: Sequence[QuestionRecord], images: Named, split: str) -> None:
    """One question a picture."""
    rows = [
        {
            "image": record.images[0], "question": record.question, "answerable": int(bool(record.answerable)),
            "answer_type": record.slices["answer_type"],
            "answers": [
                {"answer": answer, "answer_confidence": sure}
                for answer, sure in zip(record.answers, record.confidences, strict=True)
            ],
        }
        for record in records
    ]
    dump(Path(directory) / f"{split}.json", rows)
    write_pictures(Path(directory) / "images", images)
