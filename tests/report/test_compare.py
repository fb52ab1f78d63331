"""Two selections side by side: counts by what the reasons became, and a page that is safe to open."""

import subprocess

import pytest

from tests.curate.made_pools import write_world
from vlmpipe.__main__ import main
from vlmpipe.config import parse
from vlmpipe.curate.filters import SelectConfig, select
from vlmpipe.errors import UserError
from vlmpipe.publish import selection_at
from vlmpipe.report.compare import compare, write_page

LOOSE = {"order": ["downloaded", "decoded"]}
STRICT = {"order": ["downloaded", "decoded", "exact_duplicate", "near_duplicate"], "prefer": "first"}


@pytest.fixture
def sides(tmp_path, monkeypatch):
    pools, notes, questions, _ = write_world(tmp_path, monkeypatch)
    for name, settings in (("a", LOOSE), ("b", STRICT), ("only", LOOSE | {"pools": ["b"]})):
        select(pools, notes, questions, tmp_path / name, parse(SelectConfig, settings, name))
    return tmp_path


def test_counts_say_what_became_of_what(sides):
    found = compare(sides / "a", sides / "b")
    assert found.transitions == [("kept", "exact_duplicate", 1), ("kept", "near_duplicate", 1)]
    assert found.counts == {"both": 3, "only_a": 2, "only_b": 0, "neither": 2}
    back = compare(sides / "b", sides / "a")
    assert back.transitions == [("exact_duplicate", "kept", 1), ("near_duplicate", "kept", 1)]
    assert compare(sides / "a", sides / "a").transitions == []


def test_a_pool_that_one_side_lacks_is_said(sides):
    found = compare(sides / "only", sides / "a")
    assert found.transitions == [("not in this pool", "kept", 3)]


def test_the_page_shows_pictures_and_escapes_captions(sides, monkeypatch):
    hostile = "<script>alert(1)</script>"
    found = compare(sides / "a", sides / "b")
    monkeypatch.setattr("vlmpipe.report.compare._looked_up", lambda pools, shown: ({}, {"b1": hostile, "b2": hostile}))
    write_page(found, ("<a>", "b"), sides / "pools", sides / "hostile.html")
    text = (sides / "hostile.html").read_text()
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text and "A &lt;a&gt;" in text
    assert "default-src 'none'" in text and "no picture" in text


def test_the_command_prints_counts_and_writes_the_page(sides, capsys):
    assert main(["compare", str(sides / "a"), str(sides / "b"), "--root", str(sides)]) == 0
    said = capsys.readouterr().out
    assert "only by A 2" in said and "near_duplicate" in said
    text = (sides / "compare" / "index.html").read_text()
    assert text.count("data:image/jpeg;base64,") == 2 and "three red red shapes" in text


def test_neither_a_directory_nor_a_revision_is_refused(sides, monkeypatch):
    monkeypatch.chdir(sides)
    subprocess.run(["git", "init", "-q"], check=True)
    with pytest.raises(UserError, match=r"neither a directory nor a revision .* in 'nowhere'"), \
            selection_at("nowhere", sides):
        pass
