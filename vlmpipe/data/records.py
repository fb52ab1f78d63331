"""What every dataset becomes: one typed record for each kind of task.

`images` are names of pictures as `pictures.pictures` finds them: a file name, or the address in a list of addresses.
Boxes are (left, top, right, bottom) in pixels, origin at the top left. Ids are text whatever the files have. `slices`
are what metrics are split by: question type, program family, ...
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from vlmpipe.data.masks import Mask

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class CaptionRecord:
    """A picture and all that is said of it. `texts`: the words in the picture, where the dataset gives them."""

    id: str
    images: tuple[str, ...]
    captions: tuple[str, ...]
    texts: tuple["SceneText", ...] = ()


@dataclass(frozen=True)
class SceneText:
    """One word that stands in a picture; `box` as shares of its sides, None where the dataset gives none."""

    word: str
    box: Box | None = None


@dataclass(frozen=True)
class Step:
    """One step of a functional program: `inputs` are numbers of earlier steps, `values` its constants."""

    function: str
    inputs: tuple[int, ...] = ()
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuestionRecord:
    """A question on one picture, or on the frames of a clip in order.

    answers: all human answers in the order of the file, () where a test split keeps them back. answerable: None where
    the dataset doesn't say. confidences: how sure each answerer was ("yes", "maybe", "no"), () where not said.
    """

    id: str
    images: tuple[str, ...]
    question: str
    answers: tuple[str, ...]
    answerable: bool | None = None
    slices: Mapping[str, str] = field(default_factory=dict)
    confidences: tuple[str, ...] = ()
    texts: tuple[SceneText, ...] = ()
    program: tuple[Step, ...] = ()


@dataclass(frozen=True)
class StatementRecord:
    """A sentence that is true or false of one picture or of two, left and right. Those of one `group` are the same
    sentence on other pictures: consistency asks for all of them right. label: None where a split keeps it back."""

    id: str
    images: tuple[str, ...]
    sentence: str
    label: bool | None
    group: str
    slices: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RegionRecord:
    """One thing in a picture and the expressions that each name it and nothing else there. size: (width, height)."""

    id: str
    image: str
    size: tuple[int, int]
    expressions: tuple[str, ...]
    box: Box
    mask: Mask | None
    label: str = ""


@dataclass(frozen=True, eq=False)
class DetectionRecord:
    """The N things in a picture, N from 0.

    size: (width, height). boxes: float32 [N, 4]. crowd: bool [N], True where a box stands for many that are not told
    apart, which evaluation neither rewards nor punishes.
    """

    id: str
    image: str
    size: tuple[int, int]
    boxes: np.ndarray
    labels: tuple[str, ...]
    crowd: np.ndarray
    masks: tuple[Mask | None, ...]


@dataclass(frozen=True)
class ClassRecord:
    """A picture and the name of its class."""

    id: str
    image: str
    label: str


@dataclass(frozen=True)
class ContrastRecord:
    """A picture, the sentence that is true of it, and others that differ by a swap and are false of it. Those of one
    `group` are pictures of which each has another's sentence as a false one."""

    id: str
    image: str
    caption: str
    false: tuple[str, ...]
    group: str
    slices: Mapping[str, str] = field(default_factory=dict)


Record = (
    CaptionRecord | QuestionRecord | StatementRecord | RegionRecord | DetectionRecord | ClassRecord | ContrastRecord
)
