"""Counting what was planted and what was caught, by hand."""

import pyarrow as pa
import pytest

from vlmpipe.curate.planted import caught
from vlmpipe.curate.urls import Columns, read_list
from vlmpipe.errors import UserError
from vlmpipe.shards import write_table

# url, fault, recovers, the url that it repeats, reason
ROWS = [
    ("a", None, False, None, None),
    ("b", None, False, None, "clip"),
    ("c", None, False, None, "near_duplicate"),
    ("d", "near_duplicate", False, "c", None),
    ("e", "near_duplicate", False, "a", "near_duplicate"),
    ("f", "near_duplicate", False, "a", None),
    ("g", "dead_404", False, None, "download:http_404"),
    ("h", "dead_404", False, None, "download:timeout"),
    ("i", "busy", True, None, None),
    ("j", "busy", True, None, "clip"),
    ("k", "busy", True, None, "download:http_429"),
    ("l", "swapped", False, None, "clip"),
    ("m", "swapped", False, None, "clip"),
    ("n", "swapped", False, None, None),
    ("o", "swapped", False, None, "language"),
    ("o", "swapped", False, None, None),  # once more: its uid differs by occurrence, as in the pool
]


def write_plan(path, rows) -> None:
    url, fault, recovers, twin_url, _ = zip(*rows)
    columns = {"url": url, "caption": ["same"] * len(rows), "fault": fault, "recovers": recovers, "twin_url": twin_url}
    write_table(path, pa.table({name: list(values) for name, values in columns.items()}))


@pytest.fixture
def files(tmp_path):
    write_plan(tmp_path / "planted.parquet", ROWS)
    uids = [row["uid"] for row in read_list(tmp_path / "planted.parquet", Columns())]
    write_table(tmp_path / "decisions.parquet", pa.table({"uid": uids, "reason": [row[-1] for row in ROWS]}))
    return tmp_path


def test_planted_and_caught_by_kind(files):
    found = caught(files / "planted.parquet", files / "decisions.parquet")
    assert found["elsewhere"] == 0
    assert found["rows"] == [
        {"kind": "busy", "planted": 3, "caught": 2, "reasons": {"recovered": 2}},
        {"kind": "dead_404", "planted": 2, "caught": 2, "reasons": {"download:http_404": 1, "download:timeout": 1}},
        {"kind": "near_duplicate", "planted": 3, "caught": 2, "reasons": {"twin_dropped": 1, "near_duplicate": 1}},
        {"kind": "swapped", "planted": 5, "caught": 3, "reasons": {"clip": 2, "language": 1}},
    ]


def test_swapped_captions_as_a_detection_problem(files):
    swapped = caught(files / "planted.parquet", files / "decisions.parquet")["swapped"]
    assert swapped == {"planted": 5, "dropped": 4, "hits": 2, "precision": 0.5, "recall": 0.4}
    nothing = caught(files / "planted.parquet", files / "decisions.parquet", rule="off")["swapped"]
    assert nothing["precision"] is None and nothing["recall"] == 0


def test_rows_of_pools_that_were_not_selected_are_counted_apart(files):
    other = ("z", "swapped", False, None, None)
    write_plan(files / "planted.parquet", [*ROWS, other])
    found = caught(files / "planted.parquet", files / "decisions.parquet")
    assert found["elsewhere"] == 1
    assert found["swapped"]["planted"] == 5
    write_plan(files / "planted.parquet", [other])
    with pytest.raises(UserError, match="none of its rows"):
        caught(files / "planted.parquet", files / "decisions.parquet")


def test_no_selection_yet(files):
    with pytest.raises(UserError, match="run `select`"):
        caught(files / "planted.parquet", files / "none.parquet")
