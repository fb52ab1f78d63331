"""Pickles that are data alone, read without unpickling: nothing of such a file is ever run or imported.

`pickletools.genops` only splits the bytes into operations. Those that build lists, tuples, dicts, numbers and text are
followed here; at any other, such as the ones that import a name or call it, the file is refused. So is one whose memo
makes more of it than its bytes say: what a value stands for is counted before anything looks at it.
"""

import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlmpipe.errors import UserError

_MARK = object()
_VALUES = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
})
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_SILENT = frozenset({"PROTO", "FRAME"})
_KEYS = (str, int, float, type(None))  # the hash of nested tuples may take for ever
DEPTH = 50  # levels of nesting
REPEATS = 10  # values that a file may stand for, for each of its bytes: without repetition each takes one or more


class Refused(Exception):
    """The pickle does more than build data; the text says what."""


def read_plain_pickle(path: Path) -> Any:
    """The lists, dicts, numbers and texts of a pickle.

    Raises:
        UserError: the file does anything else, or is damaged.
    """
    try:
        return _follow(Path(path).read_bytes())
    except Refused as error:
        said = str(error)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        said = f"a damaged pickle ({error})"
    raise UserError(f"{path}: found {said}; expected a pickle of lists, dicts, numbers and text alone, since a "
                    f"pickle can run anything; convert it to json where you trust it: "
                    f"json.dump(pickle.load(open(NAME, 'rb')), open('refs.json', 'w'))")


def _follow(data: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for operation, argument, _ in pickletools.genops(data):
        name = operation.name
        if name == "STOP":
            return _counted(stack.pop(), REPEATS * len(data))
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name not in _SILENT:
            _build(name, stack)
    raise ValueError("no end")


def _build(name: str, stack: list[Any]) -> None:
    """Operations that make one value of several on the stack."""
    if name in ("LIST", "TUPLE", "DICT"):
        items = _since_mark(stack)
        stack.append({"LIST": list, "TUPLE": tuple, "DICT": _pairs}[name](items))
    elif name in _TUPLES:
        count = _TUPLES[name]
        stack[-count:] = [tuple(stack[-count:])]
    elif name in ("APPEND", "APPENDS"):
        items = _since_mark(stack) if name == "APPENDS" else [stack.pop()]
        stack[-1].extend(items)
    elif name in ("SETITEM", "SETITEMS"):
        items = _since_mark(stack) if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
        stack[-1].update(_pairs(items))
    else:
        raise Refused(f"the operation {name} in it")


def _since_mark(stack: list[Any]) -> list[Any]:
    place = next((place for place in reversed(range(len(stack))) if stack[place] is _MARK), None)
    if place is None:
        raise ValueError("no mark")
    items = stack[place + 1:]
    del stack[place:]
    return items


def _pairs(items: list[Any]) -> dict[Any, Any]:
    keys = items[::2]
    if not all(isinstance(key, _KEYS) for key in keys):
        raise Refused("a key that is no text or number")
    return dict(zip(keys, items[1::2], strict=True))


def _counted(value: Any, most: int) -> Any:
    """The value as it came, once it is known to stand for no more than `most` values.

    Every container is opened once and closed when all in it are; what holds an open one is in it.

    Raises:
        Refused: it stands for more, is nested deeper than DEPTH, or holds itself.
    """
    closed: dict[int, tuple[int, int]] = {}  # by id: the values that it stands for, and levels
    opened: set[int] = set()
    waiting = _containers([value])
    while waiting:
        item = waiting[-1]
        if id(item) in closed:
            waiting.pop()
            continue
        inner = _containers(item)
        if id(item) in opened:
            closed[id(item)] = _measured(len(item), [closed[id(part)] for part in inner], most)
            continue
        opened.add(id(item))
        if any(id(part) in opened and id(part) not in closed for part in inner):
            raise Refused("a value that holds itself")
        waiting += [part for part in inner if id(part) not in closed]
    return value


def _containers(item: Any) -> list[Any]:
    values = item.values() if isinstance(item, dict) else item
    return [value for value in values if isinstance(value, (list, tuple, dict))]


def _measured(length: int, parts: list[tuple[int, int]], most: int) -> tuple[int, int]:
    """The values that a container stands for, and its levels."""
    count = length + sum(count for count, _ in parts)
    levels = 1 + max((levels for _, levels in parts), default=0)
    if count > most:
        raise Refused(f"repetitions that make more than {most} values of it")
    if levels > DEPTH:
        raise Refused(f"more than {DEPTH} levels of nesting")
    return count, levels
