"""The audit stage on small shard directories with known faults and known groups."""

import hashlib
import io
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlmpipe import shards
from vlmpipe.config import parse
from vlmpipe.curate.audit import AuditConfig, audit
from vlmpipe.curate.duplicates import THUMBNAIL, look
from vlmpipe.errors import UserError

LEXICON = {"people": {"women": ["woman", "women"], "men": {"en": ["man", "men"], "de": ["man", "Mann"]}}}
CONFIG = {"bias": {
    "lexicons": LEXICON, "attributes": {"work": ["works"]},
    "columns": ["language", "book", "url_country", "url_region"], "bins": {"clip_score": [0.25]},
    "regions": {"test": "nowhere"},
}}
EVALUATION = 7  # the seed of the picture that the questions are about


def picture(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((48, 48), Image.Resampling.NEAREST)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


LOOKS = look([picture(seed) for seed in range(50)])


class World:
    """Rows of one pool as plain dicts; written in shards of 100, annotations and decisions beside them.

    400 rows. Even rows speak of women, odd of men; 40 are not downloaded; of women 30% are kept, of men 60%, and the
    women who go beyond that go by `clip`.
    """

    def __init__(self, root: Path):
        self.root, self.rows = root, [self._row(i) for i in range(400)]
        self.evaluation = [EVALUATION]

    def _row(self, i: int) -> dict:
        downloaded, woman, rank = i % 10 < 9, i % 2 == 0, (i // 2) % 20
        kept = downloaded and rank < (6 if woman else 12)
        reason = "download:http_404" if not downloaded else "clip" if woman and rank < 12 else "small"
        if not woman and not downloaded:
            kept = False
        return {
            "uid": f"{i:032x}", "pool": "main",
            "url": f"http://images.{('test', 'co.uk', 'de', 'com')[i % 4 if i < 320 else 3]}/{i}",
            "caption": f"A {'woman' if woman else 'man'} {'works' if i % 4 == 0 else 'rests'}",
            "status": "downloaded" if downloaded else "refused", "fault": None if downloaded else "http_404",
            "sha256": hashlib.sha256(str(i).encode()).hexdigest() if downloaded else None,
            "book": "history" if i < 200 else "physics", "seed": 8 + i % 40,
            "language": "en" if i % 5 else "de", "clip_score": 0.2 + 0.001 * (i % 100),
            "kept": kept, "reason": None if kept else reason,
        }

    @property
    def kept(self) -> list[dict]:
        return [row for row in self.rows if row["kept"]]

    def write(self, undecided: int = 0, unannotated: int = 0, without: tuple[str, ...] = ()) -> "World":
        """`undecided`, `unannotated`: so many last rows are missing there; `without`: annotation columns left out."""
        self._shards("pools", lambda rows: pa.Table.from_pylist(
            [{**{k: row[k] for k in ("uid", "url", "caption", "status", "sha256", "book")}, "reason": row["fault"]}
             for row in rows], schema=pa.schema([(k, pa.string()) for k in (
                 "uid", "url", "caption", "status", "sha256", "book", "reason")])))
        downloaded = [row["uid"] for row in self.rows if row["status"] == "downloaded"]
        hidden = set(downloaded[len(downloaded) - unannotated:])
        self._shards("annotations", lambda rows: self._annotations([row for row in rows if row["uid"] not in hidden])
                     .drop_columns(list(without)))
        decided = self.rows[: len(self.rows) - undecided]
        selection = self.root / "selection"
        names = {k: pa.string() for k in ("uid", "pool", "reason")} | {"kept": pa.bool_()}
        shards.write_table(selection / "decisions.parquet", pa.Table.from_pylist(decided, schema=pa.schema(names)))
        steps = [{"reason": name} for name in ("downloaded", "small", "clip")]
        steps[2] |= {"mitigation": {"method": "quota"}}
        shards.write_json(selection / "funnel.json", {"steps": steps})
        entry = {"name": "decisions", "rows": len(decided), "files": {}}
        shards.write_manifest(selection, "selection", [entry], pools={"main": "sha256 of its manifest"})
        images = self.root / "questions" / "test" / "images"
        digest = shards.write_tar(images / "00000.tar", [(f"{seed}.png", png(seed)) for seed in self.evaluation])
        entry = {"name": "00000", "rows": len(self.evaluation), "files": {"00000.tar": digest}}
        shards.write_manifest(images, "images", [entry])
        return self

    def _shards(self, kind: str, table) -> None:
        directory, entries = self.root / kind / "main", []
        for start in range(0, len(self.rows), 100):
            name, found = f"{start // 100:05d}", table(self.rows[start : start + 100])
            shards.write_table(directory / f"{name}.parquet", found)
            entries.append({"name": name, "rows": len(found), "files": {}})
        shards.write_manifest(directory, kind.rstrip("s"), entries)

    def _annotations(self, rows: list[dict]) -> pa.Table:
        rows = [row for row in rows if row["status"] == "downloaded"]
        looks = LOOKS.take(np.array([row["seed"] for row in rows], int))
        return pa.table({
            "uid": [row["uid"] for row in rows],
            "width": pa.array([48] * len(rows), pa.int32()), "height": pa.array([48] * len(rows), pa.int32()),
            "phash": pa.array(looks.hashes), "language": pa.array([row["language"] for row in rows], pa.string()),
            "thumbnail": pa.array([bytes(row) for row in looks.thumbnails], pa.binary(THUMBNAIL)),
            "caption_chars": pa.array([len(row["caption"]) for row in rows], pa.int32()),
            "clip_score": pa.array([row["clip_score"] for row in rows], pa.float32()),
        })

    def audit(self, out: str = "audit", **config) -> tuple[dict, dict]:
        """(metrics, failed expectations by suite.column)."""
        where = [self.root / name for name in ("pools", "annotations", "selection", "questions", out)]
        audit(*where, parse(AuditConfig, CONFIG | config, "audit"), self.root / "champion.json")
        records = shards.read_json(self.root / out / "expectations.json")
        failed = {f"{r['suite']}.{r['column']}": r for r in records if not r["success"]}
        return shards.read_json(self.root / out / "metrics.json"), failed


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """An audit of sound data with a planted skew; several tests look at it."""
    world = World(tmp_path_factory.mktemp("sound")).write()
    return world, *world.audit()


def test_sound_data_meets_every_expectation(sound):
    _, found, failed = sound
    assert failed == {} and found["metrics"]["expectations.failed"] == 0
    assert found["details"]["expectations.failed"] == "all hold"
    assert found["n"]["expectations.failed"] > 30


def test_totals_are_counted(sound):
    world, found, _ = sound
    values, kept = found["metrics"], len(world.kept)
    assert values["download.success_rate"] == values["download.success_rate_min"] == 0.9
    assert values["selection.kept"] == kept and values["selection.kept_fraction"] == kept / 400
    assert values["selection.kept_of_downloaded"] == kept / 360
    assert values["selection.unaccounted"] == 0 and values["evaluation.overlap"] == 0
    assert found["details"]["download.success_rate_min"] == "lowest in pool main: 360 of 400 rows"


def test_every_metric_is_a_finite_number_with_count_and_detail(sound):
    _, found, _ = sound
    assert set(found["metrics"]) == set(found["n"]) == set(found["details"])
    assert all(np.isfinite(value) for value in found["metrics"].values())
    assert all(isinstance(text, str) and "\n" not in text for text in found["details"].values())


def test_planted_skew_is_found_with_the_group_and_the_rule(sound):
    world, found, _ = sound
    women, men = ([row["kept"] for row in world.rows if f" {who} " in row["caption"]] for who in ("woman", "man"))
    values, details = found["metrics"], found["details"]
    assert values["bias.people.impact_ratio"] == pytest.approx(np.mean(women) / np.mean(men))
    assert values["bias.people.impact_ratio_upper"] < 0.8 and values["bias.breaches"] == 1
    assert details["bias.breaches"] == "people"
    told = r"women keeps 0\.\d+ of 200 rows, men 0\.\d+ of 200: ratio 0\.\d+ \["
    assert re.match(told, details["bias.people.impact_ratio"])
    assert "rule clip drops" in details["bias.people.impact_ratio_upper"]
    assert details["bias.people.rule_impact_ratio_upper"].startswith("rule clip passes women against men")
    share = sum(women) / len(world.kept)
    assert values["bias.people.amplification_min"] == pytest.approx(share / 0.5)
    assert values["bias.people.amplification_max"] == pytest.approx((1 - share) / 0.5)


def test_the_rule_in_breach_is_named_with_rows_that_it_dropped(sound):
    world, found, _ = sound
    rules = shards.read_json(world.root / "audit" / "bias.json")["rules"]
    named = {rule["reason"]: rule for rule in rules if rule["grouping"] == "people"}
    assert set(named) == {"clip", "download"}  # it is men's pictures that are not there
    rule = named["clip"]
    assert (rule["group"], rule["against"]) == ("women", "men")
    dropped = {row["uid"]: row for row in world.rows if row["reason"] == "clip" and "woman" in row["caption"]}
    assert rule["dropped"] == len(dropped) and rule["rate"] > rule["against_rate"] == 0
    assert len(rule["samples"]) == 5 and {sample["uid"] for sample in rule["samples"]} <= set(dropped)
    for sample in rule["samples"]:
        assert sample["caption"] == dropped[sample["uid"]]["caption"] and sample["reason"] == "clip"
    told = found["details"]["bias.rules"]
    assert told.startswith("clip drops 0.") and "people=women, 0.000 of men, such as " in told
    assert "download drops 0.200 of 200 people=men, 0.000 of women" in told
    assert found["metrics"]["bias.rules"] == len(rules)


def test_a_gate_can_bound_every_group_and_every_rule(sound):
    world, found, _ = sound
    values = found["metrics"]
    assert values["bias.people.women.share_before"] == 0.5
    assert values["bias.people.women.retention"] == sum("woman" in row["caption"] for row in world.kept) / 200
    assert values["bias.people.rule.clip.impact_ratio_upper"] < 0.8
    assert values["bias.people.rule.small.impact_ratio_upper"] > 0.8
    assert values["bias.people.rule_impact_ratio_upper"] == values["bias.people.rule.clip.impact_ratio_upper"]
    assert values["bias.people.rule_gap_lower"] == values["bias.people.rule.clip.gap_lower"] > 0.1
    assert values["bias.people.amplification_min_upper"] < 1 < values["bias.people.amplification_max_lower"]
    assert 0 <= values["bias.people.score_gap_lower"] < values["bias.people.score_gap"]
    assert values["bias.people.npmi_shift_lower"] <= values["bias.people.npmi_shift"]


def test_groups_come_from_the_url_and_from_a_number(sound):
    world, _, _ = sound
    table = shards.read_json(world.root / "audit" / "bias.json")["groupings"]
    sizes = {name: {group["group"]: group["total"] for group in table[name]["groups"]} for name in table}
    assert sizes["url_country"] == {"de": 80, "uk": 80}
    assert sizes["url_region"] == {"nowhere": 80, "northern_europe": 80, "western_europe": 80}
    assert table["url_region"]["unknown"] == 160
    below = sum(row["status"] == "downloaded" and np.float32(row["clip_score"]) < 0.25 for row in world.rows)
    assert sizes["clip_score"] == {"< 0.25": below, ">= 0.25": 360 - below}


def test_groups_without_skew_are_no_breach(sound):
    _, found, _ = sound
    assert found["metrics"]["bias.book.impact_ratio_upper"] == 1
    assert found["metrics"]["bias.language.impact_ratio_upper"] == 1
    assert found["metrics"]["bias.book.groups_tested"] == 2


def test_bias_tables_add_up_over_shards(sound):
    world, _, _ = sound
    table = shards.read_json(world.root / "audit" / "bias.json")
    people = table["groupings"]["people"]
    assert [step["reason"] for step in people["steps"]] == ["download", "small", "clip"]
    for group in people["groups"]:
        assert group["total"] == 200
        assert group["kept"] + sum(rule["dropped"] for rule in group["reasons"]) == 200
    assert table["groupings"]["language"]["unknown"] == 40
    assert table["mitigations"] == [{"method": "quota", "reason": "clip"}]
    records = {(r["group"], r["attribute"]): r for r in table["associations"]}
    assert records["women", "work"]["together_before"] == 100
    assert records["men", "work"]["before"] == -1


def test_data_docs_are_there(sound):
    world, _, _ = sound
    index = (world.root / "audit" / "data_docs" / "index.html").read_text()
    for suite in ("pool-main", "selection", "raw-main", "annotated-main", "selected", "scores"):
        assert f'href="expectations/{suite}.html"' in index
        assert list((world.root / "audit" / "data_docs" / "validations" / suite).rglob("*.html"))


def test_two_runs_give_the_same_bytes(sound):
    world, _, _ = sound
    world.audit("again", expectations={"batch_rows": 250_000})
    one, two = world.root / "audit", world.root / "again"
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


def test_batches_change_no_verdict_and_no_number(sound):
    world, found, _ = sound
    small, failed = world.audit("small", expectations={"batch_rows": 70})
    assert failed == {} and small["metrics"] == found["metrics"]
    records = shards.read_json(world.root / "small" / "expectations.json")
    assert {r["batches"] for r in records if r["suite"] == "raw-main"} == {8}
    rows = [r for r in records if r["expectation"] == "expect_column_values_to_be_unique" and r["suite"] == "raw-main"]
    assert rows[0]["observed"]["rows"] == 400


def test_a_second_audit_leaves_no_page_of_the_first(world):
    world.write()
    stale = world.root / "audit" / "data_docs" / "validations" / "gone" / "page.html"
    shards.write_bytes_atomic(stale, b"old")
    world.audit()
    assert not stale.exists()


# --- breaches are evidence ---------------------------------------------------------------------------------

def test_low_success_rate_is_told_with_both_numbers(world):
    for row in world.rows[:300]:
        row |= {"status": "refused", "fault": "dns", "kept": False, "reason": "download:dns"}
    found, failed = world.write().audit()
    assert failed["pool-main.success_rate"]["observed"]["examples"] == [pytest.approx(0.225)]
    told = "pool-main.success_rate: expect_column_values_to_be_between (min_value 0.5, max_value 1.0): found 0.225"
    assert failed["pool-main.success_rate"]["message"] == told
    assert found["metrics"]["download.success_rate"] == pytest.approx(0.225)


@pytest.mark.parametrize("kind", ["bytes", "looks"])
def test_overlap_with_the_evaluation_is_found_by_bytes_and_by_looks(world, kind):
    row = world.kept[5]
    row |= {"sha256": hashlib.sha256(png(EVALUATION)).hexdigest()} if kind == "bytes" else {"seed": EVALUATION}
    dropped = next(row for row in world.rows if row["reason"] == "small")
    dropped |= {"seed": EVALUATION}
    found, failed = world.write().audit()
    assert set(failed) == {"selection.evaluation_overlap"}
    assert found["metrics"]["evaluation.overlap_rows"] == 1
    assert found["metrics"]["evaluation.overlap"] == 1 / len(world.kept)
    assert "1 of" in found["details"]["evaluation.overlap"]


def test_rows_without_decision_and_annotation_are_counted(world):
    found, failed = world.write(undecided=3, unannotated=2).audit()
    assert {"pool-main.rows_without_decision", "pool-main.downloads_without_annotation"} <= set(failed)
    assert found["metrics"]["selection.unaccounted"] == 3


def test_unordered_decisions_are_matched_by_uid(world):
    expected, _ = world.write().audit("ordered")
    path = world.root / "selection" / "decisions.parquet"
    table = pq.read_table(path)
    shards.write_table(path, table.take(np.arange(len(table))[::-1]))
    found, failed = world.audit("unordered")
    assert failed == {} and found == expected


def test_repeated_uids_are_found_across_shards(world):
    world.rows[399]["uid"] = world.rows[0]["uid"]
    _, failed = world.write().audit()
    assert {"pool-main.repeated_uids", "raw-main.uid"} <= set(failed)


def test_scores_that_are_all_null_fail(world):
    for row in world.rows:
        row["clip_score"] = None
    found, failed = world.write().audit()
    assert {"annotated-main.clip_score", "selected.clip_score", "scores.clip_score"} <= set(failed)
    assert "bias.people.score_gap" not in found["metrics"]


def test_a_missing_annotation_column_fails(world):
    _, failed = world.write(without=("phash",)).audit()
    assert "annotated-main.phash" in failed
    assert 'column "phash"' in failed["annotated-main.phash"]["message"]


def test_without_scores_none_are_asked_for(world):
    """With the annotator of embeddings off there is no clip_score: the audit does without, and says nothing of it."""
    found, failed = world.write(without=("clip_score",)).audit(bias={"lexicons": LEXICON})
    assert failed == {} and not [name for name in found["metrics"] if name.startswith("annotations.score")]
    suites = {record["suite"] for record in shards.read_json(world.root / "audit" / "expectations.json")}
    assert "scores" not in suites and "annotated-main" in suites


def test_a_selection_that_keeps_nothing_fails_and_is_written(world):
    for row in world.rows:
        row |= {"kept": False, "reason": row["reason"] or "small"}
    found, failed = world.write().audit()
    assert {"selection.kept", "selected.None", "scores.None"} <= set(failed)
    assert found["metrics"]["selection.kept"] == 0 and "bias.people.impact_ratio" not in found["metrics"]


def test_language_mix_is_expected(world):
    _, failed = world.write().audit(expectations={"languages": {"en": [0.9, 1], "de": [0.05, 0.3], "fr": [0.1, None]}})
    assert set(failed) == {"selection.language_en", "selection.language_fr"}


def test_no_evaluation_picture_is_no_evidence_of_no_overlap(world):
    world.evaluation = []
    with pytest.raises(UserError, match="found no pictures"):
        world.write().audit()


# --- drift -------------------------------------------------------------------------------------------------

def test_the_first_run_says_that_there_is_nothing_to_compare_with(sound):
    world, found, _ = sound
    assert found["metrics"]["drift.moved"] == 0 and found["n"]["drift.moved"] == 0
    assert found["details"]["drift.moved"] == "drift: no earlier version of the data to compare with"
    assert "no earlier version of the data" in (world.root / "audit" / "data_docs" / "index.html").read_text()


def test_drift_from_the_champions_data_fails_by_name(sound, tmp_path):
    _, before, _ = sound
    world = World(tmp_path)
    shards.write_json(tmp_path / "champion.json", {"version": "v0.1.0", "metrics": {}, "audit": before})
    for row in world.rows:
        row |= {"language": "fr" if row["language"] == "de" else "en", "clip_score": row["clip_score"] - 0.1}
    found, failed = world.write().audit(bias={})
    scores = {f"annotations.score_{name}" for name in ("p05", "p25", "p50", "p75", "p95")}
    moved = scores | {"selection.language.de", "selection.language.fr"}
    assert set(failed) == {f"drift.{name}" for name in moved}
    assert found["metrics"]["drift.moved"] == 7 and found["n"]["drift.moved"] == 10
    assert found["details"]["drift.moved"].startswith("drift: compared with v0.1.0; moved: annotations.score_p05, ")
    assert "found 0.0" in failed["drift.selection.language.de"]["message"]
    still, failed = world.audit("off", bias={}, expectations={"drift": None})
    assert failed == {} and still["details"]["drift.moved"].startswith("drift: not compared")


# --- unusable input ----------------------------------------------------------------------------------------

def test_unusable_input_is_one_line(world):
    world.write()
    with pytest.raises(UserError, match="found no column 'bok' in any pool or annotation; did you mean 'book'"):
        world.audit(bias={"columns": ["bok"]})
    with pytest.raises(UserError, match=r"found no folder .*questions/val/images"):
        world.audit(evaluation=["val"])
    (world.root / "annotations/main/manifest.json").unlink()
    with pytest.raises(UserError, match=r"annotations/main has no manifest.json"):
        world.audit()
    (world.root / "selection/manifest.json").unlink()
    with pytest.raises(UserError, match=r"selection has no manifest.json"):
        world.audit()


def test_a_damaged_decisions_file_names_itself(world):
    world.write()
    (world.root / "selection" / "decisions.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(UserError, match=r"corrupt shard .*decisions.parquet"):
        world.audit()
