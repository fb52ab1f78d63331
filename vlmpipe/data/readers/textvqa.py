"""TextVQA and TextCaps: questions and captions that need the words in the picture, and the words that were read.

Formats: https://textvqa.org/dataset and https://textvqa.org/textcaps/dataset. Both have `data`, a list of objects; the
words stand in a file of their own (TextVQA_Rosetta_OCR_...json), one object a picture, or in each object.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from vlmpipe.data.fields import Entry, entries, filled, find, found_files, unique
from vlmpipe.data.records import CaptionRecord, QuestionRecord, SceneText

Words = Mapping[str, tuple[SceneText, ...]]


def read_textvqa(path: Path, ocr: Path | None = None) -> list[QuestionRecord]:
    """One record a question; () answers in the test split. `ocr`: the file of words, by default the one beside.

    Raises:
        UserError: a file or field is missing or wrong.
    """
    file = find(path, "TextVQA_[0-9]*.json")
    seen, words = set(), _words(path, ocr)
    return filled([_question(entry, seen, words) for entry in entries(file, "data")], file, "questions")


def _question(entry: Entry, seen: set[str], words: Words) -> QuestionRecord:
    image_id = entry.name("image_id")
    split = entry.optional("set_name", str)
    return QuestionRecord(
        unique(entry, seen, "question_id"), (f"{image_id}.jpg",), entry.field("question", str),
        entry.texts("answers") if entry.values.get("answers") is not None else (),
        slices={"split": split} if split else {}, texts=_texts(entry, image_id, words),
    )


def read_textcaps(path: Path, ocr: Path | None = None) -> list[CaptionRecord]:
    """One record a picture with all its captions, which the file has a row each; () in the test split.

    Raises:
        UserError: a file or field is missing or wrong.
    """
    file, words = find(path, "TextCaps*.json"), _words(path, ocr)
    rows: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries(file, "data"):
        rows[entry.name("image_id")].append(entry)
    records = [
        CaptionRecord(image_id, (f"{image_id}.jpg",), _captions(found), _texts(found[0], image_id, words))
        for image_id, found in rows.items()
    ]
    return filled(records, file, "captions")


def _captions(rows: list[Entry]) -> tuple[str, ...]:
    """Each row's own caption; where rows have none, all of them as one row repeats them."""
    own = [entry.field("caption_str", str) for entry in rows if entry.values.get("caption_str") is not None]
    if not own and rows[0].values.get("reference_strs") is not None:
        return rows[0].texts("reference_strs")
    return tuple(own)


# --- words -------------------------------------------------------------------------------------------------

def _words(path: Path, ocr: Path | None) -> Words:
    found = [Path(ocr)] if ocr else [] if Path(path).is_file() else found_files(path, "*OCR*.json")
    if not found:
        return {}
    file, seen = find(found[0]) if len(found) == 1 else find(path, "*OCR*.json"), set()
    return {unique(entry, seen, "image_id"): _listed(entry) for entry in entries(file, "data")}


def _texts(entry: Entry, image_id: str, words: Words) -> tuple[SceneText, ...]:
    if image_id in words:
        return words[image_id]
    return _listed(entry)


def _listed(entry: Entry) -> tuple[SceneText, ...]:
    """Words with their boxes from `ocr_info`, without from `ocr_tokens`."""
    if entry.values.get("ocr_info") is not None:
        return tuple(_placed(word) for word in entry.objects("ocr_info"))
    if entry.values.get("ocr_tokens") is not None:
        return tuple(SceneText(word) for word in entry.texts("ocr_tokens"))
    return ()


def _placed(entry: Entry) -> SceneText:
    box = entry.object("bounding_box")
    left, top, width, height = (
        float(box.field(name, int, float)) for name in ("top_left_x", "top_left_y", "width", "height")
    )
    return SceneText(entry.field("word", str), (left, top, left + width, top + height))
