"""Training data of places in pictures: phrases, and the masks or boxes of what they name.

Shapes: N pictures of the dataset, n of a batch, B phrases of a batch, P phrases of a row, G most boxes of a picture,
C colours, Y and X pixels.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmpipe.data.queries import Query
from vlmpipe.errors import UserError
from vlmpipe.models.locate import window
from vlmpipe.models.processor import EncodedText, stack
from vlmpipe.train.objectives.boxes import NONE


class RegionDataset:
    """Rows for `Batches`: a picture each, with at most `per_row` of the queries about it in one go.

    Args:
        images: uint8 [N, C, Y, X], see `pictures.decode_images`; names: of each, as queries call them.
        processor: of the model that is trained.
        targets: what a batch holds besides pictures and phrases, for the objective of that name.

    Raises:
        UserError: no query, a query about an unknown picture, or one without the mask of what it names.
    """

    def __init__(
        self, images: np.ndarray, names: Sequence[str], queries: Sequence[Query], processor: Any,
        targets: Literal["masks", "boxes"], per_row: int = 8,
    ):
        self.images, self.processor, self.targets = images, processor, targets
        numbers = {name: number for number, name in enumerate(names)}
        check_queries(queries, numbers, targets)
        by_image: dict[str, list[Query]] = {}
        for query in queries:
            by_image.setdefault(query.image, []).append(query)
        self.rows = tuple(
            (numbers[image], tuple(asked[at : at + per_row]))
            for image, asked in by_image.items()
            for at in range(0, len(asked), per_row)
        )
        self._encoded: dict[str, EncodedText] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def encode(self, phrase: str) -> EncodedText:
        """Phrases come again and again: each is tokenized once."""
        if phrase not in self._encoded:
            self._encoded[phrase] = self.processor.encode(phrase)
        return self._encoded[phrase]

    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """What `objectives.masks` or `objectives.boxes` takes."""
        rows = [self.rows[index] for index in indices]
        counts = [len(queries) for _, queries in rows]
        batch = stack([[self.encode(query.phrase)] for _, queries in rows for query in queries])
        batch |= {
            "images": torch.from_numpy(self.images[[number for number, _ in rows]]),
            "image_rows": torch.tensor([0, *np.cumsum(counts)[:-1].tolist()]),
        }
        return batch | (self._masks(rows) if self.targets == "masks" else self._boxes(rows))

    def _masks(self, rows) -> dict[str, Tensor]:
        seen = [self.mask(query) for _, queries in rows for query in queries]
        return {"masks": torch.from_numpy(np.stack(seen))}

    def _boxes(self, rows) -> dict[str, Tensor]:
        found = [
            [(box, label) for label, query in enumerate(queries) for box in self.boxes(query)] for _, queries in rows
        ]
        most = max(1, max(map(len, found)))
        boxes = torch.zeros(len(rows), most, 4)
        labels = torch.full((len(rows), most), NONE)
        for picture, pairs in enumerate(found):
            for place, (box, label) in enumerate(pairs):
                boxes[picture, place], labels[picture, place] = torch.tensor(box), label
        return {"boxes": boxes, "box_labels": labels}

    def mask(self, query: Query) -> np.ndarray:
        """uint8 [Y, X]: 1 where the model's picture shows what the phrase names."""
        width, height = query.size
        pixels = np.zeros((height, width), bool)
        for mask in query.masks:
            pixels |= mask.pixels()
        part = Image.fromarray(pixels.astype(np.uint8) * 255).crop(window(self.processor, query.size))
        side = self.images.shape[-2:]
        return (np.asarray(part.resize(side[::-1], Image.Resampling.BILINEAR)) >= 128).astype(np.uint8)

    def boxes(self, query: Query) -> list[tuple[float, float, float, float]]:
        """Centre x and y, width and height in shares of what the model sees; what it doesn't see is cut off."""
        left, top, right, bottom = window(self.processor, query.size)
        found = []
        for box in query.boxes:
            corners = (np.array(box) - [left, top] * 2) / ([right - left, bottom - top] * 2)
            x0, y0, x1, y1 = np.clip(corners, 0, 1).tolist()
            if x1 > x0 and y1 > y0:
                found.append(((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0))
        return found


def check_queries(queries: Sequence[Query], numbers: dict[str, int], targets: str) -> None:
    if not queries:
        raise UserError("found no phrase to train on; expected at least one; check the annotations")
    for query in queries:
        if query.image not in numbers:
            raise UserError(f"found a phrase about the picture {query.image!r}; expected one of {len(numbers)} given")
        if targets == "masks" and query.boxes and not query.masks:
            raise UserError(
                f"found no mask of {query.phrase!r} in {query.image!r}; expected one; leave out what has none"
            )
