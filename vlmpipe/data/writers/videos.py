"""Questions on clips as MSRVTT-QA has them, the clips as frames."""

from collections.abc import Sequence
from pathlib import Path

from vlmpipe.data.pictures import write_pictures
from vlmpipe.data.records import QuestionRecord
from vlmpipe.data.writers.coco import Named
from vlmpipe.data.writers.files import dump


def frame_name(video_id: int, number: int) -> str:
    """The name of one frame, with its suffix."""
    return f"video{video_id}/{number:03d}.jpg"


def write_video_questions(directory: Path, records: Sequence[QuestionRecord], images: Named, split: str) -> None:
    """Records with whole-number ids; `images` are all frames, by `frame_name`."""
    rows = [
        {"id": int(record.id), "video_id": int(record.images[0].partition("/")[0].removeprefix("video")),
         "question": record.question, "answer": record.answers[0], "category_id": 0}
        for record in records
    ]
    dump(Path(directory) / f"{split}_qa.json", rows)
    write_pictures(Path(directory) / "images", images)
