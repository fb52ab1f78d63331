"""Key maps: which of their tensors each of ours is made of. One map runs both ways.

A map is a plain dict from our names to `Rows`. Built by functions of our config, it needs no optional entries: a tensor
that a config doesn't have is not in its map.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from vlmpipe.errors import UserError


class Step(Protocol):
    """A change of layout and its inverse; biases pass through as they are."""

    def to_ours(self, tensor: Tensor) -> Tensor: ...

    def to_theirs(self, tensor: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Transpose:
    """GPT-2 stores its matrices input by output."""

    def to_ours(self, tensor: Tensor) -> Tensor:
        return tensor.T if tensor.ndim == 2 else tensor

    def to_theirs(self, tensor: Tensor) -> Tensor:
        return self.to_ours(tensor)


@dataclass(frozen=True)
class Reshape:
    """The same numbers in the same order under another shape."""

    ours: tuple[int, ...]
    theirs: tuple[int, ...]

    def to_ours(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.ours)

    def to_theirs(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.theirs)


@dataclass(frozen=True)
class Rows:
    """Our tensor is theirs, each changed by `steps` in order, and stacked by rows.

    sizes: our rows from each of `names`; needed where there are several.
    part: our tensor is only these rows (start, end) of the one in `names`; other entries hold the rest.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    steps: tuple[Step, ...] = ()
    part: tuple[int, int] | None = None

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        """Ours from theirs, which come in the order of `names`."""
        changed = []
        for tensor in tensors:
            for step in self.steps:
                tensor = step.to_ours(tensor)
            changed.append(tensor)
        whole = torch.cat(changed) if len(changed) > 1 else changed[0]
        return whole if self.part is None else whole[slice(*self.part)]

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Theirs from ours, by name."""
        parts = tensor.split(self.sizes) if len(self.names) > 1 else (tensor,)
        found = {}
        for name, part in zip(self.names, parts, strict=True):
            for step in reversed(self.steps):
                part = step.to_theirs(part)
            found[name] = part.contiguous()
        return found


KeyMap = dict[str, Rows]


def one(theirs: str, *steps: Step) -> Rows:
    """One tensor of theirs."""
    return Rows((theirs,), steps=steps)


def pair(
    ours: str, theirs: str | Sequence[str], *steps: Step, bias: bool = True, sizes: Sequence[int] = ()
) -> KeyMap:
    """Weight and bias of one layer; several of their layers are stacked, with `sizes` rows each."""
    names = (theirs,) if isinstance(theirs, str) else tuple(theirs)
    kinds = ("weight", "bias") if bias else ("weight",)
    return {f"{ours}.{kind}": Rows(tuple(f"{name}.{kind}" for name in names), tuple(sizes), steps) for kind in kinds}


def repeat(keys: KeyMap, count: int) -> KeyMap:
    """The map with `{i}` written out for each of `count` layers."""
    return {
        ours.replace("{i}", str(i)): replace(rows, names=tuple(name.replace("{i}", str(i)) for name in rows.names))
        for i in range(count)
        for ours, rows in keys.items()
    }


def prefixed(keys: KeyMap, ours: str = "", theirs: str = "") -> KeyMap:
    """A part's map inside a whole model, where the names begin with these."""
    return {
        ours + name: replace(rows, names=tuple(theirs + each for each in rows.names)) for name, rows in keys.items()
    }


def matches(name: str, patterns: Collection[str]) -> bool:
    """Whether one of the regular expressions is the whole name."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def to_ours(weights: Mapping[str, Tensor], keys: KeyMap, ignored: Collection[str] = ()) -> dict[str, Tensor]:
    """Our state from theirs; nothing is skipped but what `ignored` (patterns) names.

    Raises:
        UserError: keys of theirs that the map doesn't know, or lacks, named.
    """
    wanted = {name for rows in keys.values() for name in rows.names}
    extra = sorted(name for name in weights.keys() - wanted if not matches(name, ignored))
    missing = sorted(wanted - weights.keys())
    if missing or extra:
        raise UserError(
            f"weights: found {len(extra)} keys that don't map ({_some(extra)}) and none for {len(missing)} "
            f"({_some(missing)}); expected every key to map; the family's map or the checkpoint is of another kind"
        )
    return {ours: rows.merge([weights[name] for name in rows.names]) for ours, rows in keys.items()}


def to_theirs(weights: Mapping[str, Tensor], keys: KeyMap) -> dict[str, Tensor]:
    """Their state from ours: the inverse of `to_ours`, to the bit.

    Raises:
        UserError: keys of ours that the map doesn't know, or lacks, named.
    """
    extra, missing = sorted(weights.keys() - keys.keys()), sorted(keys.keys() - weights.keys())
    if missing or extra:
        raise UserError(
            f"model: found {len(extra)} weights that the family has no place for ({_some(extra)}) and none for "
            f"{len(missing)} ({_some(missing)}); expected a model of that family"
        )
    found: dict[str, Tensor] = {}
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for ours, rows in keys.items():
        split = rows.split(weights[ours])
        if rows.part is None:
            found.update(split)
        else:
            pieces.setdefault(rows.names[0], []).append((rows.part[0], split[rows.names[0]]))
    for name, parts in pieces.items():
        found[name] = torch.cat([part for _, part in sorted(parts, key=lambda part: part[0])])
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
