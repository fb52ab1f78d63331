"""Pickles that are data alone, read without unpickling: nothing of such a file is ever run or imported.

`pickletools.genops` only splits the bytes into operations. Those that build lists, tuples, dicts, numbers and text are
followed here; at any other, such as the ones that import a name or call it, the file is refused.
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
            return stack.pop()
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
    place = max(i for i, value in enumerate(stack) if value is _MARK)
    items = stack[place + 1:]
    del stack[place:]
    return items


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))
