"""expectations.py through the real Great Expectations: what must fail fails, and the pages open from disk."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from vlmpipe.config import parse
from vlmpipe.curate.expectations import (
    ExpectationsConfig,
    between,
    column,
    one_of,
    quantiles,
    suite,
    suite_name,
    suites,
    unique,
    validate,
)
from vlmpipe.errors import UserError

RULES = suite(column("uid", unique()), column("side", between((1, 100)), present=0.9), column("status", one_of("ok")))


def good(rows: int = 20) -> pd.DataFrame:
    return pd.DataFrame({"uid": [f"u{i}" for i in range(rows)], "side": np.arange(rows) + 1.0, "status": "ok"})


def check(frames: list[pd.DataFrame], docs: Path, rules=RULES) -> dict:
    """(expectation, column) -> record."""
    records = validate({"raw-pool": rules}, {"raw-pool": frames}, docs)
    assert len(records) == len(rules)
    return {(record["expectation"].removeprefix("expect_"), record["column"]): record for record in records}


def failed(found: dict) -> set:
    return {key for key, record in found.items() if not record["success"]}


def test_good_data_passes_with_numbers(tmp_path):
    found = check([good()], tmp_path / "docs")
    assert failed(found) == set()
    assert found["table_row_count_to_be_between", None]["observed"] == 20
    assert {record["fraction"] for record in found.values()} == {None, 1.0}
    assert all(record["message"] is None for record in found.values())


def test_faults_are_found_counted_and_told(tmp_path):
    frame = good()
    frame.loc[3, "uid"] = "u4"
    frame.loc[5, "side"] = 500
    frame.loc[6:7, "status"] = "odd"
    found = check([frame], tmp_path / "docs")
    assert failed(found) == {
        ("column_values_to_be_unique", "uid"), ("column_values_to_be_between", "side"),
        ("column_values_to_be_in_set", "status"),
    }
    side = found["column_values_to_be_between", "side"]
    assert side["fraction"] == 19 / 20
    assert side["observed"] == {"rows": 20, "unexpected": 1, "examples": [500.0]}
    expected = "raw-pool.side: expect_column_values_to_be_between (min_value 1, max_value 100): "
    assert side["message"] == expected + "1 of 20 rows not so (such as 500.0)"
    assert found["column_values_to_be_in_set", "status"]["fraction"] == 18 / 20


def test_an_empty_frame_fails(tmp_path):
    """Great Expectations passes not-null, unique, between and in-set on no rows; the row count must not."""
    found = check([good(0)], tmp_path / "docs")
    assert ("table_row_count_to_be_between", None) in failed(found)


def test_no_batch_at_all_fails(tmp_path):
    found = check([], tmp_path / "docs")
    assert failed(found) >= {("table_row_count_to_be_between", None), ("column_values_to_be_unique", "uid")}


def test_an_all_null_column_fails(tmp_path):
    found = check([good().assign(side=np.nan)], tmp_path / "docs")
    assert failed(found) == {("column_values_to_not_be_null", "side")}
    assert found["column_values_to_not_be_null", "side"]["fraction"] == 0
    assert found["column_values_to_be_between", "side"]["fraction"] is None


def test_a_missing_column_fails_with_its_message(tmp_path):
    found = check([good().drop(columns="side")], tmp_path / "docs")
    assert failed(found) == {("column_values_to_not_be_null", "side"), ("column_values_to_be_between", "side")}
    for key in failed(found):
        assert 'could not be checked: Error: The column "side"' in found[key]["message"]
        assert "\n" not in found[key]["message"]


def test_an_error_inside_great_expectations_fails_with_its_message(tmp_path):
    found = check([good().assign(side="text")], tmp_path / "docs")
    record = found["column_values_to_be_between", "side"]
    assert not record["success"] and "could not be checked" in record["message"]


def test_present_allows_its_share_of_nulls_and_no_more(tmp_path):
    some, more = good(), good()
    some.loc[:1, "side"] = np.nan
    more.loc[:2, "side"] = np.nan
    assert failed(check([some], tmp_path / "some")) == set()
    assert failed(check([more], tmp_path / "more")) == {("column_values_to_not_be_null", "side")}


def test_a_fault_in_one_batch_of_three_is_found(tmp_path):
    frames = [good(), good().assign(status="odd"), good()]
    found = check(frames, tmp_path / "docs")
    assert failed(found) == {("column_values_to_be_in_set", "status")}
    record = found["column_values_to_be_in_set", "status"]
    assert record["batches"] == 3 and record["fraction"] == 40 / 60
    assert len(list((tmp_path / "docs/validations").rglob("*.html"))) == 3


def test_quantiles_are_checked(tmp_path):
    rules = suite(column("side", quantiles({"0.5": (15, 20)})))
    found = check([good()], tmp_path / "docs", rules)
    record = found["column_quantile_values_to_be_between", "side"]
    assert not record["success"] and record["observed"]["values"] == [11.0]  # the nearest row, not between two


def test_every_value_rule_stands_behind_a_not_null_guard():
    for name, rules in suites(["a", "b.c"], ExpectationsConfig(languages={"en": (0.5, None)}), ["a"]).items():
        assert rules[0].kind == "ExpectTableRowCountToBeBetween", name
        guarded = {rule.column for rule in rules if rule.kind == "ExpectColumnValuesToNotBeNull"}
        assert guarded == {rule.column for rule in rules[1:]}, name
    assert suite_name("raw", "b.c") == "raw-b_c"


def test_docs_open_from_disk_and_link(tmp_path):
    docs = tmp_path / "docs"
    check([good().assign(status="odd")], docs)
    index = (docs / "index.html").read_text()
    links = re.findall(r'href="([^"]+)"', index)
    assert "expectations/raw-pool.html" in links and any(link.startswith("validations/") for link in links)
    assert "raw-pool.status: expect_column_values_to_be_in_set" in index
    pages = sorted(docs.rglob("*.html"))
    assert len(pages) == 3
    for page in pages:
        text = page.read_text()
        assert not re.search(r"""\bsrc=["']?https?:|<link[^>]+href=["']?https?:|<script|url\(['"]?http""", text), page
        for target in re.findall(r"""(?:href|src)=["']([^"'#]+)""", text):
            assert target.startswith("https://") or (page.parent / target).exists(), (page, target)
    assert "https://" not in (docs / "static/styles/data_docs_default_styles.css").read_text()
    assert "status" in next((docs / "validations").rglob("*.html")).read_text()


def test_equal_input_gives_equal_bytes(tmp_path):
    for run in ("one", "two"):
        check([good().assign(status="odd"), good()], tmp_path / run)
    one, two = tmp_path / "one", tmp_path / "two"
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


def test_great_expectations_is_imported_late_and_uses_no_network(tmp_path):
    code = (
        "import sys, pathlib, pandas as pd\n"
        "from vlmpipe.curate.expectations import column, suite, validate\n"
        "assert 'great_expectations' not in sys.modules\n"
        "import socket\n"
        "def refuse(*arguments): raise SystemExit(f'network: {arguments[1:]}')\n"
        "socket.socket.connect = refuse\n"
        "validate({'s': suite(column('a'))}, {'s': [pd.DataFrame({'a': [1]})]}, pathlib.Path(sys.argv[1]))\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "mapping, expected",
    [
        ({"success_rate": [0.9, 0.5]}, r"success_rate: found \[0.9, 0.5\]"),
        ({"sides": [None, None]}, "sides: found"),
        ({"clip_quantiles": {"median": [0, 1]}}, "clip_quantiles: found 'median'"),
        ({"present": 2}, "present: found 2"),
        ({"batch_rows": 0}, "batch_rows: found 0"),
        ({"succes_rate": [0, 1]}, "did you mean 'success_rate'"),
    ],
)
def test_config_errors_name_the_key(mapping, expected):
    with pytest.raises(UserError, match=expected):
        parse(ExpectationsConfig, mapping, "params.yaml: audit.expectations")
