"""Strict configs: plain mappings become frozen dataclasses, and what does not fit fails by name.

Every config is a frozen dataclass that stands beside the code that it configures. `parse` is the one
way from yaml to such a dataclass.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from vlmpipe.errors import UserError

Config = TypeVar("Config")


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the closest known name, or an empty string."""
    match = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""


def parse(cls: type[Config], mapping: Mapping[str, Any] | None, where: str) -> Config:
    """Build `cls` from `mapping`; `where` names the file and section for error messages.

    Raises:
        UserError: an unknown or missing key or a value of the wrong type, named with its full path.
    """
    mapping = {} if mapping is None else mapping
    if not isinstance(mapping, Mapping):
        raise UserError(f"{where}: found {type(mapping).__name__} {mapping!r}; expected a mapping of keys to values")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in mapping:
        if key not in fields:
            hint = nearest(key, fields)
            raise UserError(f"{where}: unknown key '{key}'{hint}; expected one of: {', '.join(fields)}")
    hints = typing.get_type_hints(cls)
    values = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in mapping.items()}
    missing = [name for name, field in fields.items() if name not in values and _required(field)]
    if missing:
        raise UserError(f"{where}: missing key '{missing[0]}'; expected a value of type {hints[missing[0]]}")
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """The plain mapping of a config, ready for json or yaml; `parse` takes it back."""
    return dataclasses.asdict(config)


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(expected: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if expected is Any:
        return value
    if dataclasses.is_dataclass(expected):
        return parse(expected, value, where)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is Literal:
        if value in arguments:
            return value
        hint = nearest(value, arguments)
        raise UserError(f"{where}: found {value!r}; expected one of {', '.join(map(repr, arguments))}{hint}")
    if origin in (list, tuple):
        return _convert_sequence(origin, arguments, value, where)
    if origin is dict:
        return _convert_dict(arguments, value, where)
    return _convert_scalar(expected, value, where)


def _convert_union(choices: tuple, value: Any, where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    choices = tuple(choice for choice in choices if choice is not type(None))
    if len(choices) == 1:
        return _convert(choices[0], value, where)
    for choice in choices:
        try:
            return _convert(choice, value, where)
        except UserError:
            continue
    names = " or ".join(getattr(choice, "__name__", str(choice)) for choice in choices)
    raise UserError(f"{where}: found {type(value).__name__} {value!r}; expected {names}")


def _convert_sequence(origin: type, arguments: tuple, value: Any, where: str) -> Any:
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        raise UserError(f"{where}: found {type(value).__name__} {value!r}; expected a list")
    if origin is tuple and len(arguments) > 0 and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise UserError(f"{where}: found {len(value)} values; expected {len(arguments)}")
        kinds = arguments
    else:
        kinds = (arguments[0] if arguments else Any,) * len(value)
    return origin(_convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value)))


def _convert_dict(arguments: tuple, value: Any, where: str) -> dict:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: found {type(value).__name__} {value!r}; expected a mapping")
    kind = arguments[1] if arguments else Any
    return {str(key): _convert(kind, item, f"{where}.{key}") for key, item in value.items()}


def _convert_scalar(expected: type, value: Any, where: str) -> Any:
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if expected is float and isinstance(value, str):
        # YAML 1.1 reads 1e-3 as text; people write it for learning rates.
        try:
            return float(value)
        except ValueError:
            raise UserError(f"{where}: found text {value!r}; expected a number") from None
    if expected is Path and isinstance(value, str):
        return Path(value)
    right = isinstance(value, expected) and not (expected is int and isinstance(value, bool))
    if not right:
        raise UserError(f"{where}: found {type(value).__name__} {value!r}; expected {expected.__name__}")
    return value
