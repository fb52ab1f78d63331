"""TextVQA and TextCaps, with the words in the pictures in the file of read words that both have."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from vlmpipe.data.pictures import write_pictures
from vlmpipe.data.records import CaptionRecord, QuestionRecord, SceneText
from vlmpipe.data.writers.coco import Named
from vlmpipe.data.writers.files import dump

ANSWERS = 10


def write_textvqa(
    directory: Path, records: Sequence[QuestionRecord], images: Named, size: tuple[int, int], split: str
) -> None:
    """One answer is repeated to the ten that the format has."""
    rows = [
        _row(record.images[0], size, split) | {
            "question": record.question, "question_id": int(record.id),
            "question_tokens": record.question.lower().rstrip("?").split(),
            "answers": list(record.answers) * (ANSWERS if len(record.answers) == 1 else 1),
        }
        for record in records
    ]
    dump(Path(directory) / f"TextVQA_0.5.1_{split}.json", _file("textvqa", "0.5.1", split, rows))
    _write_words(directory, {record.images[0]: record.texts for record in records}, split)
    write_pictures(Path(directory) / "images", images)


def write_textcaps(
    directory: Path, records: Sequence[CaptionRecord], images: Named, size: tuple[int, int], split: str
) -> None:
    """A row a caption, each with all captions of its picture."""
    said = [(record, caption) for record in records for caption in record.captions]
    rows = [
        _row(record.images[0], size, split) | {
            "caption_id": number, "caption_str": caption, "caption_tokens": caption.split(),
            "reference_strs": list(record.captions), "image_name": record.id,
            "image_path": f"{split}/{record.images[0]}",
        }
        for number, (record, caption) in enumerate(said)
    ]
    dump(Path(directory) / f"TextCaps_0.1_{split}.json", _file("textcaps", "0.1", split, rows))
    _write_words(directory, {record.images[0]: record.texts for record in records}, split)
    write_pictures(Path(directory) / "images", images)


def _row(image: str, size: tuple[int, int], split: str) -> dict:
    return {"image_id": _image_id(image), "image_width": size[0], "image_height": size[1], "image_classes": [],
            "set_name": split, "flickr_original_url": "", "flickr_300k_url": ""}


def _image_id(image: str) -> str:
    return image.rpartition(".")[0]


def _file(name: str, version: str, split: str, rows: list[dict]) -> dict:
    return {"dataset_type": split, "dataset_name": name, "dataset_version": version, "data": rows}


def _write_words(directory: Path, words: Mapping[str, tuple[SceneText, ...]], split: str) -> None:
    rows = [
        {"image_id": _image_id(image), "ocr_tokens": [text.word for text in texts],
         "ocr_info": [_info(text) for text in texts]}
        for image, texts in words.items()
    ]
    dump(Path(directory) / f"TextVQA_Rosetta_OCR_v0.2_{split}.json", _file("textvqa", "0.2", split, rows))


def _info(text: SceneText) -> dict:
    assert text.box is not None
    left, top, right, bottom = text.box
    box = {"top_left_x": left, "top_left_y": top, "width": right - left, "height": bottom - top}
    return {"word": text.word, "bounding_box": box | dict.fromkeys(("rotation", "roll", "pitch", "yaw"), 0)}
