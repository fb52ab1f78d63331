"""Questions on clips, as MSRVTT-QA and MSVD-QA publish them, with the clips as sampled frames.

Format: https://github.com/xudejing/video-question-answering: a list of {id, video_id, question, answer}. The frames
lie in `images/video<video_id>/` and are taken in the order of their names.
"""

from collections import defaultdict
from pathlib import Path, PurePosixPath

from vlmpipe.data.fields import Entry, entries, filled, find, unique
from vlmpipe.data.pictures import pictures
from vlmpipe.data.records import QuestionRecord


def read_video_questions(directory: Path) -> list[QuestionRecord]:
    """One record a question on all frames of its clip.

    Raises:
        UserError: a file or field is missing or wrong, or a clip has no frames.
    """
    file, seen = find(directory, "*qa.json"), set()
    frames: dict[str, list[str]] = defaultdict(list)
    for name in sorted(pictures(Path(directory) / "images")):
        frames[PurePosixPath(name).parent.name].append(name)
    return filled([_question(entry, seen, frames) for entry in entries(file)], file, "questions")


def _question(entry: Entry, seen: set[str], frames: dict[str, list[str]]) -> QuestionRecord:
    clip = f"video{entry.name('video_id')}"
    if clip not in frames:
        raise entry.wrong("video_id", f"one of the {len(frames)} clips with frames in images/")
    question = entry.field("question", str)
    return QuestionRecord(
        unique(entry, seen, "id"), tuple(frames[clip]), question, (entry.field("answer", str),),
        slices={"question_type": question.partition(" ")[0].lower()},
    )
