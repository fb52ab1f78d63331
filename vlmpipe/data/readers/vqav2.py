"""VQAv2 as records; the files themselves are `vlmpipe.data.vqa`'s."""

from pathlib import Path

from vlmpipe.data.records import QuestionRecord
from vlmpipe.data.vqa import read_vqa


def read_vqav2(path: Path) -> list[QuestionRecord]:
    """One record a question with its ten answers; slices `question_type` and `answer_type`.

    Raises:
        UserError: as `read_vqa` says.
    """
    return [
        QuestionRecord(
            str(example.question_id), (str(example.image_id),), example.question, example.answers,
            slices={"question_type": example.question_type, "answer_type": example.answer_type},
        )
        for example in read_vqa(path)
    ]
