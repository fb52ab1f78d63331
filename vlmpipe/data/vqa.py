"""The official VQAv2 files: a questions json, an annotations json with ten answers a question, and pictures.

Format: https://visualqa.org/download.html. VizWiz publishes the same two files with text image ids and without
`answer_type`; both are read. Pictures stand in `images/`, as a shard directory (uid = image id) or as plain files.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmpipe import shards
from vlmpipe.data.fields import Entry, entries, filled, find, unique
from vlmpipe.data.pictures import Pictures, pictures, write_pictures

ANSWERS = 10


@dataclass(frozen=True)
class VqaExample:
    """One question with all its human answers; `answer_type` is "yes/no", "number" or "other"."""

    question_id: int
    image_id: int | str
    question: str
    answers: tuple[str, ...]
    answer_type: str
    question_type: str

    @property
    def answer(self) -> str:
        """The most frequent answer, the earlier where they tie: the format's `multiple_choice_answer`."""
        return Counter(self.answers).most_common(1)[0][0]


def answer_type(answer: str) -> str:
    """The official three classes."""
    if answer.lower() in ("yes", "no"):
        return "yes/no"
    return "number" if answer.strip().isdigit() else "other"


# --- reading -----------------------------------------------------------------------------------------------

def read_vqa(directory: Path) -> list[VqaExample]:
    """All examples of a directory, in the order of its questions file.

    The files are the only `*questions.json` and `*annotations.json` there, so official names fit as they are.

    Raises:
        UserError: a file or field is missing or of the wrong type, or the two files do not belong together.
    """
    examples = [_example(*both) for both in joined(directory)]
    return filled(examples, Path(directory), "questions")


def joined(directory: Path) -> Iterator[tuple[Entry, Entry]]:
    """(question, its annotation) in the order of the questions file.

    Raises:
        UserError: as `read_vqa` says.
    """
    question_file, annotation_file = (find(directory, f"*{kind}.json") for kind in ("questions", "annotations"))
    seen: set[str] = set()
    annotations = {unique(entry, seen, "question_id"): entry for entry in entries(annotation_file, "annotations")}
    for question in entries(question_file, "questions"):
        annotation = annotations.get(question.name("question_id"))
        if annotation is None:
            raise question.wrong("question_id", "one in the annotations file of the same split",
                                 f"no annotation for question_id {question.name('question_id')}")
        image_id = question.field("image_id", int, str)
        if annotation.values.get("image_id", image_id) != image_id:
            raise annotation.wrong("image_id", f"{image_id!r} as in the questions file of the same split")
        yield question, annotation


def _example(question: Entry, annotation: Entry) -> VqaExample:
    answers = tuple(answer.field("answer", str) for answer in annotation.objects("answers"))
    if not answers:
        raise annotation.wrong("answers", "at least one", "no answers")
    most = Counter(answers).most_common(1)[0][0]
    return VqaExample(
        question.field("question_id", int), question.field("image_id", int, str), question.field("question", str),
        answers, annotation.values.get("answer_type") or answer_type(most),
        annotation.values.get("question_type") or "",
    )


def vqa_images(directory: Path) -> Pictures:
    """The pictures of a VQA directory, which stand in its `images/`.

    Raises:
        UserError: as `pictures` says.
    """
    return pictures(Path(directory) / "images")


# --- writing -----------------------------------------------------------------------------------------------

def write_vqa(
    directory: Path, examples: Sequence[VqaExample], images: Iterable[tuple[int | str, bytes]], subtype: str
) -> None:
    """Write the official files and the pictures as a shard directory, uid = str(image_id).

    `subtype` names the split ("train", "test"). One answer is repeated to the ten that the format has.
    """
    head = {"info": {"description": "vlmpipe", "version": "2.0"}, "license": {"name": "", "url": ""},
            "data_type": "vlmpipe", "data_subtype": subtype}
    questions = [{"image_id": e.image_id, "question": e.question, "question_id": e.question_id} for e in examples]
    task = {"task_type": "Open-Ended", "questions": questions}
    shards.write_json(Path(directory) / "questions.json", head | task)
    shards.write_json(Path(directory) / "annotations.json", head | {"annotations": [_annotation(e) for e in examples]})
    write_pictures(Path(directory) / "images", ((f"{image_id}.jpg", data) for image_id, data in images))


def _annotation(example: VqaExample) -> dict:
    answers = example.answers * ANSWERS if len(example.answers) == 1 else example.answers
    return {
        "question_id": example.question_id, "image_id": example.image_id, "question_type": example.question_type,
        "answer_type": example.answer_type, "multiple_choice_answer": example.answer,
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(answers, 1)
        ],
    }
