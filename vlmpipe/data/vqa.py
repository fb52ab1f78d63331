"""The official VQAv2 files: a questions json, an annotations json with ten answers a question, and pictures.

Format: https://visualqa.org/download.html. VizWiz publishes the same two files with text image ids and without
`answer_type`; both are read. Pictures stand in `images/`, as a shard directory (uid = image id) or as plain files.
"""

import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from vlmpipe import shards
from vlmpipe.errors import UserError

ANSWERS = 10
KIND = "images"


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
    question_file, annotation_file = (_only(Path(directory), f"*{kind}.json") for kind in ("questions", "annotations"))
    annotations = {}
    for where, entry in _entries(annotation_file, "annotations"):
        key = _field(entry, "question_id", int, where)
        if key in annotations:
            raise UserError(f"{where}: found question_id {key} twice; expected one annotation a question; mend it")
        annotations[key] = where, entry
    examples = [_example(where, entry, annotations) for where, entry in _entries(question_file, "questions")]
    if not examples:
        raise UserError(f"{question_file}: found 0 questions; expected at least one; check the file")
    return examples


def _example(where: str, entry: dict, annotations: Mapping[int, tuple[str, dict]]) -> VqaExample:
    question_id = _field(entry, "question_id", int, where)
    image_id = _field(entry, "image_id", (int, str), where)
    if question_id not in annotations:
        raise UserError(f"{where}: found no annotation for question_id {question_id}; expected one in the annotations "
                        f"file; use the two files of the same split")
    there, annotation = annotations[question_id]
    if annotation.get("image_id", image_id) != image_id:
        raise UserError(f"{there}.image_id: found {annotation['image_id']!r}; expected {image_id!r} as in the "
                        f"questions; use the two files of the same split")
    answers = tuple(
        _field(answer, "answer", str, f"{there}.answers[{i}]")
        for i, answer in enumerate(_field(annotation, "answers", list, there))
    )
    if not answers:
        raise UserError(f"{there}.answers: found no answers; expected at least one; mend the file")
    most = Counter(answers).most_common(1)[0][0]
    return VqaExample(
        question_id, image_id, _field(entry, "question", str, where), answers,
        annotation.get("answer_type") or answer_type(most), annotation.get("question_type") or "",
    )


def _only(directory: Path, pattern: str) -> Path:
    found = sorted(directory.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{directory}: found {len(found)} files {pattern} ({names}); expected exactly one; "
                        f"keep one split of the VQA files in a directory")
    return found[0]


def _entries(path: Path, key: str) -> Iterator[tuple[str, dict]]:
    content = shards.read_json(path)
    where = f"{path}: {key}"
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise UserError(f"{path}: found no list '{key}'; expected the official VQA layout; check the file")
    for index, entry in enumerate(content[key]):
        if not isinstance(entry, dict):
            raise UserError(f"{where}[{index}]: found {type(entry).__name__}; expected an object; mend the file")
        yield f"{where}[{index}]", entry


def _field(entry: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        found = "nothing" if value is None else f"{type(value).__name__} {value!r}"
        expected = " or ".join(k.__name__ for k in kinds)
        raise UserError(f"{where}.{name}: found {found}; expected {expected}; mend the file")
    return value


# --- pictures ----------------------------------------------------------------------------------------------

class VqaImages(Mapping):
    """image_id -> encoded bytes, read when asked for: `images/` may hold a hundred thousand pictures."""

    def __init__(self, index: Mapping[str, tuple[Path, int, int]], where: Path):
        self._index, self._where = index, where

    def __getitem__(self, image_id: int | str) -> bytes:
        try:
            path, start, size = self._index[str(image_id)]
        except KeyError:
            raise UserError(f"{self._where}: found no picture for image_id {image_id!r}; expected one of "
                            f"{len(self._index)} there; check that the pictures belong to the questions") from None
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(size)

    @property
    def files(self) -> int:
        """How many pictures there are; one may go by several names."""
        return len(set(self._index.values()))

    def distinct(self) -> Iterator[tuple[str, bytes]]:
        """Every picture once, under the first of its names."""
        seen = set()
        for name, place in self._index.items():
            if place not in seen:
                seen.add(place)
                yield name, self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, image_id: object) -> bool:
        return str(image_id) in self._index


def vqa_images(directory: Path) -> VqaImages:
    """The pictures of a VQA directory.

    In a plain folder a picture is found by its file name, by the name without suffix, and by the number it ends
    in: COCO_val2014_000000262148.jpg is image 262148.

    Raises:
        UserError: there is no `images/`, it holds no picture, or a shard is damaged.
    """
    where = Path(directory) / "images"
    if not where.is_dir():
        raise UserError(f"found no folder {where}; expected the pictures of the questions; put or link them there")
    index = _shard_index(where) if (where / shards.MANIFEST).exists() else _folder_index(where)
    if not index:
        raise UserError(f"{where}: found no pictures; expected {', '.join(shards.IMAGE_SUFFIXES)}; fill the folder")
    return VqaImages(index, where)


def _shard_index(where: Path) -> dict[str, tuple[Path, int, int]]:
    index = {}
    for shard in shards.read_manifest(where)["shards"]:
        path = where / f"{shard['name']}.tar"
        if not path.exists() or shards.sha256_file(path) != shard["files"][path.name]:
            raise shards.corrupt(path, "its bytes are not the ones the manifest lists")
        with tarfile.open(path) as tar:
            for member in tar:
                stem, _, suffix = member.name.rpartition(".")
                if f".{suffix}" in shards.IMAGE_SUFFIXES:
                    index[stem] = path, member.offset_data, member.size
    return index


def _folder_index(where: Path) -> dict[str, tuple[Path, int, int]]:
    index = {}
    for path in sorted(where.rglob("*")):
        if path.suffix.lower() in shards.IMAGE_SUFFIXES:
            place = path, 0, path.stat().st_size
            number = re.search(r"0*(\d+)$", path.stem)
            names = [path.name, path.stem] + ([number.group(1)] if number else [])
            for name in names:
                index.setdefault(name, place)
    return index


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
    _write_images(Path(directory) / "images", images)


def _annotation(example: VqaExample) -> dict:
    answers = example.answers * ANSWERS if len(example.answers) == 1 else example.answers
    return {
        "question_id": example.question_id, "image_id": example.image_id, "question_type": example.question_type,
        "answer_type": example.answer_type, "multiple_choice_answer": example.answer,
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": i} for i, answer in enumerate(answers, 1)
        ],
    }


def _write_images(where: Path, images: Iterable[tuple[int | str, bytes]]) -> None:
    images = list(images)
    table = pa.table({"uid": [str(image_id) for image_id, _ in images], "bytes": [len(data) for _, data in images]})
    entry = shards.write_shard(where, "00000", table, ((f"{image_id}.jpg", data) for image_id, data in images))
    shards.write_manifest(where, KIND, [entry])
