"""A verdict for people: on the terminal and as a page of its own."""

import io
import re

import pytest
from rich.console import Console

from tests.evaluate.scored import asked, check, means, verdict, write_evaluation
from tests.report import evidence
from tests.report.evidence import HOSTILE
from tests.report.test_page import plain
from vlmpipe.data.task import TaskConfig
from vlmpipe.errors import UserError
from vlmpipe.evaluate.store import CHALLENGER, CHAMPION
from vlmpipe.report.gates import read_verdict, seal, tile, truth, write_page
from vlmpipe.report.gates_terminal import draw, show
from vlmpipe.report.pictures import TaskPictures
from vlmpipe.shards import read_json

GATES = ("data", "pretrain", "finetune")


@pytest.fixture
def place(tmp_path):
    evidence.write_scores(tmp_path / "data", tmp_path / "questions")
    evidence.write_gate(tmp_path / "results", "data", True)
    evidence.write_gate(tmp_path / "results", "finetune", False)
    return tmp_path


def found(place, name="finetune"):
    return read_json(place / "results" / "gates" / name / "verdict.json")


def printed(judged, evaluation, samples=5) -> str:
    text = io.StringIO()
    show(judged, evaluation, samples, Console(file=text, width=200))
    return text.getvalue()


def rows(text: str, first: str) -> list[str]:
    return [re.sub(r"\s+", " ", line.strip("│ \n")) for line in text.splitlines() if line.startswith(f"│ {first}")]


# --- on the terminal ---------------------------------------------------------------------------------------

def test_the_terminal_has_rules_intervals_and_what_got_worse(place):
    text = printed(found(place), place / "data" / "evaluation" / "finetune")
    assert text.startswith("finetune gate: FAIL (1 waived), champion v1\n") and "not signed" in text.splitlines()[-1]
    assert rows(text, "accuracy")[0] == "accuracy │ ≥ 0.85 │ 0.4321 │ – │ 80 │ – │ FAIL"
    guard = rows(text, "guard")
    assert guard[0] == "guard │ drop < 0.05 │ 0.75 │ 1 │ 80 │ – │ PASS"
    assert guard[1].startswith("guard │ -0.02 │") and "●" in guard[1]
    assert "INCONCLUSIVE (waived)" in text and "by Ada until 2026-12-01" in text
    assert "vqa.accuracy: 2 of 3 samples got worse, 0 got better" in text
    assert rows(text, "2 ")[0].startswith("2 │ Where? │ left ×7, there ×3 │")
    assert "│ 3.png  │" in text  # a picture of two


def test_markup_in_questions_and_answers_is_text(tmp_path):
    samples = [asked("a", "[red]what[/]?", ["[bold]"])]
    said = {model: {"a": f"[/]{model}[link=http://evil.test]"} for model in (CHALLENGER, CHAMPION)}
    counts = {CHALLENGER: {"accuracy": means({"a": 0})}, CHAMPION: {"accuracy": means({"a": 1})}}
    text = printed(verdict([check("accuracy", "vqa.accuracy", note="[blink]")]),
                   write_evaluation(tmp_path, "vqa", samples, said, counts))
    for told in ("[red]what[/]?", "[bold]", "[/]challenger[link=http://evil.test]", "[blink]"):
        assert told in text


def test_a_gate_without_samples_or_champion_is_shown(place):
    text = printed(found(place, "data") | {"champion": None}, place / "data" / "evaluation" / "data")
    assert "data gate: PASS, champion none yet" in text and "●" not in text


@pytest.mark.parametrize("numbers, expected", [
    ((0.5, 0.0, 1.0, -0.5, -1.0, 1.0), "  ┊ │─●─┤"), ((-1.0, -1.0, -0.5, None, -1.0, 1.0), "●─┤ │    "),
    ((0.0, 0.0, 0.0, None, 0.0, 0.0), "●        "),
])
def test_an_interval_is_drawn_to_scale(numbers, expected):
    assert draw(*numbers, width=9) == expected


# --- as a page ---------------------------------------------------------------------------------------------

def test_the_page_of_one_gate_stands_alone_and_has_the_pictures(place):
    tested = TaskPictures(place / "data" / "packed", TaskConfig(path=str(place / "questions")))
    write_page(found(place), place / "data" / "evaluation" / "finetune", tested, 1, place / "page.html")
    page = (place / "page.html").read_text()
    assert "default-src 'none'" in page and plain(re.search(r"<h1>.*?</h1>", page)[0]) == "finetune gate FAIL, 1 waived"
    assert page.count("<figure") == 2 and page.count("data:image/jpeg") == 2  # one of each finding, of the same sample
    assert "<script" not in page and "&lt;script&gt;" in page and HOSTILE in plain(page)


def test_answers_are_told_by_how_often_they_were_given():
    assert truth(["red"] * 10) == "red" and truth([]) == ""
    assert truth(["a", "b", "b", "c", "d", "e"]) == "b ×2, a, c, d"


def test_the_last_gate_that_was_reached_is_the_one_meant(place):
    directory = place / "results" / "gates"
    assert read_verdict(directory, GATES, None)["gate"] == "finetune"
    assert read_verdict(directory, GATES, "data")["gate"] == "data"
    with pytest.raises(UserError, match=r"no verdict of a gate 'pretrain'.*expected one of: data, finetune; run the"):
        read_verdict(directory, GATES, "pretrain")
    with pytest.raises(UserError, match="found no verdict; expected one of: nothing yet"):
        read_verdict(place, GATES, None)


def test_a_seal_that_does_not_fit_is_bad():
    judged = verdict([check("a", "vqa.accuracy", "PASS")], "PASS")
    assert seal(judged)[0] == "good" and seal(judged | {"champion": "v2"})[0] == "bad"
    assert tile("finetune", judged) == {"name": "finetune gate", "value": "PASS", "note": "", "state": "good"}
