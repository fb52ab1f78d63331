"""The explorer: what it draws, what it packs, and what a browser makes of it, hostile captions and all."""

import base64
import gzip
import hashlib
import html
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.curate.made_pools import jpeg, picture, row, write_pool
from tests.report.evidence import HOSTILE
from vlmpipe.curate.bias import BiasConfig
from vlmpipe.errors import UserError
from vlmpipe.report.explorer import ExplorerConfig, explorer
from vlmpipe.report.explorer_columns import MAP_STEPS, describe, flatten
from vlmpipe.report.explorer_sample import draw, quotas
from vlmpipe.report.explorer_tiles import Sheets
from vlmpipe.report.page import ReportConfig, report
from vlmpipe.shards import read_json, write_json, write_manifest, write_shard, write_table

HOSTILE_NAME = "<img src=x onerror=alert(2)>"
LIMIT = 0.3
# reason -> rows; rows stand in this order, a third to a shard.
REASONS = {"kept": 18, "clip": 5, "near_duplicate": 3, "download:http_404": 2, "pii": 2}
PLANNED = [reason for reason, count in REASONS.items() for _ in range(count)]
SCHEMA = pa.schema([("uid", pa.string()), ("pool", pa.string()), ("kept", pa.bool_()), ("reason", pa.string()),
                    ("value", pa.float64()), ("threshold", pa.float64()), ("other_uid", pa.string())])
WORDS = {"gender": {"woman": ("woman",), "man": ("man",)}}


def uid(place: int) -> str:
    return hashlib.sha256(str(place).encode()).hexdigest()[:32]


def score(place: int) -> float:
    return round((0.02 if PLANNED[place] == "clip" else LIMIT) + place / 100, 3)


def caption(place: int) -> str:
    told = {0: "a woman by a red car", 1: "A Man and a woman", 2: "twin one", 18: HOSTILE}
    return told.get(place, f"caption {place}")


def write_workspace(root: Path) -> Path:
    """One pool of 30 rows in three shards, as the stages leave it, with columns that nobody foresaw."""
    here = [place for place, reason in enumerate(PLANNED) if not reason.startswith("download")]
    pictures = {place: jpeg(picture(2 if reason == "near_duplicate" else place)) if place in here else None
                for place, reason in enumerate(PLANNED)}
    rows = [row(uid(place), pictures[place], caption=caption(place), view=HOSTILE_NAME if place % 2 else "plain",
                **{HOSTILE_NAME: HOSTILE}) for place in range(len(PLANNED))]
    shards = [rows[:10], rows[10:20], rows[20:]]
    write_pool(root / "pools" / "p", *shards, extra={"view": pa.string(), HOSTILE_NAME: pa.string()})
    entries = []
    for number in range(3):
        places = [place for place in here if place // 10 == number]
        angle = np.array(places) / 5
        plane = np.stack([np.cos(angle) * 2, np.sin(angle), 0 * angle, 0 * angle + 1], 1).astype(np.float16)
        notes = pa.table({
            "uid": [uid(place) for place in places], "clip_score": pa.array(map(score, places), pa.float32()),
            "phash": pa.array([2**63 + place for place in places], pa.uint64()),
            "blank": [place == 4 for place in places], "error": pa.nulls(len(places), pa.string()),
            "image_embedding": pa.FixedSizeListArray.from_arrays(pa.array(plane.ravel()), 4),
        })
        entries.append(write_shard(root / "annotations" / "p", f"{number:05d}", notes, []))
    write_manifest(root / "annotations" / "p", "annotations", entries)
    write_selection(root)
    return root


def write_selection(root: Path) -> None:
    facts = {"clip": lambda place: {"value": float(np.float32(score(place))), "threshold": LIMIT},
             "near_duplicate": lambda place: {"value": 3.0, "threshold": 8.0, "other_uid": uid(2)}}
    dropped = {name: {"reason": name} for name in REASONS if name != "kept"}
    decided = [{"uid": uid(place), "pool": "p", "kept": reason == "kept"} | dropped.get(reason, {})
               | facts.get(reason, lambda place: {})(place) for place, reason in enumerate(PLANNED)]
    write_table(root / "selection" / "decisions.parquet", pa.Table.from_pylist(decided, schema=SCHEMA))
    names = ("downloaded", "clip", "near_duplicate", "pii")
    dropped = [2, 5, 3, 2]
    steps = [{"reason": name, "dropped": count, "rows_out": 30 - sum(dropped[: k + 1]), "config": {"min": LIMIT} if
              name == "clip" else {}} for k, (name, count) in enumerate(zip(names, dropped))]
    write_json(root / "selection" / "funnel.json", {"rows": 30, "kept": 18, "steps": steps, "reasons": {}})
    write_manifest(root / "selection", "selection", [], pools={"p": "sha256 of its manifest"})


def build(root: Path, **config) -> Path:
    assert explorer(root, [root / "pools" / "p"], root / "report", ExplorerConfig(**config), "made", WORDS)
    return root / "report" / "explorer.html"


def unpack(page: Path) -> dict:
    """The header, with each array where its place was."""
    packed = re.search(r'id="data">([^<]*)<', page.read_text())[1]
    data = gzip.decompress(base64.b64decode(packed))
    size = int.from_bytes(data[:4], "little")
    header = json.loads(data[4 : 4 + size])
    header["arrays"] = {name: np.frombuffer(data, facts["type"], facts["length"], 4 + size + facts["at"])
                        for name, facts in header["arrays"].items()}
    return header


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return build(write_workspace(tmp_path_factory.mktemp("explorer") / "made"))


@pytest.fixture(scope="module")
def data(page) -> dict:
    return unpack(page)


def column(data: dict, name: str) -> dict:
    return next(found for found in data["columns"] if found["name"] == name)


def shown(data: dict, name: str) -> list:
    """A facet's values row by row."""
    found = column(data, name)
    return [[*found["values"], None][code] for code in data["arrays"][name]]


# --- which rows --------------------------------------------------------------------------------------------

def test_half_of_the_room_is_dealt_equally_and_the_rest_in_proportion():
    assert quotas({"kept": 800, "clip": 190, "rare": 10}, 100) == {"kept": 16 + 47, "clip": 16 + 10, "rare": 10}
    assert quotas({"kept": 5, "clip": 2}, 7) == {"kept": 5, "clip": 2}
    assert quotas({"kept": 900, "a": 50, "b": 50}, 2) == {"kept": 1, "a": 1, "b": 1}


def test_all_rows_are_shown_where_there_is_room_kept_ones_first_in_their_order(data):
    assert (data["shown"], data["rows"]) == (30, 30)
    assert column(data, "uid")["texts"][:18] == [uid(place) for place in range(18)]
    assert shown(data, "reason") == sorted(PLANNED, key=lambda name: (name != "kept", -REASONS[name], name))
    assert (data["arrays"]["#weight"] == 1).all()


def test_a_sample_has_every_reason_and_the_twin_and_says_what_each_row_stands_for(tmp_path):
    root = write_workspace(tmp_path)
    arguments = (root / "selection" / "decisions.parquet", [root / "pools" / "p"])
    sample = draw(*arguments, samples=10, shards=1, seed=3)
    reasons = np.array(sample.rows["reason"].to_pylist())
    weights = {name: sample.weight[reasons == name].sum() for name in REASONS}
    assert weights == pytest.approx(REASONS)
    assert len(reasons) <= 11 and uid(2) in sample.rows["uid"].to_pylist()  # the copies' twin may come on top
    assert (np.array([PLANNED[place] for place in sample.position]) == reasons).all()
    again = draw(*arguments, samples=10, shards=1, seed=3)
    other = draw(*arguments, samples=10, shards=1, seed=4)
    assert again.rows.equals(sample.rows) and not other.rows.equals(sample.rows)


def test_decisions_of_another_pool_are_refused(tmp_path):
    root = write_workspace(tmp_path)
    write_pool(root / "pools" / "p", [row(uid(0), jpeg(picture(0)))])
    with pytest.raises(UserError, match="found 30 rows of pool p; expected its 1; rerun `select`"):
        build(root)


# --- what is packed ----------------------------------------------------------------------------------------

def test_columns_are_told_by_their_types(data):
    kinds = {found["name"]: found["kind"] for found in data["columns"]}
    numbers = ("clip_score", "bytes", "value", "original_shorter_side")
    facets = ("reason", "status", "blank", "view", "http_status", "gender")
    assert [kinds[name] for name in (*numbers, *facets)] == ["number"] * len(numbers) + ["facet"] * len(facets)
    assert kinds["caption"] == kinds["phash"] == "text" and "error" not in kinds  # all null: nothing to show
    assert column(data, "phash")["texts"][1] == f"{2**63 + 1:016x}"
    assert "download_reason" in kinds and shown(data, "download_reason")[-4:].count("http_404") == 2


def test_rows_without_annotation_have_none(data):
    gone = [name == "download:http_404" for name in shown(data, "reason")]
    assert np.isnan(data["arrays"]["clip_score"]).tolist() == gone == [tile == -1 for tile in data["arrays"]["#tile"]]
    places = column(data, "uid")["texts"]
    assert data["arrays"]["clip_score"][places.index(uid(20))] == np.float32(score(20))


def test_groups_are_those_that_captions_mention(data):
    assert shown(data, "gender")[:3] == ["woman", "woman + man", None]


def test_a_threshold_stands_on_the_column_that_the_rule_judged(data):
    assert data["thresholds"] == {"clip_score": [{"rule": "clip", "at": LIMIT}]}
    own = {name: name for name in ("clip", "near_duplicate", "pii")}
    steps = {name: facts["step"] for name, facts in data["reasons"].items()}
    assert steps == own | {"kept": None, "download:http_404": "downloaded"}


def test_copies_point_at_the_row_that_stayed(data):
    twins = data["arrays"]["#twin"]
    assert twins[twins >= 0].tolist() == [2, 2, 2] and shown(data, "reason")[2] == "kept"


@pytest.mark.parametrize("values, kind", [
    (pa.array([1, 2**60, 3, 4]), "text"), (pa.array([{"a": 1}, None, {"a": 2}, {"a": 3}]), "text"),
    (pa.array([True, False, None, True]), "facet"), (pa.array([1.5, float("inf"), None, 2.0]), "number"),
    (pa.array([b"ab", b"cd", b"ef", None], pa.binary(2)), "text"),
    (pa.array([[[1.0, 2.0]], [], None, [[3.0, 4.0]]], pa.list_(pa.list_(pa.float32(), 2))), "text"),
    (pa.array(["a", "b", "c", "d"]), "text"), (pa.array(["a", "b", "b", "a"]), "facet"),
])
def test_any_type_is_shown_somehow(values, kind):
    facts, array = describe("x", "annotate", values)
    assert facts["kind"] == kind and (array is None) == (kind == "text")
    assert json.dumps(facts, allow_nan=False)


def test_numbers_that_float32_cannot_hold_are_kept_whole():
    _, exact = describe("bytes", "download", pa.array([2**24 + 1, None]))
    assert exact.dtype == np.float64 and exact[0] == 2**24 + 1 and np.isnan(exact[1])


def test_a_map_keeps_distances_of_what_is_flat_already():
    points = np.random.default_rng(0).normal(size=(40, 2)) * [3, 1]
    turned = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0][:2]
    embedding = np.concatenate([points @ turned + 5, [[np.nan] * 6]]).astype(np.float32)
    placed, shares = flatten(embedding)
    assert (placed[-1] == MAP_STEPS).all() and sum(shares) == pytest.approx(1)
    far = np.linalg.norm(points[:, None] - points, axis=2)
    drawn = np.linalg.norm(placed[:-1, None].astype(float) - placed[:-1], axis=2)
    assert drawn / drawn.max() == pytest.approx(far / far.max(), abs=1e-3)


@pytest.mark.parametrize("embedding", [np.ones((9, 4)), np.full((9, 4), np.nan), np.ones((2, 4))])
def test_no_map_of_what_has_no_extent(embedding):
    assert flatten(embedding.astype(np.float32)) is None


def test_pictures_stand_where_their_number_says(tmp_path):
    sheets = Sheets(tmp_path, 260, tile=32, quality=95)
    for k in range(260):
        sheets.put(k, jpeg(Image.new("RGB", (64, 32), (k % 256, 255 - k % 256, 0))) if k not in (3, 4) else
                   b"no picture" if k == 3 else None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000.jpg", "0001.jpg"]
    assert sheets.sizes[3:6].tolist() == [[0, 0], [0, 0], [32, 16]]
    for k in (17, 255, 259):
        with Image.open(tmp_path / f"000{k // 256}.jpg") as sheet:
            x, y = k % 256 % 16 * 32, k % 256 // 16 * 32
            assert np.asarray(sheet)[y + 8, x + 16].tolist() == pytest.approx([k % 256, 255 - k % 256, 0], abs=6)


# --- the files ---------------------------------------------------------------------------------------------

def test_the_same_workspace_gives_the_same_bytes_and_no_old_picture_stays(page):
    before = {path.name: path.read_bytes() for path in page.parent.rglob("*") if path.is_file()}
    (page.parent / "explorer" / "0099.jpg").write_bytes(b"old")
    build(page.parents[1])
    assert {path.name: path.read_bytes() for path in page.parent.rglob("*") if path.is_file()} == before
    assert sorted(before) == ["0000.jpg", "explorer.html"]


def test_no_explorer_without_a_selection_or_where_it_is_switched_off(tmp_path):
    root = write_workspace(tmp_path)
    pools = [root / "pools" / "p"]
    assert not explorer(root, pools, root / "report", ExplorerConfig(samples=0), "made", {})
    (root / "selection" / "decisions.parquet").unlink()
    assert not explorer(root, pools, root / "report", ExplorerConfig(), "made", {})
    assert not (root / "report" / "explorer.html").exists()


def test_a_pool_of_metadata_alone_is_explored_without_pictures(tmp_path):
    root = write_workspace(tmp_path)
    manifest = read_json(root / "pools" / "p" / "manifest.json")
    for entry in manifest["shards"]:
        (root / "pools" / "p" / f"{entry['name']}.tar").unlink()
        del entry["files"][f"{entry['name']}.tar"]
    write_json(root / "pools" / "p" / "manifest.json", manifest)
    data = unpack(build(root))
    assert data["shown"] == 30 and (data["arrays"]["#tile"] == -1).all()


@pytest.mark.parametrize("samples", [20, 0])
def test_the_report_links_the_explorer_that_stands_beside_it(tmp_path, samples):
    root = write_workspace(tmp_path)
    bias = BiasConfig(lexicons=WORDS)
    report(root, tmp_path / "results", root / "report", ReportConfig(explorer=ExplorerConfig(samples=samples)), bias)
    links = re.findall(r'href="([^"#]+)"', (root / "report" / "index.html").read_text())
    assert ("explorer.html" in links) == (root / "report" / "explorer.html").exists() == bool(samples)
    assert not samples or "woman + man" in shown(unpack(root / "report" / "explorer.html"), "gender")


@pytest.mark.parametrize("config, said", [
    ({"samples": -1}, "samples -1"), ({"tile": 90}, "multiple of 16"), ({"quality": 0}, "quality 0"),
    ({"shards": 0}, "shards 0"),
])
def test_settings_that_mean_nothing_are_refused(config, said):
    with pytest.raises(UserError, match=said):
        ExplorerConfig(**config)


def test_the_policy_allows_the_one_script_and_nothing_from_outside(page):
    text = page.read_text()
    policy = html.unescape(re.search(r'Content-Security-Policy" content="(.*?)"', text)[1])
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    hashed = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 1 and f"script-src 'sha256-{hashed}';" in policy
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    assert not re.search(r"\son\w+=", re.sub(r"<script.*?</script>", "", text, flags=re.S))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function", scripts[0])


# --- in a browser ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def browser():
    from tests.report.browser import CHROMIUM, Browser

    if not CHROMIUM:
        pytest.skip("no chromium on PATH: install it to have the page opened in a browser")
    with Browser() as opened:
        yield opened


@pytest.fixture
def tab(browser, page):
    """The page, opened afresh at a place; afterwards nothing was wrong and nothing was asked from outside."""
    browser.forget()

    def opened(place: str = ""):
        browser.open(page.as_uri() + place)
        return browser

    yield opened
    assert browser.problems() == []
    assert {address.partition("#")[0] for address in browser.requests()} <= {
        page.as_uri(), (page.parent / "explorer" / "0000.jpg").as_uri()}


STATUS = "document.getElementById('status').textContent"
UID = "new URLSearchParams(location.hash.slice(1)).get('uid')"
CANVAS = "document.querySelector('canvas')"
INKED = f"""(() => {{
    const canvas = {CANVAS}, copy = document.createElement("canvas"), found = [];
    [copy.width, copy.height] = [canvas.width, canvas.height];
    const context = copy.getContext("2d", {{ willReadFrequently: true }});
    context.drawImage(canvas, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    for (let i = 3; i < pixels.length; i += 4) if (pixels[i] > 200) found.push((i - 3) / 4);
    const first = found[Math.floor(found.length / 2)], box = canvas.getBoundingClientRect();
    return [found.length, box.left + first % canvas.width, box.top + Math.floor(first / canvas.width)];
}})()"""


def texts(selector: str) -> str:
    return f"[...document.querySelectorAll('{selector}')].map((node) => node.textContent)"


CARDS = texts("main .card .caption")


def test_the_overview_draws_the_funnel_and_the_thresholds(tab):
    shown = tab()
    assert "18 of 30 rows kept, 60.0%" in shown.js("document.querySelector('main h2').textContent")
    labels = shown.js(texts(".funnel text"))
    assert [part for part in labels if part.startswith("−")] == ["−2", "−5", "−3", "−2"]
    assert shown.js("document.querySelector('main svg text.threshold').textContent") == "clip 0.3"
    shown.click(".funnel a")
    assert shown.js(STATUS) == "2 of 30" and "reason=download%3Ahttp_404" in shown.js("location.hash")


def test_hostile_captions_are_text_wherever_they_stand(tab):
    shown = tab(f"#uid={uid(18)}&q=evil.test")
    assert HOSTILE in shown.js(CARDS)
    assert shown.js("document.querySelector('#record .said').textContent") == HOSTILE
    assert {HOSTILE_NAME, HOSTILE} <= set(shown.js(texts("#record dt, #record dd")))
    for view in ("overview", "wall", "duplicates", "map"):
        shown.click(f"[data-view={view}]")
        assert shown.js("document.querySelectorAll('img, iframe, script[src], [onerror], [onload]').length") == 0


def test_typing_searches_captions_and_every_other_text(tab):
    shown = tab("#view=wall")
    shown.press("/")
    shown.type("<SCRIPT>alert(\"caption\")</script> 18")
    assert shown.js(STATUS) == "0 of 30" and "No sample matches" in shown.js(texts("main"))[0]
    empty = "document.querySelectorAll('main .empty').length"
    assert shown.js(empty) == 1
    shown.js("document.getElementById('search').select()")
    shown.type("Red CAR")
    assert shown.js(empty) == 0
    assert shown.js(CARDS) == ["a woman by a red car"] and "q=Red+CAR" in shown.js("location.hash")


def test_a_place_in_the_address_is_a_view_with_its_filters_and_sample(tab):
    shown = tab(f"#reason=clip&clip_score=0.2..0.21&uid={uid(19)}&.view={HOSTILE_NAME.replace(' ', '%20')}")
    assert shown.js(STATUS) == "1 of 30" and shown.js(CARDS) == ["caption 19"]
    said = shown.js("document.querySelector('#record .verdict').textContent")
    assert said == "Dropped by clip: 0.21, against 0.3"
    assert "min 0.3" in shown.js("document.querySelector('#record .note').textContent")


def test_a_click_shows_a_sample_and_escape_leaves_it(tab):
    shown = tab("#view=wall&sort=-clip_score")
    best = max((place for place, name in enumerate(PLANNED) if not name.startswith("download")), key=score)
    shown.click("main .card")
    assert shown.js(UID) == uid(best)
    shown.press("ArrowRight")
    assert shown.js(UID) == uid(best - 1)
    shown.press("Escape")
    assert shown.js("document.getElementById('record').hidden")


def test_copies_stand_beside_what_stayed(tab):
    shown = tab("#view=duplicates")
    assert shown.js(CARDS) == ["twin one", "caption 23", "caption 24", "caption 25"]
    assert shown.js("document.querySelector('.copies .foot').textContent") == "near_duplicate3 / 8"


def test_a_facet_narrows_the_others_and_not_itself(tab):
    shown = tab("#view=wall")
    shown.js("[...document.querySelectorAll('.value')].find((b) => b.textContent.startsWith('pii')).click()")
    found = dict(zip(shown.js(texts("#filters .value .name")), shown.js(texts("#filters .value .n"))))
    assert shown.js(STATUS) == "2 of 30"
    assert (found["kept"], found["pii"], found["clip"], found["woman"]) == ("18", "2", "5", "0")


def test_dragging_over_a_chart_filters_by_it(tab):
    shown = tab("#view=overview")
    shown.drag("main svg.histogram", (0.0, 0.5), (0.5, 0.5))
    low, _, high = shown.js("new URLSearchParams(location.hash.slice(1)).get('clip_score')").partition("..")
    scores = [score(place) for place, name in enumerate(PLANNED) if not name.startswith("download")]
    assert low == "" and shown.js(STATUS) == f"{sum(found <= float(high) for found in scores)} of 30"
    shown.drag("main svg.histogram", (0.5, 0.5), (0.5, 0.5))
    assert shown.js(STATUS) == "30 of 30"


def test_the_map_draws_a_point_a_sample_and_opens_the_one_that_is_clicked(tab):
    shown = tab("#view=map&color=clip_score")
    before, *spot = shown.js(INKED)
    shown.js(f"{CANVAS}.focus()")
    shown.press("+")
    shown.press("ArrowRight")
    assert shown.js(INKED)[0] != before
    shown.press("0")
    assert shown.js(INKED) == [before, *spot]
    shown.mouse(*spot)
    assert shown.js(UID) in {uid(place) for place, name in enumerate(PLANNED) if not name.startswith("download")}
    assert "2 of 4 principal components" in shown.js(texts(".plane .note"))[0]


@pytest.mark.parametrize("width, height", [(1280, 800), (390, 844)])
def test_nothing_is_wider_than_the_window_and_pictures_come(tab, browser, width, height):
    browser.size(width, height)
    for place in ("#view=overview", "#view=wall", "#view=duplicates", "#view=map", f"#view=wall&uid={uid(23)}"):
        shown = tab(place)
        assert shown.js("document.documentElement.scrollWidth") <= width, place
    pixels = np.asarray(Image.open(io.BytesIO(shown.screenshot())).convert("RGB"), float)
    assert pixels.shape[:2] == (height, width) and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 300  # photographs
    browser.size(1280, 800)
