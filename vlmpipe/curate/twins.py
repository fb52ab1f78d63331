"""The rules on look-alikes by hash: which row stays, and which one it stays instead of.

Legend: N all rows, A rows still alive, D dropped ones.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from vlmpipe.curate.columns import Rows
from vlmpipe.curate.duplicates import Near, greedy_twins, nearest
from vlmpipe.curate.rules import Drops
from vlmpipe.errors import UserError


@dataclass(frozen=True)
class ExactDuplicate:
    """Of rows with the same `column` (sha256 of the bytes; `pixel_hash` of the decoded picture), across pools, keeps
    the one of best priority. Value: 0 bits."""

    column: str = "sha256"
    alone: ClassVar = False

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        keys, known = rows.keys(self.column, alive)
        place = _repeated(keys, np.flatnonzero(known))
        order = place[np.lexsort((rows.priority(alive[place]), keys[place, 1], keys[place, 0]))]
        first = np.ones(len(order), bool)
        first[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
        winner = order[np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))] if len(order) else order
        lost, kept = order[~first], winner[~first]
        ascending = np.argsort(lost)
        lost, kept = lost[ascending], kept[ascending]
        return Drops(alive[lost], np.zeros(len(lost)), 0.0, alive[kept])


def _repeated(keys: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Those of the ascending `place` whose key begins as another's does: few, so that only few are put in order."""
    order = place[np.argsort(keys[place, 0])]
    same = keys[order[1:], 0] == keys[order[:-1], 0]
    twin = np.zeros(len(order), bool)
    twin[1:] |= same
    twin[:-1] |= same
    return np.sort(order[twin])


@dataclass(frozen=True)
class NearDuplicate(Near):
    """Of pictures that are near (see `duplicates.Near`), across pools, keeps the one of best priority. Value: bits."""

    alone: ClassVar = False

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        looks = rows.looks(alive)
        keeper, distance = greedy_twins(looks, rows.priority(alive), self)
        keeper[~looks.known] = np.flatnonzero(~looks.known)
        lost = np.flatnonzero((keeper != np.arange(len(alive))) | ~looks.known)
        missing = ~looks.known[lost]
        value = np.where(missing, np.nan, distance[lost])
        other = np.where(missing, -1, alive[keeper[lost]])
        return Drops(alive[lost], value, float(self.radius), other, missing=missing)


@dataclass(frozen=True)
class EvaluationOverlap(Near):
    """Drops pictures near one of the evaluation splits: what is tested on must not be trained on. Value: bits."""

    radius: int = 10
    splits: tuple[str, ...] = ("test",)
    alone: ClassVar = True

    def __post_init__(self):
        super().__post_init__()
        if not self.splits:
            raise UserError("found no splits; expected at least one, or the rule left out of order")

    def drops(self, rows: Rows, alive: np.ndarray) -> Drops:
        pictures = rows.evaluation(self.splits)
        looks = rows.looks(alive)
        which, distance = nearest(looks, pictures.looks, self)
        which[~looks.known] = -1
        hit = (which >= 0) | ~looks.known
        missing = ~looks.known[hit]
        value = np.where(missing, np.nan, distance[hit])
        names = pictures.uids.take(pa.array(which[hit], mask=missing))
        return Drops(alive[hit], value, float(self.radius), names=names, missing=missing)
