"""The page: what it says, what it escapes, what it leaves out, and that a browser shows it."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.report import evidence
from tests.report.evidence import HOSTILE
from vlmpipe.report.page import SECTIONS, ReportConfig, report

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
    report(place / "data", place / "results", place / "data" / "report", ReportConfig(**config))
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
                     "PASS data gate", "PASS pretrain gate", "FAIL finetune gate"]


def test_a_gate_shows_every_rule_with_its_numbers(page):
    found = section(page, "gates")
    assert [plain(title) for title in re.findall(r"<h3>.*?</h3>", found, re.S)] == [
        "data PASS", "pretrain PASS", "finetune FAIL"]
    assert cells(found)[-1] == ["accuracy", "vqa.accuracy", "0.4321", "≥", "0.85", "–", "80", "FAIL", HOSTILE]


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
    assert plain(cards[0]) == f"{HOSTILE} red expected red wrong picture: (nothing)"
    assert 'class="good"' in cards[0] and 'class="bad"' in cards[1] and cards[0].count("data:image/jpeg") == 2


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
