"""From records of any dataset to training data: what a batch of each kind holds, by the heads of the model.

| records | language model | heads.answers or heads.statement | dual encoder and others |
|---|---|---|---|
| questions | question, answer | question, `answers` [B, A] | "question answer" |
| statements | sentence, yes or no | sentence, `statement_labels` [B] | |
| captions | caption | caption | caption |
| contrasts | the true sentence | the true sentence | the true sentence |
| classes | "a photo of a …" | "what is it?", `answers` [B, A] | "a photo of a …" |
| regions, detections | | | phrases with `masks`, or `boxes` and `box_labels` |
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlmpipe.data.queries import queries_of_detections, queries_of_regions
from vlmpipe.data.records import (
    CaptionRecord,
    ClassRecord,
    ContrastRecord,
    DetectionRecord,
    QuestionRecord,
    Record,
    RegionRecord,
    StatementRecord,
)
from vlmpipe.data.task import (
    CLASS_CAPTION,
    CLASS_QUESTION,
    TaskConfig,
    answers_of,
    names_of,
    read_pictures,
    read_records,
    teaches,
    text_of,
)
from vlmpipe.errors import UserError
from vlmpipe.models.checks import check_answers
from vlmpipe.models.generate.rows import with_room
from vlmpipe.models.processor import Processor
from vlmpipe.models.vlm import VisionLanguageModel
from vlmpipe.train.batches import Dataset, Pair
from vlmpipe.train.objectives.answers import soft_targets
from vlmpipe.train.regions import RegionDataset
from vlmpipe.train.sources import Source

ABSENT = 2  # labels asked for in a picture that doesn't show them
CAPTIONED = (CaptionRecord, ContrastRecord)


@dataclass(frozen=True)
class Labelled:
    """A dataset with a text a row, and what else is known of each row: tensors [rows, …] by their names in a batch."""

    dataset: Dataset
    targets: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.dataset)

    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        known = {name: values[list(indices)] for name, values in self.targets.items()}
        return {**self.dataset.collate(indices), **known}


@dataclass(frozen=True)
class TaskSource:
    """Records with something to learn, and their encoded pictures by `names`.

    `rehearsed`: captions that are learned beside them.
    """

    names: tuple[str, ...]
    encoded: Sequence[bytes]
    records: tuple[Record, ...]
    rehearsed: Source | None = None

    @property
    def images(self) -> Sequence[bytes]:
        """Those of the captions come last."""
        return [*self.encoded, *(self.rehearsed.images if self.rehearsed else ())]

    def answers_for(self, model: VisionLanguageModel) -> tuple[str, ...]:
        """What a model without words of its own chooses among: every answer once, or as many of the commonest as the
        head `answers` has classes."""
        learned = [answer for record in self.records for answer in answers_of(record)[:1]]
        if model.answers is None:
            return tuple(sorted(set(learned)))
        common = sorted(Counter(learned).items(), key=lambda counted: (-counted[1], counted[0]))
        return tuple(answer for answer, _ in common[: model.config.heads.answers.classes])

    def lessons(
        self, images: np.ndarray, model: VisionLanguageModel, processor: Processor, per_row: int
    ) -> tuple[Dataset | Labelled | RegionDataset, str | None]:
        """The training data, and the objective that fits it; None: what fits the model.

        Args:
            images: uint8 [N, C, Y, X] of `images`.

        Raises:
            UserError: the model has no head for such records.
        """
        numbers = {name: number for number, name in enumerate(self.names)}
        kind, head = type(self.records[0]), None
        if kind in (QuestionRecord, ClassRecord) and model.image_tokens is None:
            check_answers(model)
        if model.language_model is None:
            head = "statement" if kind is StatementRecord else "answers"
        if kind in (RegionRecord, DetectionRecord):
            self._refuse_rehearsal()
            return self._regions(images, model, processor, per_row)
        if head is not None and getattr(model, head) is not None and kind not in CAPTIONED:
            self._refuse_rehearsal()
            return self._labelled(images, numbers, model, processor, head)
        pairs = tuple(pair for record in self.records for pair in pairs_of(record, numbers, processor))
        roomy = with_room(model, processor, max(len(names_of(record)) for record in self.records))
        texts = Source(self.encoded, pairs)
        texts = texts if self.rehearsed is None else texts.concat(self.rehearsed)
        return texts.lessons(images, model, roomy, per_row)

    def _refuse_rehearsal(self) -> None:
        if self.rehearsed is not None:
            raise UserError(
                "train.finetune.captions: found true where a row is more than a text; expected false; set it to false"
            )

    def _labelled(self, images, numbers, model, processor: Processor, head: str) -> tuple[Labelled, str]:
        rows, asked = [], []
        for record in self.records:
            asked.append(CLASS_QUESTION if isinstance(record, ClassRecord) else text_of(record))
            rows.append((numbered(names_of(record), numbers), (processor.encode(asked[-1]),)))
        if head == "statement":
            targets = {"statement_labels": torch.tensor([int(record.label) for record in self.records])}
        else:
            known = {answer: number for number, answer in enumerate(processor.answers)}
            given = [answers_of(record) for record in self.records]
            targets = {"answers": soft_targets(given, known, model.config.heads.answers.classes)}
        return Labelled(Dataset(images, tuple(rows)), targets), "statements" if head == "statement" else "answers"

    def _regions(self, images, model, processor: Processor, per_row: int) -> tuple[RegionDataset, str]:
        if model.mask is None and model.detection is None:
            raise UserError(
                "found phrases with masks and boxes and a model without heads.mask and heads.detection; expected one "
                "of them, such as model=clipseg; choose another model or task"
            )
        targets = "boxes" if model.mask is None else "masks"
        if isinstance(self.records[0], DetectionRecord):
            queries = queries_of_detections(self.records, ABSENT)
        else:
            queries = queries_of_regions(self.records)
        if targets == "masks":
            queries = [query for query in queries if query.masks or not query.boxes]
        return RegionDataset(images, self.names, queries, processor, targets, per_row), targets


def read_task(split: Path, task: TaskConfig, rehearsed: Source | None = None) -> TaskSource:
    """The records of a split with something to learn, and the pictures that they are about.

    Raises:
        UserError: there are none, or what the reader says.
    """
    found = read_records(split, task)
    records = tuple(record for record in found if teaches(record))
    if not records:
        raise UserError(
            f"{split}: found nothing to learn in {len(found)} records; expected answers, labels, captions or boxes"
        )
    names = tuple(dict.fromkeys(name for record in records for name in names_of(record)))
    pictures = read_pictures(split, task)
    return TaskSource(names, [pictures[name] for name in names], records, rehearsed)


# --- records -----------------------------------------------------------------------------------------------

def numbered(names: Sequence[str], numbers: dict[str, int]) -> int | tuple[int, ...]:
    found = tuple(numbers[name] for name in names)
    return found[0] if len(found) == 1 else found


def pairs_of(record: Record, numbers: dict[str, int], processor: Processor) -> list[Pair]:
    """The texts to learn about the record's pictures; see `batches.Pair`."""
    image = numbered(names_of(record), numbers)
    if isinstance(record, CaptionRecord):
        return [Pair(image, "", caption) for caption in record.captions]
    if isinstance(record, ContrastRecord):
        return [Pair(image, "", record.caption)]
    if isinstance(record, ClassRecord):
        return [Pair(image, "", CLASS_CAPTION.format(record.label))]
    text = text_of(record)
    asked = processor.statement(text) if isinstance(record, StatementRecord) else text
    return [Pair(image, asked, answers_of(record)[0])]
