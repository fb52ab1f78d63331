from dataclasses import dataclass, field
from typing import Literal

import pytest

from vlmpipe.config import parse, to_dict
from vlmpipe.errors import UserError


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    kind: Literal["cosine", "linear"] = "cosine"


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    sizes: tuple[int, ...] = ()
    extra: dict[str, Inner] = field(default_factory=dict)
    limit: int | None = None

    def __post_init__(self):
        if self.limit is not None and self.limit < 0:
            raise UserError(f"limit: found {self.limit}; expected 0 or more")


def test_nested_mapping_becomes_typed_and_back():
    config = parse(Outer, {"name": "a", "inner": {"rate": 1}, "sizes": [1, 2], "extra": {"b": {}}}, "params: outer")
    assert config == Outer("a", Inner(1.0), (1, 2), {"b": Inner()})
    assert isinstance(config.inner.rate, float)
    assert parse(Outer, to_dict(config), "again") == config


def test_numbers_that_yaml_reads_as_text():
    assert parse(Inner, {"rate": "1e-3"}, "x").rate == 1e-3


@pytest.mark.parametrize(
    ("mapping", "said"),
    [
        ({"name": "a", "iner": {}}, ["params: outer", "'iner'", "did you mean 'inner'"]),
        ({"name": "a", "inner": {"rat": 1}}, ["params: outer.inner", "did you mean 'rate'"]),
        ({}, ["missing key 'name'"]),
        ({"name": 3}, ["params: outer.name", "found int 3", "expected str"]),
        ({"name": "a", "inner": {"kind": "cosin"}}, ["'cosin'", "'cosine'", "'linear'", "did you mean 'cosine'"]),
        ({"name": "a", "sizes": 3}, ["expected a list"]),
        ({"name": "a", "sizes": ["x"]}, ["sizes[0]", "expected int"]),
        ({"name": "a", "limit": True}, ["found bool True", "expected int"]),
        ({"name": "a", "limit": -1}, ["limit: found -1"]),
        ([1], ["expected a mapping"]),
    ],
)
def test_what_does_not_fit_is_named_with_its_path(mapping, said):
    with pytest.raises(UserError) as error:
        parse(Outer, mapping, "params: outer")
    for part in said:
        assert part in str(error.value)
    assert "\n" not in str(error.value)
