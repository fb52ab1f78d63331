"""Text in the picture: what it says, how much of the picture it covers, and what the score is without it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from vlmpipe.curate.annotators.base import Annotator, Batch, Tools, floats
from vlmpipe.curate.annotators.faces import BOXES, box_mask, covered
from vlmpipe.errors import UserError

WORD = re.compile(r"\w+")
# One thread: the same bits wherever it runs.
SETTINGS = {
    "Global.log_level": "critical", "EngineConfig.onnxruntime.intra_op_num_threads": 1,
    "EngineConfig.onnxruntime.inter_op_num_threads": 1,
}


class Ocr(Annotator):
    """`text_in_image`, lines in reading order, "" without any; `text_area`: share of the picture in their boxes.

    `text_overlap`: share of the caption's words, letter case aside, that the text in the picture has too; 0 for a
    caption without words. `text_boxes`: upright ones around each line. By PP-OCR as rapidocr carries it, on
    onnxruntime; lines read with less than `min_confidence` do not count. 0.3 to 2 s a picture and core.
    """

    @dataclass(frozen=True)
    class Config:
        min_confidence: float = 0.5

        def __post_init__(self):
            if not 0 <= self.min_confidence <= 1:
                raise UserError(f"found min_confidence {self.min_confidence}; expected 0 to 1")

    fields: ClassVar = [
        pa.field("text_in_image", pa.string()), floats("text_area"), floats("text_overlap"),
        pa.field("text_boxes", BOXES),
    ]

    def __init__(self, config: Config, tools: Tools):
        super().__init__(config, tools)
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise UserError(f"found no OCR ({error}); expected the packages rapidocr and onnxruntime, which carry "
                            f"their models; install them, or turn curation.annotate.ocr and tmars off") from None
        self._engine = RapidOCR(params=SETTINGS | {"Global.text_score": config.min_confidence})

    def __call__(self, batch: Batch) -> list[pa.Array]:
        rows = []
        for array, caption in zip(batch.arrays, batch.captions):
            lines, boxes = self.read(array)
            text = " ".join(lines)
            rows.append((text, covered(boxes, array.shape), overlap(caption, text), boxes))
        return [pa.array(column, field.type) for column, field in zip(zip(*rows), self.fields)]

    def read(self, array: np.ndarray) -> tuple[list[str], list[list[int]]]:
        """The lines of uint8 [Y, X, 3] and their boxes."""
        found = self._engine(np.ascontiguousarray(array[:, :, ::-1]))  # it takes BGR
        if found.boxes is None or found.txts is None:
            return [], []
        return list(found.txts), [_upright(corners) for corners in found.boxes]


def _upright(corners_42: np.ndarray) -> list[int]:
    low, high = np.floor(corners_42.min(axis=0)).clip(0), np.ceil(corners_42.max(axis=0)).clip(0)
    return [int(value) for value in (*low, *high)]


def overlap(caption: str, text: str) -> float:
    """Share of the caption's words that stand in `text`."""
    words, seen = WORD.findall(caption.casefold()), set(WORD.findall(text.casefold()))
    return sum(word in seen for word in words) / len(words) if words else 0.0


class Tmars(Annotator):
    """`masked_clip_score`: the cosine of the caption with the picture whose text is painted over.

    T-MARS (Maini et al., arXiv 2307.03132): pairs that score only by their caption standing in the picture fall. Each
    box that `ocr` found takes the mean colour of the pixels around it; a picture without text keeps its score.
    """

    needs = ("text_boxes", "clip_score")
    uses_scorer = True
    fields: ClassVar = [floats("masked_clip_score")]

    def __call__(self, batch: Batch) -> list[pa.Array]:
        scores = batch.columns["clip_score"].to_numpy(zero_copy_only=False).copy()
        boxes = batch.columns["text_boxes"].to_pylist()
        if texts := [at for at, found in enumerate(boxes) if found]:
            masked = [Image.fromarray(mask_text(batch.arrays[at], boxes[at])) for at in texts]
            scores[texts] = self._scores(masked, [batch.captions[at] for at in texts])
        return [pa.array(scores)]

    def _scores(self, images: list[Image.Image], captions: list[str]) -> np.ndarray:
        scorer: Any = self.tools.scorer
        prefixed = [self.tools.caption_prefix + caption for caption in captions]
        pair = scorer.encode_images(images), scorer.encode_texts(prefixed)
        image_NE, text_NE = (np.asarray(part, np.float32) for part in pair)
        return (image_NE * text_NE).sum(axis=1, dtype=np.float32)


def mask_text(array: np.ndarray, boxes: Sequence[Sequence[int]]) -> np.ndarray:
    """uint8 [Y, X, 3] with each box in the mean colour of the ring around it, other boxes left out."""
    inside = box_mask(boxes, array.shape)
    masked = array.copy()
    for left, top, right, bottom in boxes:
        width = max(2, (bottom - top) // 5)
        ring = np.s_[max(top - width, 0) : bottom + width, max(left - width, 0) : right + width]
        around = array[ring][~inside[ring]]
        colour = around if len(around) else array.reshape(-1, 3)  # text from edge to edge: any colour hides it
        masked[top:bottom, left:right] = colour.mean(axis=0).round()
    return masked
