"""VizWiz: questions of blind people on pictures that they took, some of which nobody can answer from the picture.

Format: https://vizwiz.org/tasks-and-datasets/vqa/: one list of objects a split (train.json). The first release is in
the two VQA files, with the question type "unanswerable" in the place of `answerable`; both are read.
"""

from pathlib import Path

from vlmpipe.data.fields import Entry, entries, filled, find, found_files, unique
from vlmpipe.data.records import QuestionRecord
from vlmpipe.data.vqa import joined

UNANSWERABLE = "unanswerable"


def read_vizwiz(path: Path) -> list[QuestionRecord]:
    """One record a question with its ten answers and how sure each answerer was; () in the test split.

    Raises:
        UserError: a file or field is missing or wrong.
    """
    if not Path(path).is_file() and found_files(path, "*questions.json"):
        return filled([_early(*both) for both in joined(path)], Path(path), "questions")
    file, seen = find(path, "*.json"), set()
    return filled([_question(entry, seen) for entry in entries(file)], file, "questions")


def _question(entry: Entry, seen: set[str]) -> QuestionRecord:
    answerable, kind = entry.optional("answerable", int, bool), entry.optional("answer_type", str)
    image = unique(entry, seen, "image")  # each picture has one question
    answers, confidences = _answers(entry)
    return QuestionRecord(
        image.rpartition(".")[0], (image,), entry.field("question", str), answers,
        None if answerable is None else bool(answerable), {"answer_type": kind} if kind else {}, confidences,
    )


def _early(question: Entry, annotation: Entry) -> QuestionRecord:
    kind = annotation.optional("answer_type", str) or annotation.optional("question_type", str)
    answers, confidences = _answers(annotation)
    return QuestionRecord(
        question.name("question_id"), (question.name("image_id"),), question.field("question", str), answers,
        None if kind is None else kind != UNANSWERABLE, {"answer_type": kind} if kind else {}, confidences,
    )


def _answers(entry: Entry) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if entry.values.get("answers") is None:
        return (), ()
    found = list(entry.objects("answers"))
    sure = [answer.optional("answer_confidence", str) for answer in found]
    return tuple(answer.field("answer", str) for answer in found), tuple(s for s in sure if s is not None)
