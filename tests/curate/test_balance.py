"""MetaCLIP's matching and probabilities against the definition."""

import numpy as np
import pyarrow as pa
import pytest

from tests.curate.made_pools import made_rows
from vlmpipe.curate.balance import Balance, Matcher, probabilities, spaced
from vlmpipe.curate.filters import SelectConfig, decide
from vlmpipe.errors import UserError

ENTRIES = ["new york", "york", "dog", "st. louis", "u.s", ",", "new york city", "ice  cream", "Dog"]
CAPTIONS = [
    "new york", "New york city", "newyork", "a dog,dog", "st. louis", "ice  cream", "ice cream", "", " ", "a\tdog\n",
    "the new york city!", "dog", "york?new york", "Dog dog", ":dog;",
]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_matches_are_the_substrings_of_the_spaced_caption(caption):
    expected = [i for i, entry in enumerate(ENTRIES) if f" {entry} " in spaced(caption)]
    assert Matcher(ENTRIES)(caption) == expected


def test_spacing_sets_punctuation_apart():
    assert spaced("a,b\tc") == " a , b c "


def test_probabilities_are_the_formula():
    row, entry = np.array([0, 1, 1, 2, 3, 4]), np.array([0, 0, 1, 0, 0, 1])
    found = probabilities(row, entry, 6, cap=1)
    once, twice = 1 / 4, 1 / 2
    assert found == pytest.approx([once, 1 - (1 - once) * (1 - twice), once, once, twice, 0])
    assert probabilities(row, entry, 6, cap=2)[[1, 4]].tolist() == [1, 1]
    assert probabilities(row[:0], entry[:0], 2, cap=1).tolist() == [0, 0]


def test_the_draw_depends_on_the_uid_alone(tmp_path):
    (tmp_path / "m.txt").write_text("dog\n")
    config = SelectConfig(order=("downloaded", "decoded", "b"), rules={
        "b": {"kind": "balance", "metadata": str(tmp_path / "m.txt"), "cap": 50},
    })
    kept = []
    for order in (np.arange(100), np.random.default_rng(0).permutation(100)):
        rows = made_rows(100, caption=["a dog"] * 100, uid=[f"u{i}" for i in order])
        table = pa.concat_tables(decide(rows, config.ordered())[0].tables())
        kept.append(set(table.filter(table["kept"])["uid"].to_pylist()))
    assert kept[0] == kept[1] and 30 < len(kept[0]) < 70


def test_balancing_stands_last_and_needs_a_cap(tmp_path):
    rules = {"b": {"kind": "balance", "metadata": "m.txt"}}
    with pytest.raises(UserError, match="expected balancing last"):
        SelectConfig(order=("downloaded", "decoded", "b", "clip"), rules=rules)
    with pytest.raises(UserError, match="found cap 0"):
        Balance(tmp_path, cap=0)
