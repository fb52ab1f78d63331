"""What an annotator is, and the batch that all annotators share: one decode a picture.

Legend: N pairs of a batch that decode, E width of the scorer's space, Y and X pixels of one picture.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow as pa
from PIL import Image

SMALL_SIDE = 256  # longest side at which sharpness and its like are measured: numbers of one scale


@dataclass
class Batch:
    """N decoded pairs. `columns` holds what earlier annotators of the list found, by column name."""

    images: list[Image.Image]
    captions: list[str]
    columns: dict[str, pa.Array] = field(default_factory=dict)
    prepared: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.captions)

    @cached_property
    def arrays(self) -> list[np.ndarray]:
        """uint8 [Y, X, 3] of each picture."""
        return [np.asarray(image) for image in self.images]

    @cached_property
    def lumas(self) -> list[np.ndarray]:
        """uint8 [Y, X]: BT.601 luma of each picture, longest side at most SMALL_SIDE."""
        return [shrink(cv2.cvtColor(array, cv2.COLOR_RGB2GRAY), SMALL_SIDE) for array in self.arrays]

    def take(self, index: Sequence[int]) -> "Batch":
        """Some of the pairs, with nothing prepared."""
        columns = {name: column.take(pa.array(index, pa.int64())) for name, column in self.columns.items()}
        return Batch([self.images[at] for at in index], [self.captions[at] for at in index], columns)


def shrink(array: np.ndarray, side: int) -> np.ndarray:
    """A picture [Y, X] or [Y, X, C] with its longest side at most `side`, by area; smaller ones stay as they are."""
    height, width = array.shape[:2]
    if max(height, width) <= side:
        return array
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(array, size, interpolation=cv2.INTER_AREA)


@dataclass(frozen=True)
class NoConfig:
    """For annotators without a choice to make."""


class Tools:
    """What annotators are built with. The scorer is loaded when the first of them asks for it."""

    def __init__(self, source: str = "", batch_size: int = 64, caption_prefix: str = ""):
        self._source, self._batch_size, self.caption_prefix = source, batch_size, caption_prefix

    @cached_property
    def scorer(self) -> Any:
        from vlmpipe.models.scorer import load_scorer

        return load_scorer(self._source, batch_size=self._batch_size)


class Annotator:
    """Measures N pairs: `fields` are its typed columns, a call returns one array [N] for each.

    A call that raises is repeated pair by pair: those that raise get nulls and the reason. Numbers that are not
    finite become nulls with a reason, and a pair whose `needs` (columns of earlier annotators) are null is not asked.
    `prepare` may run on a thread beside another batch's call; the call finds its result in `batch.prepared`.
    """

    Config: ClassVar[type] = NoConfig
    fields: Sequence[pa.Field]
    uses_scorer: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, tools: Tools):
        self.config, self.tools = config, tools

    @staticmethod
    def weights(config: Any) -> tuple[Path, ...]:
        """Files whose bytes decide the numbers."""
        return ()

    def prepare(self, batch: Batch, mapped: Callable) -> Any:
        """`mapped` is `map`, or the one of a pool of threads."""
        return None

    def __call__(self, batch: Batch) -> list[pa.Array]:
        raise NotImplementedError


def several(kind: pa.DataType, count: int = -1) -> pa.DataType:
    """A list, of `count` where that is fixed. Parquet names its items so: rewritten, a file is the same."""
    return pa.list_(pa.field("element", kind), count)


def floats(name: str) -> pa.Field:
    return pa.field(name, pa.float32())


def embedding_rows(column: pa.Array) -> np.ndarray:
    """float32 [N, E] of a column of embeddings without nulls."""
    return column.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, column.type.list_size)
