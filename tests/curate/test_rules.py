"""The rules that any column, list or quota can make, and what is refused before anything is read."""

import numpy as np
import pyarrow as pa
import pytest

from tests.curate.made_pools import made_rows
from vlmpipe.config import parse
from vlmpipe.curate.columns import domain, hash_bytes, hash_texts
from vlmpipe.curate.filters import SelectConfig, decide
from vlmpipe.errors import UserError

OPEN = ("downloaded", "decoded")


def judged(rows, **rules) -> tuple[list[dict], list[dict]]:
    config = parse(SelectConfig, {"order": [*OPEN, *rules], "rules": rules}, "select")
    decisions, steps = decide(rows, config.ordered())
    decisions.funnel(steps)
    return pa.concat_tables(decisions.tables()).to_pylist(), steps


def reasons(rows, **rules) -> list[str | None]:
    return [row["reason"] for row in judged(rows, **rules)[0]]


def test_a_number_has_both_ends_and_its_absence_is_a_reason_of_its_own():
    rows = made_rows(5, sharpness=[4.9, 5.0, 90.0, None, np.nan])
    bounds = {"column": "sharpness", "min": 5, "max": 80}
    table, _ = judged(rows, sharp=bounds)
    assert [row["reason"] for row in table] == ["sharp", None, "sharp", "sharp:missing", "sharp:missing"]
    assert [row["threshold"] for row in table] == [5, None, 80, None, None] and table[0]["value"] == 4.9
    assert reasons(rows, sharp=bounds | {"missing": "keep"})[3:] == [None, None]


def test_texts_are_one_of_or_none_of():
    rows = made_rows(4, boilerplate=["stock", "menu", None, "date"])
    one = {"column": "boilerplate", "one_of": ["stock", "date"], "none_of": ["date"]}
    assert reasons(rows, b=one) == [None, "b", "b:missing", "b"]
    assert reasons(rows, b={"column": "boilerplate", "none_of": ["menu"], "missing": "keep"}) == [None, "b", None, None]


def test_nothing_found_can_be_what_is_wanted():
    rows = made_rows(3, pii=["email", None, None])
    assert reasons(rows, p={"column": "pii", "null": True}) == ["p", None, None]
    assert reasons(rows, p={"column": "pii", "null": False}) == [None, "p:missing", "p:missing"]


def test_flags_are_numbers():
    rows = made_rows(3, uniform=[True, False, None])
    assert reasons(rows, u={"column": "uniform", "max": 0}) == ["u", None, "u:missing"]


def test_the_funnel_says_what_each_rule_drops_alone_and_what_only_it_drops():
    rows = made_rows(6, a=[0, 0, 1, 1, 1, 1], b=[0, 1, 0, 1, 1, 1], sha256=["x"] * 6)
    _, steps = judged(rows, low_a={"column": "a", "min": 1}, low_b={"column": "b", "min": 1},
                      twins={"kind": "exact_duplicate"})
    found = {step["reason"]: (step["rows_in"], step["dropped"], step["alone"], step["unique"]) for step in steps[2:]}
    assert found == {"low_a": (6, 2, 2, 1), "low_b": (4, 1, 2, 1), "twins": (3, 2, None, None)}


def test_a_quota_keeps_the_best_of_each_value():
    rows = made_rows(7, language=["en"] * 4 + ["de"] * 2 + [None], clip_score=[0.1, 0.4, 0.3, 0.2, 0.1, 0.2, 0.9])
    table, _ = judged(rows, q={"kind": "quota", "column": "language", "max": {"en": 2}, "default": 1})
    assert [row["kept"] for row in table] == [False, True, True, False, False, True, False]
    assert table[6]["reason"] == "q:missing" and (table[0]["value"], table[0]["threshold"]) == (4, 2)
    half, _ = judged(rows, q={"kind": "quota", "column": "language", "share": 0.3, "missing": "keep"})
    assert [row["kept"] for row in half] == [False, True, True, False, True, True, True]


def test_a_random_quota_is_the_same_every_time():
    rows = made_rows(50, language=["en"] * 50)
    quota = {"kind": "quota", "column": "language", "default": 20, "choose": "random"}
    first, again, other = (reasons(rows, q=quota | {"seed": seed}) for seed in (0, 0, 1))
    assert first == again != other and first.count(None) == other.count(None) == 20


def test_quota_by_domain():
    urls = ["http://www.a.test/1", "https://A.test:80/2", "http://b.test/x", "nonsense"]
    found = reasons(made_rows(4, url=urls), q={"kind": "quota", "column": "domain", "default": 1})
    assert found == [None, "q", None, "q:missing"]
    assert [domain(url) for url in (None, "http://[", "http://www.x.org/a")] == [None, None, "x.org"]


def test_opt_outs_by_uid_and_by_domain_with_those_below(tmp_path):
    (tmp_path / "uids.txt").write_text("# taken out\nu1\n\n")
    (tmp_path / "hosts.txt").write_text("Example.test  # all of it\n")
    urls = ["http://img.example.test/1", "http://ok.test/2", "http://notexample.test/3", "http://www.example.test/4"]
    lists = {"kind": "opt_out", "uids": str(tmp_path / "uids.txt"), "domains": str(tmp_path / "hosts.txt")}
    assert reasons(made_rows(4, url=urls), o=lists) == ["o:domain", "o:uid", None, "o:domain"]
    with pytest.raises(UserError, match=r"can't read the list .*nowhere"):
        reasons(made_rows(1), o={"kind": "opt_out", "uids": str(tmp_path / "nowhere")})


def test_exact_duplicates_by_any_digest():
    pixels = pa.array([b"a" * 16, b"b" * 16, b"a" * 16, None], pa.binary(16))
    table, _ = judged(made_rows(4, pixel_hash=pixels), e={"kind": "exact_duplicate", "column": "pixel_hash"})
    assert [row["other_uid"] for row in table] == [None, None, "u0", None]


def test_digests_that_only_begin_alike_are_no_duplicates():
    """Rows are put in order by the whole key; its first half only says which ones can have a twin."""
    digests = ["a" * 16 + "b" * 48, "a" * 16 + "c" * 48, "d" * 64, "a" * 16 + "b" * 48, "a" * 16 + "c" * 48, None]
    scores = [0.1, 0.3, 0.2, 0.2, 0.3, 0.9]
    table, _ = judged(made_rows(6, sha256=digests, clip_score=scores), e={"kind": "exact_duplicate"})
    assert [row["other_uid"] for row in table] == ["u3", None, None, None, "u1", None]


def test_digests_become_their_first_128_bits_and_other_texts_a_hash():
    hexes = ["00" * 31 + "ff", "0123456789abcdef" * 4, "short", "Z" * 64, ""]
    found = hash_texts(pa.chunked_array([pa.array(hexes[:2]), pa.array(hexes[2:])]))
    assert found[1].tolist() == [0x0123456789ABCDEF] * 2 and found[0].tolist() == [0, 0]
    assert len(np.unique(found, axis=0)) == 5
    raw = pa.chunked_array([pa.array([bytes(range(16)), None], pa.binary(16))])
    assert hash_bytes(raw).tolist() == [[0x0001020304050607, 0x08090A0B0C0D0E0F], [0, 0]]


@pytest.mark.parametrize("column,hint", [
    ("sharpnes", "did you mean 'sharpness'"), ("masked_clip_score", "tmars"), ("probe_nsfw", "probes: {nsfw"),
    ("price", "columns.extra"),
])
def test_a_column_that_is_not_there_is_named_with_what_makes_it(column, hint):
    with pytest.raises(UserError, match=f"no column '{column}'.*{hint}"):
        judged(made_rows(1, sharpness=[1.0]), r={"column": column, "min": 1})


@pytest.mark.parametrize("rule,message", [
    ({"column": "x"}, "expected one: min"), ({"column": "x", "min": 1, "null": True}, "found 2 kinds"),
    ({"kind": "colum", "column": "x"}, "did you mean 'column'"), ({"kind": "opt_out"}, "found no list"),
    ({"kind": "quota", "column": "x"}, "without a limit"), ({"column": "x", "mni": 1}, "unknown key 'mni'"),
    ({"kind": "score", "column": "x", "top_fraction": 1.5}, "top_fraction 1.5"), (3, "expected a mapping"),
    ({"kind": "semantic_duplicate", "eps": 3}, "found eps"), ({"kind": "image_clusters"}, "missing key 'reference'"),
    ({"kind": "evaluation_embedding", "references": []}, "no references"),
])
def test_wrong_settings_are_refused_with_the_rule_named(rule, message):
    with pytest.raises(UserError, match=rf"select: rules\.r: .*{message}"):
        parse(SelectConfig, {"rules": {"r": rule}}, "select")


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(UserError, match="rule 'clip' twice"):
        parse(SelectConfig, {"rules": {"clip": {"column": "x", "min": 1}}}, "select")


def test_text_where_a_number_is_asked_is_refused():
    with pytest.raises(UserError, match="column 'language' of type string; expected numbers"):
        judged(made_rows(2), r={"column": "language", "min": 1})
