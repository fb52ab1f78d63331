"""Groups that are shown first, associated or served differently: planted, and found as planted."""

import json
import math

import numpy as np
import pytest

from tests.models import tiny
from vlmpipe.config import parse, to_dict
from vlmpipe.data.task import TaskConfig
from vlmpipe.data.task_world import write_tasks
from vlmpipe.dispatch import Cluster
from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import association, ndkl, worst_group
from vlmpipe.evaluate.tasks import EvaluateConfig, Sample, Scores, evaluate
from vlmpipe.evaluate.tasks.base import means
from vlmpipe.evaluate.tasks.fairness import (
    group_gaps,
    predict_fairness,
    read_grouped,
    score_fairness,
    with_groups,
)
from vlmpipe.evaluate.tasks.options import Association, FairnessConfig
from vlmpipe.evaluate.tasks.pairs import pair_scores
from vlmpipe.models import save

SIDE = Association("group", "a", "b", ("near", "close"), ("far",))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("groups")
    write_tasks(root, 100, seed=5, size=48, tasks=["classes"])
    return root / "classes"


def asked(**values) -> FairnessConfig:
    return FairnessConfig(**{"queries": ("one", "two"), "k": 10, "minimum": 5, **values})


def rows_of(samples, config, queries, leaning=None):
    return [
        {"queries": list(values), "leaning": {"side": lean} if leaning is not None else {}, "asked": to_dict(config)}
        for values, lean in zip(queries, leaning if leaning is not None else [0.0] * len(samples), strict=True)
    ]


def samples_of(*groups):
    return [Sample(f"s{at}", f"{at}.jpg", (), "", ("",), {"group": group}) for at, group in enumerate(groups)]


def test_a_ranking_that_shows_one_group_first_has_the_skew_of_its_share():
    samples = samples_of(*["a"] * 10, *["b"] * 30)
    # The first query shows all of "a" first, the second takes turns by share.
    first, fair = range(40, 0, -1), [0.0] * 40
    for place in range(10):
        fair[place] = 37 - 4 * place
        for step in range(3):
            fair[10 + 3 * place + step] = 40 - 4 * place - step
    found = score_fairness(samples, rows_of(samples, asked(), zip(first, fair, strict=True)))
    told = found.details["group"]["queries"]
    assert told["one"]["max_skew@10"] == pytest.approx(math.log(4)) and told["one"]["skew"]["b"] is None
    assert told["two"]["max_skew@10"] == pytest.approx(math.log(8 / 10 / 0.75))
    assert told["one"]["ndkl"] == ndkl(["a"] * 10 + ["b"] * 30, {"a": 0.25, "b": 0.75}).value
    mean = (told["one"]["ndkl"] + told["two"]["ndkl"]) / 2
    assert found.metrics["group.ndkl"] == pytest.approx(mean) and found.n["group.ndkl"] == 40
    assert told["two"]["ndkl"] < found.metrics["group.ndkl_blind"] < told["one"]["ndkl"]
    assert 0 < found.metrics["group.max_skew@10_blind"] < math.log(4)
    json.dumps(found.details, allow_nan=False)


def test_ties_are_ranked_by_lot_and_not_as_the_table_stands():
    samples = samples_of(*["a"] * 100, *["b"] * 300)
    found = score_fairness(samples, rows_of(samples, asked(k=100), [(0.5, 0.5)] * 400))
    told = found.details["group"]["queries"]
    assert found.metrics["group.max_skew@100"] < 0.4 < math.log(4)  # what the table's order would give
    assert found.metrics["group.ndkl"] == pytest.approx(found.metrics["group.ndkl_blind"], rel=1)
    assert told["one"] != told["two"]  # a lot for each query
    assert found.metrics == score_fairness(samples, rows_of(samples, asked(k=100), [(0.5, 0.5)] * 400)).metrics


def test_groups_that_are_too_small_are_named_and_not_ranked():
    samples = samples_of(*["a"] * 10, *["b"] * 10, "c")
    found = score_fairness(samples, rows_of(samples, asked(), [(0.0, 1.0)] * 21))
    other = [Sample(one.id, one.image, (), "", ("",), {"group": one.slices["group"], "kind": "x"}) for one in samples]
    told = score_fairness(other, rows_of(samples, asked(), [(0.0, 1.0)] * 21))
    assert "of 'kind'" in told.details["kind"]["unknown"] and set(told.metrics) == set(found.metrics)
    assert found.details["group"]["small"] == ["c"] and found.n["group.max_skew@10"] == 20
    for config in (asked(minimum=11), asked(k=20)):
        with pytest.raises(UserError, match="of 'group'; expected two groups"):
            score_fairness(samples, rows_of(samples, config, [(0.0, 1.0)] * 21))


def test_an_association_is_that_of_the_leanings_of_its_two_groups():
    random = np.random.default_rng(0)
    samples = samples_of(*["a"] * 8, *["b"] * 8, *["c"] * 8)
    leaning = [*random.normal(1, 1, 8), *random.normal(0, 1, 8), *[9.0] * 8]
    config = asked(associations={"side": SIDE})
    found = score_fairness(samples, rows_of(samples, config, [(0.0, 1.0)] * 24, leaning))
    expected = association(dict(enumerate(leaning[:8])), dict(enumerate(leaning[8:16])))
    assert found.metrics["association.side.effect"] == expected.value
    assert found.metrics["association.side.p"] == expected.details["p"] and found.n["association.side.p"] == 16


def test_pictures_are_scored_by_the_queries_and_lean_by_the_mean_of_either_list():
    model, processor = tiny.make("dual")
    samples, seen = samples_of("a", "b", "c"), tiny.pictures(3)
    config = EvaluateConfig(fairness=asked(associations={"side": SIDE}))
    rows = predict_fairness(model, processor, samples, seen, [()] * 3, config)
    scores = pair_scores(model, processor, seen, [["one", "two", "near", "close", "far"]] * 3)
    for row, values in zip(rows, scores, strict=True):
        assert row["queries"] == pytest.approx(values[:2])
    assert rows[1]["leaning"]["side"] == pytest.approx(sum(scores[1][2:4]) / 2 - scores[1][4], abs=1e-6)
    assert rows[2]["leaning"] == {}
    assert parse(FairnessConfig, rows[0]["asked"], "fairness") == config.fairness


def test_the_gap_of_any_task_is_that_of_its_first_metric():
    samples = samples_of(*["a"] * 40, *["b"] * 40)
    hits = {sample.id: float(at < 35 or at % 2) for at, sample in enumerate(samples)}
    scores = Scores.of({"accuracy": means(hits), "other": means(dict.fromkeys(hits, 0.0))}, {})
    clusters = {sample.id: sample.image for sample in samples}
    found = group_gaps("vqa", samples, scores, clusters, FairnessConfig(columns=("group", "nothing")))
    groups = {sample.id: sample.slices["group"] for sample in samples}
    expected = worst_group(hits, groups, 30, clusters)
    assert found["metrics"]["fairness.vqa.group.worst"] == expected.value == 0.5
    assert found["metrics"]["fairness.vqa.group.gap_low"] == expected.details["gap_low"] > 0
    assert found["n"]["fairness.vqa.group.gap"] == 80 and set(found["n"]) == set(found["metrics"])
    assert found["details"]["fairness.vqa.group"]["metric"] == "accuracy"
    assert "no samples" in found["details"]["fairness.vqa.nothing"]["unknown"]
    assert group_gaps("x", samples, Scores({}, {}, {}), clusters, FairnessConfig(columns=("group",)))["metrics"] == {}


def test_samples_of_several_pictures_are_of_the_groups_that_all_share(tmp_path):
    (tmp_path / "groups.csv").write_text("file,size,place\na.jpg,small,left\nb.jpg,small,right\n")
    samples = [Sample("1", ("a.jpg", "b.jpg"), (), "", ()), Sample("2", "b.jpg", (), "", (), {"kind": "x"}),
               Sample("3", "c.jpg", (), "", ()), Sample("4", ("train/a.jpg", "train/c.jpg", "b.jpg"), (), "", ())]
    found = [sample.slices for sample in with_groups(samples, tmp_path)]
    of_b = {"size": "small", "place": "right"}
    assert found == [{"size": "small"}, {"kind": "x", **of_b}, {}, of_b]  # examples are of no group


def test_the_world_has_groups_and_an_evaluation_tells_them(world, tmp_path):
    samples = read_grouped(world / "test", TaskConfig("folders", images="."))
    assert len(samples) == 20 and {sample.slices["size"] for sample in samples} == {"small", "large"}
    save(*tiny.make("dual"), tmp_path / "model")
    config = EvaluateConfig(
        tasks=("classification", "fairness"), attention_samples=1,
        fairness=FairnessConfig(("size",), ("a shape",), 4, minimum=3),
    )
    evaluate(
        "test", tmp_path / "model", tmp_path, world, tmp_path / "out", tmp_path / "metrics.json", config,
        Cluster(backend="inline", threads=1), TaskConfig("folders", images="."),
    )
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert {"fairness.size.max_skew@4", "fairness.size.ndkl", "fairness.size.ndkl_blind"} <= set(found["metrics"])
    worst, gap = (found["metrics"][f"fairness.classification.size.{end}"] for end in ("worst", "gap"))
    groups = found["details"]["fairness.classification.size"]["groups"]
    assert worst == min(group["value"] for group in groups.values())
    assert gap == max(group["value"] for group in groups.values()) - worst


def test_no_table_is_said(tmp_path):
    with pytest.raises(UserError, match=r"no groups\.csv"):
        read_grouped(tmp_path, TaskConfig())


@pytest.mark.parametrize(
    "bad", [{"queries": ()}, {"queries": (" ",)}, {"k": 0}, {"minimum": 1}, {"permutations": 0}]
)
def test_the_config_refuses(bad):
    with pytest.raises(UserError):
        FairnessConfig(**bad)
    with pytest.raises(UserError, match="two groups"):
        Association("size", "small", "small", ("x",), ("y",))
