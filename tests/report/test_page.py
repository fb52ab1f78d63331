"""The page: what it says, what it escapes, what it leaves out, and that a browser shows it."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.report import evidence
from tests.report.evidence import HOSTILE
from vlmpipe.data.task import TaskConfig
from vlmpipe.report.page import SECTIONS, ReportConfig, report
from vlmpipe.shards import write_table

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("report")
    evidence.write_all(place / "data", place / "results")
    return place


@pytest.fixture(scope="module")
def page(place) -> str:
    return built(place)


def built(place: Path, **config) -> str:
    task = TaskConfig(path=str(place / "questions"))
    report(place / "data", place / "results", place / "data" / "report", ReportConfig(**config), task=task)
    return (place / "data" / "report" / "index.html").read_text(encoding="utf-8")


def section(page: str, name: str) -> str:
    return re.search(rf'<section id="{name}">(.*?)</section>', page, re.S)[1]


def cells(text: str) -> list[list[str]]:
    """The rows of its tables as plain text."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", text, re.S)
    return [[plain(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S)] for row in rows]


def plain(text: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def absent(page: str) -> set[str]:
    return {part.id for part in SECTIONS if "Not reached" in section(page, part.id)}


# --- what it says ------------------------------------------------------------------------------------------

def test_the_tiles_say_how_it_went(page):
    tiles = [plain(tile) for tile in re.findall(r'<div class="tile.*?</div>', page, re.S)]
    assert tiles == ["2 pairs kept of 6", "87.5% questions answered held out", "37.5% with the wrong image held out",
                     "PASS data gate", "PASS pretrain gate", "FAIL finetune gate 1 waived"]


def test_a_gate_shows_every_rule_with_its_numbers(page):
    found = section(page, "gates")
    assert [plain(title) for title in re.findall(r"<h3>.*?</h3>", found, re.S)] == [
        "data PASS", "pretrain PASS", "finetune FAIL 1 waived"]
    assert cells(found)[1] == ["accuracy vqa.accuracy", "PASS", "≥ 0.85", "0.4321", "80 40 pictures", HOSTILE]
    assert cells(found)[-3:] == [
        ["accuracy vqa.accuracy", "FAIL", "≥ 0.85", "0.4321", "–", "–", "–", "80 40 pictures", HOSTILE],
        [f"kinds · kind = {HOSTILE} vqa.accuracy", "INCONCLUSIVE (waived)", "drop < 0.05", "0.75", "1",
         "-0.25 -0.5 to +0", "0.9 power 0.25", "80 40 pictures 1,234 needed", "too few"],
        ["guard vqa.accuracy", "PASS", "drop < 0.05", "0.75", "1", "-0.02 -0.04 to +0", "0.9 power 0.25",
         "80 40 pictures", ""],
    ]


def test_a_waiver_stands_above_the_rules_and_intervals_are_drawn(page):
    found = section(page, "gates")
    waiver = f"kinds · kind = {HOSTILE}: INCONCLUSIVE, waived by Ada until 2026-12-01: {HOSTILE}"
    assert [plain(item) for item in re.findall(r"<li.*?</li>", found, re.S)] == [waiver]
    (chart,) = re.findall(r"<svg.*?</svg>", found, re.S)
    assert chart.count("whisker") == 2 and chart.count("threshold") == 2 and "-0.25 [-0.5, +0]" in chart


def test_a_rule_that_did_not_pass_shows_what_got_worse_with_pictures_and_both_answers(page):
    parts = re.findall(r"<details.*?</details>", section(page, "gates"), re.S)
    titles = [plain(re.search(r"<summary>.*?</summary>", part)[0]) for part in parts]
    assert titles == [
        "vqa.accuracy: 2 of 3 samples got worse, 0 got better",
        f"vqa.accuracy, kind = {HOSTILE}: 1 of 1 samples got worse, 0 got better",
    ]
    first, second = re.findall(r"<figure.*?</figure>", parts[0], re.S)
    assert plain(first) == (f"question Where? truth left ×7, there ×3 champion {HOSTILE} accuracy 1 "
                            f"challenger {HOSTILE} accuracy 0")
    assert first.count("data:image/jpeg") == 1
    assert second.count("data:image/jpeg") == 1 and "no picture" in second  # of two pictures one is gone
    assert "accuracy asks for ≥ 0.85: FAIL" in plain(parts[0])


def test_a_verdict_that_was_altered_is_called_so(page, tmp_path):
    assert plain(section(page, "gates")).count("not signed") == 3
    evidence.write_gate(tmp_path / "results", "data", False)
    path = tmp_path / "results" / "gates" / "data" / "verdict.json"
    path.write_text(path.read_text().replace("FAIL", "PASS"))
    assert "it was altered" in plain(section(built(tmp_path), "gates"))


def test_planted_faults_are_counted_by_kind(page):
    assert cells(section(page, "planted"))[1:] == [
        ["busy", "1", "1", "100.0%", "recovered 1"], ["dead_404", "1", "1", "100.0%", "download:http_404 1"],
        ["near_duplicate", "1", "1", "100.0%", "near_duplicate 1"], ["swapped", "1", "1", "100.0%", "clip 1"],
    ]
    assert "precision 50.0%, recall 100.0%" in plain(section(page, "planted"))


def test_every_reason_has_a_wall_with_the_number_behind_it_and_the_twin(page):
    walls = re.findall(r"<details.*?</details>", section(page, "walls"), re.S)
    titles = [plain(re.search(r"<summary>.*?</summary>", wall)[0]) for wall in walls]
    assert titles == ["kept (2)", "clip (2)", "download:http_404 (1)", "near_duplicate (1)"]
    kept, clip, gone, twins = (wall.count("<img ") for wall in walls)
    assert (kept, clip, gone, twins) == (2, 2, 0, 2)
    assert walls[1].count("0.125 against 0.25") == 2 and "no picture" in walls[2]


def test_the_score_histogram_has_the_threshold_that_was_used(page):
    assert section(page, "scores").count("<svg") == 3 and "threshold 0.25" in section(page, "scores")


def test_groups_stand_with_their_rates_and_the_rule_that_did_it(page):
    found = section(page, "bias")
    rows = [row[:7] + row[8:] for row in cells(found)]  # without the drawn interval
    assert rows[1] == ["woman", "40", "10", "40.0%", "25.0%", "0.625", "25.0%", "clip (+20.0%)"]
    assert "impact ratio 0.500 breach" in plain(found)
    assert f"gender = {evidence.GROUP}: clip -0.200 (q 0.001)" in plain(found)
    told = f"clip drops 50.0% of gender = {evidence.GROUP} (30 of 60), 25.0% of woman"
    assert told in plain(found) and f"{evidence.uid(1)} {HOSTILE}" in plain(found)


def test_failed_expectations_come_first_and_data_docs_are_a_link(page, place):
    found = section(page, "expectations")
    assert "3 expectations, 1 failed" in plain(found) and f"clip_score of {HOSTILE} is 0.1" in plain(found)
    pages = [(place / "data" / "report" / link).read_text() for link in re.findall(r'href="(.*?)"', found)]
    assert pages == ["<p>Data Docs</p>", "<p>Docs of packed data</p>"]


def test_evaluations_stand_side_by_side(page):
    assert cells(section(page, "evaluation")) == [
        ["metric", "pretrain", "samples", "finetune", "samples", ""],
        ["vqa.accuracy", "0.25", "80", "0.875", "80", ""], ["vqa.accuracy_wrong_image", "–", "–", "0.375", "80", ""],
    ]


def test_curves_and_predictions(page):
    titles = [plain(title) for title in re.findall(r"<h3>.*?</h3>", section(page, "training"))]
    assert titles == [f"{name}: 30 steps, loss {loss:.3f} at the end" for name, loss in
                      (("scorer", 3), ("pretrain", 2), ("finetune", 1))]
    assert section(page, "training").count("gradient norm by step") == 3
    assert section(page, "training").count("left out after a loss spike: batches 9, 10") == 1
    cards = re.findall(r"<figure>.*?</figure>", section(page, "predictions"), re.S)
    assert plain(cards[0]) == f"{HOSTILE} red expected red wrong picture: (nothing)" and len(cards) == 2
    assert 'class="good"' in cards[0] and 'class="bad"' in cards[1] and cards[0].count("data:image/jpeg") == 2


def test_predictions_of_every_task_have_their_pictures_and_scores(tmp_path):
    place = tmp_path / "data" / "evaluation" / "finetune"
    evidence.write_scores(tmp_path / "data", tmp_path / "questions")
    rows = pq.read_table(place / "samples.parquet").to_pylist()
    regions = [row | {"task": "segmentation", "prediction": None, "score": 0.25 + i / 4, "wrong_score": 0.125}
               for i, row in enumerate(rows)]
    captions = [row | {"task": "captioning", "question": "", "score": 12.5, "wrong_prediction": None} for row in rows]
    for row in captions + regions:
        row["wrong_prediction"] = None
    schema = pq.read_schema(place / "samples.parquet")
    write_table(place / "samples.parquet", pa.Table.from_pylist(rows + regions + captions, schema=schema))
    found = section(built(tmp_path), "predictions")
    assert [plain(title) for title in re.findall(r"<h3>.*?</h3>", found)] == ["vqa", "segmentation", "captioning"]
    cards = re.findall(r"<figure>.*?</figure>", found, re.S)
    assert len(cards) == 9 and cards[2].count("<img") == 1 and "no picture" in cards[2]
    assert plain(cards[2]) == "no picture How many? six expected two wrong picture: six"
    assert plain(cards[3]) == f"{HOSTILE} score 0.25 expected red wrong picture: score 0.125"
    assert 'class="bad"' in cards[3] and 'class="good"' in cards[4]
    assert plain(cards[6]) == "caption red score 12.5 expected red" and 'class="good"' not in cards[6]


def test_the_same_evidence_gives_the_same_bytes(page, place):
    assert built(place) == page


def test_walls_are_as_large_as_configured_and_drawn_by_the_seed(place):
    walls = section(built(place, wall=1), "walls")
    assert walls.count("<figure") == 4  # one for each of kept and the three reasons


# --- hostile text ------------------------------------------------------------------------------------------

def test_hostile_text_is_text_everywhere(page):
    assert not re.search(r"<script|onerror=[^&]*>", page.replace(html.escape(HOSTILE), ""))
    for name in ("gates", "walls", "bias", "expectations", "predictions"):
        assert "&lt;script&gt;" in section(page, name), name


def test_the_page_needs_nothing_from_outside_and_allows_no_script(page):
    policy = html.unescape(re.search(r'Content-Security-Policy" content="(.*?)"', page)[1])
    assert "default-src 'none'" in policy and "script-src" not in policy
    loaded = re.findall(r"""<(?:img|link|script|iframe|source)[^>]*?(?:src|href)=["']([^"']*)""", page)
    assert loaded and all(address.startswith("data:image/") for address in loaded)


# --- a run that stopped ------------------------------------------------------------------------------------

def test_nothing_at_all_is_a_page_that_says_so(tmp_path):
    assert absent(built(tmp_path)) == {part.id for part in SECTIONS}


def test_after_a_failed_gate_what_was_not_reached_is_said(tmp_path):
    evidence.write_curation(tmp_path / "data")
    evidence.write_selection(tmp_path / "data")
    evidence.write_audit(tmp_path / "data")
    evidence.write_gate(tmp_path / "results", "data", False)
    page = built(tmp_path)
    assert absent(page) == {"training", "evaluation", "predictions"}
    assert plain(section(page, "gates")).startswith("Gates data FAIL") and "pretrain not reached" in plain(page)


def test_a_pool_that_was_never_selected_from_is_no_obstacle(tmp_path):
    evidence.write_curation(tmp_path / "data")
    assert absent(built(tmp_path)) == {part.id for part in SECTIONS}


# --- in a browser ------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Shown:
    """What a browser made of a page."""

    text: str
    console: list[str]
    requests: list[str]


def show(path: Path, *options: str) -> Shown:
    """Open a page; note its console and every request that it makes over a network (none leaves this machine)."""
    net, home = path.with_suffix(".net.json"), path.with_suffix(".chromium")
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={home}",
         "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
         f"--log-net-log={net}", *options, path.as_uri()],
        capture_output=True, text=True, timeout=240, check=True,
    )
    events = [event.get("params", {}) for event in json.loads(net.read_text())["events"]]
    # The browser asks for things of its own (updates, the time); those have no page behind them.
    asked = {event["url"] for event in events if event.get("initiator", "not an origin") != "not an origin"}
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Shown(done.stdout, console, sorted(url for url in asked if not url.startswith(("file:", "data:"))))


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no chromium on PATH: install it to have the page opened in a browser")


def test_the_check_sees_what_it_is_for(browser, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<script>console.error('wrong')</script><img src='http://127.0.0.1:9/outside.png'><p>shown")
    shown = show(bad, "--dump-dom")
    assert any("wrong" in line for line in shown.console)
    assert shown.requests == ["http://127.0.0.1:9/outside.png"]
    assert "<p>shown" in shown.text


def test_a_browser_shows_it_without_an_error_or_a_request(browser, page, tmp_path):
    path = tmp_path / "index.html"
    path.write_text(page, encoding="utf-8")
    shown = show(path, "--dump-dom")
    assert shown.console == [] and shown.requests == []
    assert all(f'<section id="{part.id}">' in shown.text for part in SECTIONS)
    assert plain(section(shown.text, "gates")) == plain(section(page, "gates"))


@pytest.mark.parametrize("width, dark", [(1200, False), (500, True)])
def test_what_is_shown_is_not_blank(browser, page, tmp_path, width, dark):
    path, picture = tmp_path / "index.html", tmp_path / "page.png"
    path.write_text(page, encoding="utf-8")
    theme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    show(path, f"--window-size={width},1600", "--hide-scrollbars", f"--screenshot={picture}", *theme)
    pixels = np.asarray(Image.open(picture).convert("L"), float)
    assert pixels.shape == (1600, width)
    assert (np.median(pixels) < 60) == dark  # paper and not ink is most of it
    for part in np.array_split(pixels, 4):
        assert part.std() > 5 and len(np.unique(part)) > 20  # text and charts from the top to the bottom
