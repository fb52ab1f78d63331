"""The built world: what was planted is really there, and nothing else is wrong."""

import io
import json
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlmpipe.config import parse
from vlmpipe.data.planting import SHARES
from vlmpipe.data.scenes import LEFT_OUT
from vlmpipe.data.vqa import read_vqa, vqa_images
from vlmpipe.data.web import serve
from vlmpipe.data.world import TEST_IDS, QuestionsConfig, WorldConfig, _evaluation, _scenes, build
from vlmpipe.errors import UserError
from vlmpipe.images import NotAnImage, decode_rgb
from vlmpipe.shards import iter_images, read_manifest, read_rows

SHARED = Path(__file__).parents[3] / "shared/data"
ROWS = 240
FEW = QuestionsConfig(train_pictures=40, train_each=3, test_pictures=12, test_each=2, size=96)
SMALL = WorldConfig(pools={"scenes": ROWS, "more": 60}, trusted=20, questions=FEW, size=96)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    build("scenes", out, SMALL)
    return out


@pytest.fixture(scope="module")
def truth(world) -> list[dict]:
    return [row for row in pq.read_table(world / "planted.parquet").to_pylist() if row["pool"] == "scenes"]


@pytest.fixture(scope="module")
def pages(world) -> dict[str, dict]:
    return {page["url"]: page for page in pq.read_table(world / "web/scenes.parquet").to_pylist()}


def by_fault(truth: list[dict], *names: str | None) -> list[dict]:
    return [row for row in truth if row["fault"] in names]


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def hash_bits(image: Image.Image) -> np.ndarray:
    """A 64-bit DCT hash, written here apart from the product's own."""
    pixels = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
    grid = np.cos(np.pi / 32 * np.outer(np.arange(1, 9), np.arange(32) + 0.5))
    low = (grid @ pixels @ grid.T).ravel()
    return low > np.median(low)


# --- scenes ------------------------------------------------------------------------------------------------

def test_the_same_config_gives_the_same_bytes(world, tmp_path):
    (tmp_path / "pools").mkdir()
    (tmp_path / "pools/left-over.parquet").write_bytes(b"of another config")
    build("scenes", tmp_path, SMALL)
    assert files(tmp_path) == files(world)


def test_another_pool_or_size_of_it_leaves_a_pool_as_it_is(world, tmp_path):
    build("scenes", tmp_path, WorldConfig(pools={"scenes": ROWS}, trusted=20, questions=FEW, size=96))
    for name in ("pools/scenes.parquet", "web/scenes.parquet", "questions/test/questions.json"):
        assert (tmp_path / name).read_bytes() == (world / name).read_bytes()


def test_every_fault_is_planted_in_its_share(truth):
    counts = Counter(row["fault"] for row in truth)
    assert counts[None] == ROWS - sum(counts[name] for name in SHARES)
    for name, share in SHARES.items():
        assert counts[name] == max(1, round(share * ROWS)), name
    assert {row["fault"] for row in truth if row["recovers"]} == {"busy", "unavailable", "slow"}


def test_the_list_is_the_plan_without_the_truth(world, truth):
    listed = pq.read_table(world / "pools/scenes.parquet")
    assert listed.column_names == ["url", "caption"]
    assert listed.to_pylist() == [{"url": row["url"], "caption": row["caption"]} for row in truth]
    assert len({row["url"] for row in truth}) == ROWS


def test_the_groups_are_skewed_as_configured(truth):
    words = {"women": ("a woman", "a girl", "a lady"), "men": ("a man", "a boy", "a gentleman")}
    english = [row for row in truth if row["language"] == "en" and row["fault"] != "too_short"]
    for row in english:
        text = f" {row['caption'].lower()} "
        found = [group for group in words if any(f"{word}{end}" in text for word in words[group] for end in " ,.")]
        assert found == [row["group"]], row
    women = sum(row["group"] == "women" for row in truth) / ROWS
    assert women == pytest.approx(0.35, abs=0.04)


def test_sound_pairs_have_their_picture_and_true_caption(truth, pages):
    for row in by_fault(truth, None, "busy", "unavailable", "slow"):
        assert decode_rgb(pages[row["url"]]["body"]).size == (96, 96)
        assert row["caption"] == row["true_caption"]


def test_faults_of_the_web_are_in_the_pages(truth, pages):
    def all_pages(fault):
        found = [pages[row["url"]] for row in by_fault(truth, fault)]
        assert found
        return found

    assert {page["status"] for page in all_pages("dead_404")} == {404}
    assert {page["status"] for page in all_pages("dead_410")} == {410}
    assert not any(page["listens"] for page in all_pages("dead_host"))
    assert {(page["first_status"], page["status"]) for page in all_pages("busy")} == {(429, 200)}
    assert {page["status"] for page in all_pages("busy_forever")} == {429}
    assert all(page["claimed"] > len(page["body"]) for page in all_pages("truncated"))
    assert all(page["endless"] for page in all_pages("endless"))
    assert all(page["location"] for page in all_pages("private_redirect"))
    assert {page["robots"] for page in all_pages("opt_out")} == {"noai"}
    for page in all_pages("not_an_image") + all_pages("broken_image"):
        with pytest.raises(NotAnImage):
            decode_rgb(page["body"])


def test_duplicates_are_found_by_bytes_or_looks_and_nothing_else_is(truth, pages):
    pictures = {row["url"]: decode_rgb(pages[row["url"]]["body"]) for row in by_fault(truth, None, "near_duplicate")}
    for row in by_fault(truth, "exact_duplicate"):
        assert pages[row["url"]]["body"] == pages[row["twin_url"]]["body"]
    for row in by_fault(truth, "near_duplicate"):
        apart = hash_bits(pictures[row["url"]]) ^ hash_bits(pictures[row["twin_url"]])
        assert apart.sum() <= 6 and pages[row["url"]]["body"] != pages[row["twin_url"]]["body"]
    hashes = np.array([hash_bits(pictures[row["url"]]) for row in by_fault(truth, None)])
    distances = (hashes[:, None] ^ hashes[None]).sum(-1) + 64 * np.eye(len(hashes), dtype=int)
    assert (distances.min(1) <= 6).mean() < 0.005
    twins = [row["twin_url"] for row in truth if row["twin_url"]]
    assert len(twins) == len(set(twins))


def test_faults_of_pairs(truth, pages):
    for row in by_fault(truth, "swapped"):
        assert row["caption"] != row["true_caption"]
    assert max(decode_rgb(pages[row["url"]]["body"]).width for row in by_fault(truth, "tiny")) <= 40
    for row in by_fault(truth, "wide"):
        width, height = decode_rgb(pages[row["url"]]["body"]).size
        assert width / height > 4
    assert {row["language"] for row in by_fault(truth, "foreign")} <= {"de", "fr", "es", "it"}
    assert all(len(row["caption"].split()) <= 2 for row in by_fault(truth, "too_short"))


def test_evaluation_pictures_stand_in_the_pool(world, truth, pages):
    tested = vqa_images(world / "questions/test")
    for row in by_fault(truth, "in_evaluation"):
        ours, theirs = decode_rgb(pages[row["url"]]["body"]), decode_rgb(tested[row["evaluation_image"]])
        assert (hash_bits(ours) ^ hash_bits(theirs)).sum() <= 6
        assert pages[row["url"]]["body"] != tested[row["evaluation_image"]]


def test_questions_are_read_back_with_their_pictures(world):
    examples = {part: read_vqa(world / "questions" / part) for part in ("train", "test")}
    assert (len(examples["train"]), len(examples["test"])) == (120, 24)
    assert not {e.image_id for e in examples["train"]} & {e.image_id for e in examples["test"]}
    images = vqa_images(world / "questions/train")
    assert all(decode_rgb(images[example.image_id]).size == (96, 96) for example in examples["train"][::10])
    assert all(example.answers == (example.answer,) * 10 for example in examples["train"])


def test_the_trusted_set_is_a_pool_directory(world):
    rows = read_rows(world / "trusted").to_pylist()
    assert read_manifest(world / "trusted", "pool")["rows"] == len(rows) == 20
    assert [uid for uid, _ in iter_images(world / "trusted", "00000")] == [row["uid"] for row in rows]
    assert {row["status"] for row in rows} == {"downloaded"}
    assert len({row["caption"] for row in rows}) > 15


def test_the_built_world_is_served(world, truth, pages):
    import http.client

    row = by_fault(truth, None)[0]
    with serve("scenes", world) as hosts:
        assert {"images.scenes.test", "slow.scenes.test", "busy.scenes.test", "closed-down.scenes.test"} <= set(hosts)
        connection = http.client.HTTPConnection(*hosts["images.scenes.test"], timeout=5)
        path = row["url"].removeprefix("http://images.scenes.test")
        connection.request("GET", path, headers={"Host": "images.scenes.test"})
        assert connection.getresponse().read() == pages[row["url"]]["body"]


@pytest.mark.parametrize(("mapping", "said"), [
    ({"faults": {"swaped": 0.1}}, "unknown fault 'swaped'; did you mean 'swapped'"),
    ({"faults": {"swapped": 0.9}}, "sum to"),
    ({"pools": {"scenes": 0}}, r"pools\.scenes: found 0"),
    ({"questions": {"test_pictures": 0}}, r"questions\.test_pictures: found 0"),
    ({"women": 1.5}, "women: found 1.5"),
    ({"kind": "scene"}, "'scenes'"),
])
def test_config_mistakes_are_named(mapping, said):
    with pytest.raises(UserError, match=said):
        parse(WorldConfig, mapping, "world.scenes")


def test_a_pool_too_small_for_its_faults_is_named(tmp_path):
    with pytest.raises(UserError, match="found a pool of 10 pairs; expected at least"):
        build("scenes", tmp_path, WorldConfig(pools={"scenes": 10}, trusted=1, questions=FEW, size=32))


# --- textbooks ---------------------------------------------------------------------------------------------

BOOKS = ("osbooks-microbiology", "osbooks-us-history", "osbooks-world-history")


@pytest.fixture
def shelf(tmp_path) -> Path:
    """A folder laid out as the real one, with the formats that real figures have."""
    images = tmp_path / "shelf/textbooks/images"
    images.mkdir(parents=True)
    rows = []
    for number, (mode, suffix) in enumerate([("RGB", "jpg"), ("CMYK", "jpg"), ("RGBA", "png"), ("L", "jpg")] * 9):
        buffer = io.BytesIO()
        Image.effect_noise((60, 40), 50 + number).convert(mode).save(buffer, {"jpg": "JPEG", "png": "PNG"}[suffix])
        (images / f"fig{number}.{suffix}").write_bytes(buffer.getvalue())
        rows.append({"file": f"images/fig{number}.{suffix}", "alt": f"A picture of thing {number}",
                     "book": BOOKS[number % 3], "module": f"m{number // 6}"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "shelf/textbooks/pairs.parquet")
    hostile = tmp_path / "shelf/hostile-images"
    hostile.mkdir()
    (hostile / "bad.tif").write_bytes(b"II*\0nonsense")
    (hostile / "index.json").write_text(json.dumps([{"file": "bad.tif", "decodes": False, "note": "x"}]))
    return tmp_path / "shelf"


def textbooks(path: Path) -> WorldConfig:
    few = QuestionsConfig(train_pictures=9, test_pictures=6)
    return WorldConfig(kind="textbooks", pools={"textbooks": 100}, trusted=8, questions=few, path=str(path))


def test_textbook_figures_are_dealt_once(shelf, tmp_path):
    out = tmp_path / "out"
    build("textbooks", out, textbooks(shelf))
    pool = pq.read_table(out / "pools/textbooks.parquet").to_pylist()
    trusted = read_rows(out / "trusted").to_pylist()
    assert len(pool) == 36 - 9 - 6 - 8 + 1 and len(trusted) == 8
    assert not {row["url"] for row in pool} & {row["url"] for row in trusted}
    assert {row["book"] for row in pool} == {*BOOKS, None}
    hostile = [row["fault"] for row in pq.read_table(out / "planted.parquet").to_pylist() if "hostile" in row["url"]]
    assert hostile == ["broken_image"]
    train = read_vqa(out / "questions/train")
    assert Counter(e.question_type for e in train) == {"subject": 9, "is subject": 9}
    assert {e.answer for e in train} == {"microbiology", "american history", "world history", "yes", "no"}
    images = vqa_images(out / "questions/train")
    assert {decode_rgb(images[e.image_id]).mode for e in train} == {"RGB"}


def test_textbook_files_are_served_from_where_they_are(shelf, tmp_path):
    import http.client

    out = tmp_path / "out"
    build("textbooks", out, textbooks(shelf))
    with serve("folder", out) as hosts:
        connection = http.client.HTTPConnection(*hosts["figures.textbooks.test"], timeout=5)
        connection.request("GET", "/fig1.jpg", headers={"Host": "figures.textbooks.test"})
        assert connection.getresponse().read() == (shelf / "textbooks/images/fig1.jpg").read_bytes()
        assert "hostile.textbooks.test" in hosts


def test_a_missing_shelf_says_what_is_expected(tmp_path):
    with pytest.raises(UserError, match=r"found no .*pairs\.parquet; expected a folder with textbooks/.*set `path`"):
        build("textbooks", tmp_path / "out", textbooks(tmp_path / "nowhere"))


def test_too_few_figures_are_named(shelf, tmp_path):
    with pytest.raises(UserError, match=r"found 36 figures in .* expected more than"):
        build("textbooks", tmp_path / "out", WorldConfig(kind="textbooks", path=str(shelf)))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the textbook figures in {os.path.relpath(SHARED)}")
def test_the_real_shelf(tmp_path):
    few = QuestionsConfig(train_pictures=20, test_pictures=10)
    build("textbooks", tmp_path, WorldConfig(kind="textbooks", trusted=10, questions=few, path=str(SHARED)))
    pool = pq.read_table(tmp_path / "pools/textbooks.parquet").to_pylist()
    assert len(pool) == 3986 - 40 + 75
    planted = Counter(row["fault"] for row in pq.read_table(tmp_path / "planted.parquet").to_pylist())
    assert planted["broken_image"] == 44


def test_what_is_left_out_is_learned_from_nowhere(tmp_path):
    config = replace(SMALL, pools={"scenes": 200}, leave_out=True)
    build("scenes", tmp_path, config)
    planted = pq.read_table(tmp_path / "planted.parquet").to_pylist()
    said = [row["caption"] for row in planted if row["language"] == "en"]
    said += [row["caption"] for row in read_rows(tmp_path / "trusted").to_pylist()]
    asked = read_vqa(tmp_path / "questions" / "train")
    said += [e.question for e in asked if e.question_type == "presence" and e.answer == "yes"]
    named = {(color, shape) for text in said for color, shape in re.findall(r"(?=\b(\w+) (\w+)\b)", text.lower())}
    assert not named & LEFT_OUT and {color for color, _ in LEFT_OUT} <= {color for color, _ in named}


def test_copies_of_test_pictures_show_nothing_that_is_left_out():
    tested = _scenes(SMALL, "test", 12)
    whole = list(enumerate(tested, TEST_IDS + 1))
    assert _evaluation(tested, SMALL) == whole
    config = replace(SMALL, leave_out=True)
    hidden = [one for one in whole if {(item.color, item.shape) for item in one[1].items} & LEFT_OUT]
    assert hidden and _evaluation(tested, config) == [one for one in whole if one not in hidden]
    none = [scene for _, scene in hidden]
    with pytest.raises(UserError, match=r"test_pictures: found [0-9]+, all with a combination that is left out"):
        _evaluation(none, config)
    assert _evaluation(none, replace(config, faults={"in_evaluation": 0})) == []
