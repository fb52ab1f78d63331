"""What an error shows of a value: its beginning, however much there is of it."""

import pytest

from tests.data.readers.test_refcoco import doubled
from vlmpipe.data.fields import Entry, is_number
from vlmpipe.errors import UserError


def deep(levels):
    nest = ()
    for _ in range(levels):
        nest = (nest,)
    return nest


VALUES = {
    "wide": lambda: doubled(60), "deep": lambda: deep(5000), "text": lambda: "x" * 10**6,
    "list": lambda: list(range(10**6)), "wide dict": lambda: {"a": doubled(60)},
}


@pytest.mark.parametrize("kind", VALUES)
def test_an_error_shows_the_beginning_of_a_value(kind):
    value = VALUES[kind]()
    entry = Entry({"width": value, "box": [value, 1]}, "refs: [0]")
    with pytest.raises(UserError, match=r"refs: \[0\]\.width: found \w+ .*; expected int") as caught:
        entry.field("width", int)
    assert len(str(caught.value)) < 150
    with pytest.raises(UserError, match=r"\.box: found \[.*; expected 4 numbers") as caught:
        entry.numbers("box", 4)
    assert len(str(caught.value)) < 150


def test_a_number_is_finite_as_a_float_too():
    assert all(map(is_number, [0, -3, 1.5, 10**300]))
    assert not any(map(is_number, [10**400, -(10**400), float("inf"), float("-inf"), float("nan"), True, "1", None]))
