"""Counting what was planted and what was caught, by hand."""

import pyarrow as pa
import pytest

from vlmpipe.curate.planted import caught
from vlmpipe.curate.urls import Columns, read_list
from vlmpipe.errors import UserError
from vlmpipe.shards import write_table

# fault, reason, and the number of the row that stayed in its place.
ROWS = [
    (None, None, None),
    (None, "clip", None),
    (None, "near_duplicate", 3),
    ("near_duplicate", None, None),
    ("near_duplicate", "near_duplicate", 3),
    ("near_duplicate", None, None),
    ("dead_link", "download:http_404", None),
    ("dead_link", "download:timeout", None),
    ("swapped_caption", "clip", None),
    ("swapped_caption", "clip", None),
    ("swapped_caption", "clip", None),
    ("swapped_caption", None, None),
    ("swapped_caption", "language", None),
]


@pytest.fixture
def files(tmp_path):
    # Two rows share url and caption: their uids differ by occurrence, as in the pool.
    urls = [f"http://x.test/{max(i, 1)}.jpg" for i in range(len(ROWS))]
    planted = {"url": urls, "caption": ["same"] * len(ROWS), "fault": [fault for fault, *_ in ROWS]}
    write_table(tmp_path / "planted.parquet", pa.table(planted))
    uids = [row["uid"] for row in read_list(tmp_path / "planted.parquet", Columns())]
    decided = {
        "uid": uids,
        "reason": [reason for _, reason, _ in ROWS],
        "other_uid": [None if twin is None else uids[twin] for *_, twin in ROWS],
    }
    write_table(tmp_path / "decisions.parquet", pa.table(decided))
    return tmp_path


def test_planted_and_caught_by_kind(files):
    found = caught(files / "planted.parquet", files / "decisions.parquet")
    assert found["rows"] == [
        {"kind": "dead_link", "planted": 2, "caught": 2, "reasons": {"download:http_404": 1, "download:timeout": 1}},
        {"kind": "near_duplicate", "planted": 3, "caught": 2, "reasons": {"twin_dropped": 1, "near_duplicate": 1}},
        {"kind": "swapped_caption", "planted": 5, "caught": 4, "reasons": {"clip": 3, "language": 1}},
    ]


def test_swapped_captions_as_a_detection_problem(files):
    swapped = caught(files / "planted.parquet", files / "decisions.parquet")["swapped"]
    assert swapped == {"planted": 5, "dropped": 4, "hits": 3, "precision": 0.75, "recall": 0.6}
    nothing = caught(files / "planted.parquet", files / "decisions.parquet", rule="off")["swapped"]
    assert nothing["precision"] is None and nothing["recall"] == 0


def test_a_plan_of_another_world_is_refused(files):
    write_table(files / "planted.parquet", pa.table({"url": ["u"], "caption": ["c"], "fault": ["dead_link"]}))
    with pytest.raises(UserError, match="1 planted rows without a decision"):
        caught(files / "planted.parquet", files / "decisions.parquet")
    with pytest.raises(UserError, match="run `select`"):
        caught(files / "planted.parquet", files / "none.parquet")
