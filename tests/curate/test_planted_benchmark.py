"""The arithmetic of benchmarks/planted.py on tables whose answer is known."""

import pyarrow as pa
import pytest

from benchmarks import planted
from vlmpipe.shards import write_table


def test_area_counts_pairs_in_order_and_ties_half():
    assert planted.area([3, 4], [1, 2]) == 1
    assert planted.area([1, 2], [3, 4]) == 0
    assert planted.area([1, 2], [1, 2]) == 0.5
    assert planted.area([2, 3, 5], [1, 4]) == pytest.approx(4 / 6)


def test_a_row_that_gave_way_to_its_planted_copy_is_no_false_drop(tmp_path):
    plan = [
        {"uid": "a", "url": "A", "fault": None, "twin_url": None},  # its copy stayed
        {"uid": "b", "url": "B", "fault": None, "twin_url": None},  # its copy fell too: one of them fell wrongly
        {"uid": "c", "url": "C", "fault": None, "twin_url": None},
        {"uid": "d", "url": "D", "fault": None, "twin_url": None},
        {"uid": "e", "url": "E", "fault": "near_duplicate", "twin_url": "A"},
        {"uid": "f", "url": "F", "fault": "near_duplicate", "twin_url": "B"},
    ]
    reasons = {"a": "near_duplicate", "b": "near_duplicate", "c": "clip", "d": None, "e": None, "f": "near_duplicate"}
    table = pa.table({"uid": list(reasons), "reason": list(reasons.values())})
    write_table(tmp_path / "decisions.parquet", table)
    found = planted.false_drops(plan, tmp_path / "decisions.parquet")
    assert found == {"near_duplicate": 0.25, "clip": 0.25, "sound": 4}


def test_a_fifth_of_the_unseen_captions_moves_and_none_is_lost():
    captions = [f"figure {number}" for number in range(100)]
    pairs = pa.table({"url": [f"u{number}" for number in range(100)], "caption": captions})
    trusted = set(captions[:50])
    listed, swapped = planted.swap(pairs, trusted)
    now = listed["caption"].to_pylist()
    moved = {url for url, old, new in zip(pairs["url"].to_pylist(), captions, now) if old != new}
    assert moved == swapped and len(swapped) == 10 and all(int(url[1:]) >= 50 for url in swapped)
    assert sorted(now) == sorted(captions)
