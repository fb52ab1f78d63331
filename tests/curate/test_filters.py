"""Selection: each rule on known rows, the order, the counts that must add up, and twins across pools."""

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from tests.curate.made_pools import jpeg, made_rows, picture, row, write_pool, write_world
from vlmpipe import shards
from vlmpipe.config import parse
from vlmpipe.curate import rules, twins
from vlmpipe.curate.columns import Rows
from vlmpipe.curate.duplicates import THUMBNAIL, Looks
from vlmpipe.curate.filters import ORDER, SelectConfig, decide, select
from vlmpipe.errors import UserError

OPEN = ("downloaded", "decoded")


def alike(hashes) -> Looks:
    """Looks that differ in their hash only."""
    return Looks(np.array(hashes, np.uint64), np.zeros((len(hashes), THUMBNAIL), np.uint8))


def judged(rows: Rows, *names: str, **settings) -> list[dict]:
    decisions, steps = decide(rows, SelectConfig(order=(*OPEN, *names), **settings).ordered())
    decisions.funnel(steps)
    return pa.concat_tables(decisions.tables()).to_pylist()


def reasons(table: list[dict]) -> list[str | None]:
    return [entry["reason"] for entry in table]


# --- one rule at a time ------------------------------------------------------------------------------------

def test_what_was_not_downloaded_keeps_the_reason_of_the_download():
    status = ["downloaded", "refused", "retriable", "retriable"]
    rows = made_rows(4, status=status, reason=[None, "http_404", "timeout", None])
    assert reasons(judged(rows)) == [None, "download:http_404", "download:timeout", "download:retriable"]


def test_what_did_not_decode_keeps_the_reason_of_the_annotation():
    assert reasons(judged(made_rows(2, error=["broken_image", None]))) == ["decode:broken_image", None]


def test_size_and_aspect_are_those_on_the_web():
    rows = made_rows(5, original_width=[200, 199, 600, 601, np.nan], original_height=[200, 900, 200, 200, 300])
    table = judged(rows, "small", "elongated")
    assert reasons(table) == [None, "small", None, "elongated", "small:missing"]
    assert (table[1]["value"], table[1]["threshold"]) == (199, 200)
    assert table[3]["value"] == pytest.approx(3.005) and table[3]["threshold"] == 3
    assert table[4]["value"] is None


def test_caption_counts_have_both_ends():
    rows = made_rows(4, caption_words=[2, 3, 9, 10], caption_chars=[50, 5, 6, 7])
    table = judged(rows, "caption_words", "caption_chars", caption_words=rules.CaptionWords(max=9))
    assert reasons(table) == ["caption_words", "caption_chars", None, "caption_words"]
    assert [entry["threshold"] for entry in table] == [3, 6, None, 9]


def test_language_and_its_confidence():
    rows = made_rows(5, language=["en", "de", "en", "de", None], language_score=[0.9, 0.9, 0.2, 0.2, np.nan])
    assert reasons(judged(rows, "language")) == [None, "language", None, "language", "language:missing"]
    strict = rules.Language(min_confidence=0.5)
    assert reasons(judged(rows, "language", language=strict)) == [None, *["language"] * 3, "language:missing"]
    lenient = rules.Language(believed_from=0.5)
    assert reasons(judged(rows, "language", language=lenient)) == [None, "language", None, None, "language:missing"]
    two = rules.Language(allowed=("en", "de"))
    assert reasons(judged(rows, "language", language=two)) == [None, None, None, None, "language:missing"]


def test_published_top_fraction_keeps_31_of_100():
    scores = np.random.default_rng(0).permutation(100) / 100
    table = judged(made_rows(100, clip_score=scores), "clip", clip=rules.Clip(top_fraction=0.3, formula="published"))
    assert sum(entry["kept"] for entry in table) == 31
    assert {entry["threshold"] for entry in table if not entry["kept"]} == {0.69}


@pytest.mark.parametrize("fraction,kept", [(0.3, 30), (0.001, 1), (0.305, 31), (1.0, 100), (0.07, 7)])
def test_safe_top_fraction_keeps_what_it_says(fraction, kept):
    scores = np.random.default_rng(0).permutation(100) / 100
    table = judged(made_rows(100, clip_score=scores), "clip", clip=rules.Clip(top_fraction=fraction))
    assert sum(entry["kept"] for entry in table) == kept


@pytest.mark.parametrize("formula", ["safe", "published"])
def test_missing_scores_are_dropped_and_do_not_move_the_threshold(formula):
    scores = [*np.arange(10) / 10, np.nan, np.nan, np.inf]
    rule = rules.Clip(top_fraction=0.5, formula=formula)
    table = judged(made_rows(13, clip_score=scores), "clip", clip=rule)
    dropped = 5 if formula == "safe" else 4
    assert [entry["kept"] for entry in table[:10]] == [False] * dropped + [True] * (10 - dropped)
    assert reasons(table[10:]) == ["clip:missing"] * 3
    assert reasons(judged(made_rows(2, clip_score=[np.nan, np.nan]), "clip", clip=rule)) == ["clip:missing"] * 2


def test_ties_at_the_threshold_all_stay():
    table = judged(made_rows(6, clip_score=[0.1, 0.2, 0.2, 0.2, 0.2, 0.3]), "clip", clip=rules.Clip(top_fraction=1 / 3))
    assert [entry["kept"] for entry in table] == [False, True, True, True, True, True]


def test_minimum_and_fraction_both_hold():
    scores = np.arange(10) / 10
    table = judged(made_rows(10, clip_score=scores), "clip", clip=rules.Clip(min=0.75, top_fraction=0.5))
    assert [entry["kept"] for entry in table] == [False] * 8 + [True] * 2


def test_the_fraction_is_of_the_remaining_rows_or_of_all():
    rows = {"clip_score": np.arange(10) / 10, "caption_words": [4] * 5 + [1] * 5}
    of_rest = judged(made_rows(10, **rows), "caption_words", "clip", clip=rules.Clip(top_fraction=0.4))
    of_all = judged(made_rows(10, **rows), "caption_words", "clip", clip=rules.Clip(top_fraction=0.6, among="all"))
    assert [i for i, entry in enumerate(of_rest) if entry["kept"]] == [3, 4]
    assert [i for i, entry in enumerate(of_all) if entry["kept"]] == [4]


def test_exact_duplicates_keep_the_best_score_then_the_first():
    rows = made_rows(6, sha256=["x", "y", "x", "x", None, None], clip_score=[0.1, 0.2, 0.5, 0.5, 0.1, 0.1], pools=2)
    table = judged(rows, "exact_duplicate")
    assert [entry["other_uid"] for entry in table] == ["u2", None, None, "u2", None, None]
    assert reasons(table) == ["exact_duplicate", None, None, "exact_duplicate", None, None]
    assert table[3]["pool"] == "p1" and table[2]["pool"] == "p0"


def test_who_stays_follows_the_preference():
    columns = {"sha256": ["x"] * 3, "clip_score": [0.1, 0.9, np.nan], "original_width": [5, 5, 9]}
    for prefer, winner in (("first", "u0"), ("clip_score", "u1"), ("pixels", "u2")):
        table = judged(made_rows(3, prefer=prefer, **columns), "exact_duplicate")
        assert [entry["uid"] for entry in table if entry["kept"]] == [winner]


def test_near_duplicates_name_their_twin_and_the_bits():
    rows = made_rows(4, looks=alike([0, 0b111, 0b1111 << 60, 1 << 60]), clip_score=[0.1, 0.9, 0.5, 0.2])
    table = judged(rows, "near_duplicate", near_duplicate=twins.NearDuplicate(radius=4))
    # The last is 4 bits from the second and 3 from the third, which both stay: the nearer one is named.
    assert [entry["kept"] for entry in table] == [False, True, True, False]
    assert table[0]["other_uid"] == "u1" and (table[0]["value"], table[0]["threshold"]) == (3, 4)
    assert table[3]["other_uid"] == "u2" and table[3]["value"] == 3


def test_evaluation_pictures_are_found_by_looks_and_named():
    rows = made_rows(3, looks=alike([0, 0b11, 1 << 50]), evaluation=alike([0b1111 << 20, 0b1]))
    table = judged(rows, "evaluation_overlap", evaluation_overlap=twins.EvaluationOverlap(radius=1))
    assert [entry["other_uid"] for entry in table] == ["e1", "e1", None]
    assert [entry["value"] for entry in table] == [1, 1, None]


def test_datacomp_basic_on_a_table_by_hand():
    """facts: top-1 English, more than 2 words, more than 5 characters, short side >= 200, aspect <= 3.0."""
    rng = np.random.default_rng(5)
    n = 400
    columns = {
        "original_width": rng.choice([199, 200, 201, 400, 600, 601, 660], n),
        "caption_words": rng.choice([1, 2, 3, 9], n),
        "original_height": rng.choice([199, 200, 220, 600], n), "caption_chars": rng.choice([4, 5, 6, 40], n),
        "language": rng.choice(["en", "de", "und"], n, p=[0.8, 0.1, 0.1]), "language_score": rng.random(n),
    }
    expected = [
        lang == "en" and words > 2 and chars > 5 and min(w, h) >= 200 and max(w, h) / min(w, h) <= 3.0
        for w, words, h, chars, lang, _ in zip(*columns.values())
    ]
    table = judged(made_rows(n, **columns), "small", "elongated", "caption_words", "caption_chars", "language")
    assert [entry["kept"] for entry in table] == expected
    assert 0 < sum(expected) < n


# --- all together ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_lost_in_any_order(seed):
    """Random pools and random orders: kept plus all reasons is the pool; no rule sees a row twice."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 300))
    rows = made_rows(
        n, pools=3, status=rng.choice(["downloaded", "refused", "retriable"], n, p=[0.8, 0.1, 0.1]),
        reason=rng.choice(["http_404", "timeout"], n), error=rng.choice(["broken_image", None], n, p=[0.1, 0.9]),
        original_width=rng.integers(50, 900, n), original_height=rng.integers(150, 900, n),
        caption_words=rng.integers(1, 9, n), clip_score=np.where(rng.random(n) < 0.1, np.nan, rng.random(n)),
        sha256=rng.choice(["a", "b", "c", *map(str, range(n))], n), language=rng.choice(["en", "de"], n),
        looks=alike(rng.integers(0, 50, n)), evaluation=alike([3]),
    )
    order = (*OPEN, *rng.permutation(ORDER[2:])[: rng.integers(1, 9)])
    settings = {"clip": rules.Clip(top_fraction=0.8), "near_duplicate": twins.NearDuplicate(radius=1)}
    settings["evaluation_overlap"] = twins.EvaluationOverlap(radius=1)
    decisions, steps = decide(rows, SelectConfig(order=order, **settings).ordered())
    funnel, table = decisions.funnel(steps), pa.concat_tables(decisions.tables()).to_pylist()
    assert len(table) == n and [entry["uid"] for entry in table] == [f"u{i}" for i in range(n)]
    assert all((entry["reason"] is None) == entry["kept"] for entry in table)
    assert funnel["kept"] + sum(funnel["reasons"].values()) == n == sum(p["rows"] for p in funnel["pools"].values())
    assert [s["rows_in"] for s in steps[1:]] == [s["rows_out"] for s in steps[:-1]]
    assert steps[-1]["rows_out"] == funnel["kept"] == sum(p["kept"] for p in funnel["pools"].values())
    for step in steps:
        assert sum(step["pools"].values()) == step["dropped"] == step["rows_in"] - step["rows_out"]


def test_a_rule_that_drops_a_row_twice_is_our_bug():
    rows = made_rows(3)

    @dataclass(frozen=True)
    class Greedy:
        alone = False

        def drops(self, rows, alive):
            return rules.Drops(np.array([0]))

    with pytest.raises(AssertionError, match="gone already"):
        decide(rows, [("downloaded", Greedy()), ("decoded", Greedy())])


@pytest.mark.parametrize("order,message", [
    (["downloaded", "decoded", "smal"], "unknown rule 'smal'; did you mean 'small'"),
    (["downloaded", "decoded", "clip", "clip"], "rule 'clip' twice"),
    (["clip", "downloaded", "decoded"], "expected downloaded, decoded"),
    ([], "expected downloaded, decoded"),
])
def test_a_wrong_order_is_refused(order, message):
    with pytest.raises(UserError, match=message):
        parse(SelectConfig, {"order": order}, "curation.select")


def test_settings_parse_and_wrong_ones_are_refused():
    config = parse(SelectConfig, {"clip": {"min": 0.2}, "near_duplicate": {"radius": 4}}, "curation.select")
    assert config.clip.min == 0.2 and config.near_duplicate.radius == 4 and config.near_duplicate.match == 0.9
    for wrong in ({"clip": {"top_fraction": 1.0, "formula": "published"}}, {"clip": {"top_fraction": 0}}, {"smal": {}}):
        with pytest.raises(UserError):
            parse(SelectConfig, wrong, "curation.select")


# --- on disk -----------------------------------------------------------------------------------------------

@pytest.fixture
def world(tmp_path, monkeypatch):
    return write_world(tmp_path, monkeypatch)


SMALL = {"small": {"min_side": 32}, "language": {"believed_from": 1.0}}


def config(**changes) -> SelectConfig:
    return parse(SelectConfig, SMALL | changes, "curation.select")


def test_the_stage_on_two_pools(world):
    select(*world, config())
    table = {entry["uid"]: entry for entry in shards.read_rows(world[3]).to_pylist()}
    assert list(table) == ["a1", "a2", "a3", "a4", "b1", "b2", "b3"]
    found = {uid: (entry["reason"], entry["other_uid"]) for uid, entry in table.items()}
    assert found["a2"] == ("download:http_404", None) and found["b3"] == ("decode:broken_image", None)
    assert found["a3"] == ("evaluation_overlap", "77")
    kept = (None, None)
    assert {found["a1"], found["b1"]} in ({kept, ("exact_duplicate", twin)} for twin in ("a1", "b1"))
    assert {found["a4"], found["b2"]} in ({kept, ("near_duplicate", twin)} for twin in ("a4", "b2"))
    funnel = json.loads((world[3] / "funnel.json").read_text())
    assert (funnel["rows"], funnel["kept"]) == (7, 2)
    assert funnel["pools"]["b"]["rows"] == 3 and [s["reason"] for s in funnel["steps"]] == list(ORDER)
    assert shards.read_manifest(world[3], "selection")["rows"] == 7


def test_equal_inputs_give_equal_bytes(world, tmp_path):
    select(*world, config())
    select(*world[:3], tmp_path / "again", config())
    assert {p.name: p.read_bytes() for p in world[3].iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()
    }


def test_keeping_nothing_is_said_with_the_counts_and_leaves_evidence(world):
    select(*world, config())
    with pytest.raises(UserError, match=r"no row of 7 kept .*download.* 1 of 7.* small 5 of 5"):
        select(*world, config(small={"min_side": 5000}))
    assert json.loads((world[3] / "funnel.json").read_text())["reasons"]["small"] == 5
    with pytest.raises(UserError, match="incomplete"):
        shards.read_manifest(world[3])


def test_annotations_of_another_pool_are_refused(world):
    write_pool(world[0] / "a", [row("a1", jpeg(picture(1))), row("a9", jpeg(picture(2)))])
    with pytest.raises(UserError, match=r"of 3 rows that are not the 2 downloaded rows of pool a.*rerun `annotate a`"):
        select(*world, config())


def test_missing_inputs_are_named(world, tmp_path):
    with pytest.raises(UserError, match="found no pool"):
        select(tmp_path / "nowhere", *world[1:], config())
    (world[1] / "b" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"annotations/b has no manifest"):
        select(*world, config())


def test_only_the_named_pools_are_selected_from(world):
    select(*world, config(pools=["b"]))
    assert shards.read_rows(world[3])["uid"].to_pylist() == ["b1", "b2", "b3"]
    assert list(shards.read_manifest(world[3])["pools"]) == ["b"]
    with pytest.raises(UserError, match=r"found a, b in .*; expected c"):
        select(*world, config(pools=["b", "c"]))


def test_without_the_rule_no_evaluation_set_is_needed(world, tmp_path):
    order = [name for name in ORDER if name != "evaluation_overlap"]
    select(*world[:2], tmp_path / "nowhere", world[3], config(order=order))
    assert shards.read_manifest(world[3])["kept"] == 3
