"""Why one sample went: all its numbers, every rule in order, and its neighbours on both sides."""

import json

import pytest
from rich.console import Console

from tests.curate.made_pools import write_world
from vlmpipe.__main__ import main
from vlmpipe.config import parse
from vlmpipe.curate.explain import explain, show
from vlmpipe.curate.filters import SelectConfig, select
from vlmpipe.errors import UserError
from vlmpipe.shards import read_rows

SETTINGS = {"small": {"min_side": 32}, "language": {"believed_from": 1.0}}


@pytest.fixture
def root(tmp_path, monkeypatch):
    pools, notes, questions, _ = write_world(tmp_path, monkeypatch)
    select(pools, notes, questions, tmp_path / "selection", parse(SelectConfig, SETTINGS, "select"))
    return tmp_path


def test_a_dropped_twin_names_who_stayed_and_the_other_way_round(root):
    twins = {"a4", "b2"}
    lost = next(row for row in read_rows(root / "selection").to_pylist() if row["uid"] in twins and not row["kept"])
    (stayed,) = twins - {lost["uid"]}
    found = explain(lost["uid"], root)
    assert found["decision"] == lost and found["kept_instead"]["uid"] == stayed and found["kept_instead"]["kept"]
    assert found["kept_instead"]["numbers"]["phash"] is not None and found["stands_for"] == []
    outcomes = {rule["rule"]: rule["outcome"] for rule in found["rules"]}
    assert outcomes.pop("near_duplicate") == "dropped" and set(outcomes.values()) == {"passed"}
    kept = explain(stayed, root)
    assert [row["uid"] for row in kept["stands_for"]] == [lost["uid"]] and kept["kept_instead"] is None
    assert {rule["outcome"] for rule in kept["rules"]} == {"passed"}
    sizes = next(rule for rule in kept["rules"] if rule["rule"] == "small")
    assert sizes["settings"]["min_side"] == 32 and sizes["values"] == {"original_width": 64, "original_height": 64}


def test_what_was_not_asked_is_said_and_an_evaluation_picture_is_named(root):
    found = explain("a3", root)
    assert found["kept_instead"] == {"uid": "77", "note": "a picture of an evaluation set"}
    outcomes = [rule["outcome"] for rule in found["rules"]]
    assert outcomes == ["passed"] * 7 + ["dropped"] + ["not asked"] * 3
    assert explain("a2", root)["rules"][0]["values"] == {"status": "refused", "reason": "http_404"}


def test_a_beginning_is_enough_if_it_is_one_samples(root):
    with pytest.raises(UserError, match=r"found 4 samples whose uid begins with 'a' a1, a2, a3, a4; expected one"):
        explain("a", root)
    with pytest.raises(UserError, match="found 0 samples"):
        explain("zz", root)


def test_on_the_terminal_and_as_json(root, capsys):
    assert main(["explain", "b3", "--root", str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["decision"]["reason"] == "decode:broken_image" and found["numbers"]["clip_score"] is None
    assert main(["explain", "b3", "--root", str(root)]) == 0
    assert "dropped by decode:broken_image" in capsys.readouterr().out


def test_markup_in_a_caption_is_text(root):
    found = explain("a4", root)
    found["sample"]["caption"] = "[bold]x[/bold] [/nothing]"
    console = Console(record=True, width=200)
    show(found, console)
    assert "[bold]x[/bold] [/nothing]" in console.export_text()
