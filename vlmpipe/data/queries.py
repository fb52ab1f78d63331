"""Phrases about pictures and what they name there: what is learned and asked of regions and detections alike."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from vlmpipe.data.masks import Mask
from vlmpipe.data.records import Box, DetectionRecord, RegionRecord


@dataclass(frozen=True)
class Query:
    """A phrase about the picture of this name, and all that it names there: boxes in pixels, and masks.

    A query for what is not in the picture has neither. size: (width, height) of the picture.
    """

    image: str
    size: tuple[int, int]
    phrase: str
    boxes: tuple[Box, ...] = ()
    masks: tuple[Mask, ...] = ()


def queries_of_regions(records: Iterable[RegionRecord]) -> list[Query]:
    """Every expression is a query for its one thing."""
    return [
        Query(record.image, record.size, phrase, (record.box,), () if record.mask is None else (record.mask,))
        for record in records
        for phrase in record.expressions
    ]


def queries_of_detections(records: Sequence[DetectionRecord], absent: int = 0, seed: int = 0) -> list[Query]:
    """Every label in a picture is a query for all things of that label, and so are `absent` others, for nothing.

    A label that has a crowd in a picture is not asked for there: its single things are not all told apart.
    """
    known = sorted({label for record in records for label in record.labels})
    found = []
    for number, record in enumerate(records):
        crowds = {label for label, crowd in zip(record.labels, record.crowd) if crowd}
        for label in sorted(set(record.labels) - crowds):
            places = [place for place, other in enumerate(record.labels) if other == label]
            boxes = tuple(tuple(map(float, record.boxes[place])) for place in places)
            masks = tuple(record.masks[place] for place in places if record.masks[place] is not None)
            found.append(Query(record.image, record.size, label, boxes, masks if len(masks) == len(places) else ()))
        others = [label for label in known if label not in record.labels]
        order = np.random.default_rng([seed, number]).permutation(len(others))[:absent]
        found += [Query(record.image, record.size, others[place]) for place in sorted(order)]
    return found
