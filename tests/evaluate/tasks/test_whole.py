"""Retrieval, matching, drawing and groups through a whole evaluation: whatever the chunks, and made anew from the
store."""

import json

import pytest

from tests.evaluate.test_tasks import write_packed
from tests.models import joined, tiny
from tests.models.fusion.small import make_small
from vlmpipe.data.task import TaskConfig
from vlmpipe.data.task_world import write_tasks
from vlmpipe.dispatch import Cluster
from vlmpipe.evaluate.store import read_scores
from vlmpipe.evaluate.tasks import EvaluateConfig, evaluate
from vlmpipe.evaluate.tasks.options import DrawingConfig
from vlmpipe.models import save

INLINE = Cluster(backend="inline", threads=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    write_tasks(root, 40, seed=6, size=48, tasks=["captions"])
    write_packed(root / "packed" / "test")
    save(*tiny.make("dual"), root / "dual")
    save(*joined.make("single_stream"), root / "joined")
    save(*make_small("text-to-image"), root / "draws")
    return root


def run(place, out, model, config, **more):
    evaluate(
        "test", place / model, place / "packed", place / "captions", out, out / "metrics.json", config, INLINE,
        TaskConfig("coco_captions"), **more,
    )
    return json.loads((out / "metrics.json").read_text())


def same(found, other):
    assert set(found["metrics"]) == set(other["metrics"]) == set(found["n"])
    assert found["metrics"] == pytest.approx(other["metrics"], rel=1e-4)


def check_store(out, found):
    store = read_scores(out)
    assert len(store.metrics) > 4
    for metric in store.metrics:
        assert store.value(metric) == pytest.approx(found["metrics"][metric], rel=1e-9)


def test_a_dual_encoder_finds_the_same_whatever_the_chunks_and_after_a_stop(place, tmp_path):
    config = EvaluateConfig(("retrieval",), attention_samples=1)
    found = run(place, tmp_path / "a", "dual", config, champion=("v1", place / "dual"), state=tmp_path / "state")
    chunked = run(place, tmp_path / "b", "dual", EvaluateConfig(("retrieval",), chunk=3, attention_samples=0))
    same(found, chunked)
    check_store(tmp_path / "a", found)
    pair = read_scores(tmp_path / "a").pair("retrieval.recall@1")
    assert (pair.challenger_NM == pair.champion_NM).all() and len(pair.ids) == 8


def test_a_model_that_matches_is_asked_for_both(place, tmp_path):
    tasks = ("retrieval", "matching")
    found = run(place, tmp_path / "a", "joined", EvaluateConfig(tasks, attention_samples=0, limit=6))
    chunked = run(place, tmp_path / "b", "joined", EvaluateConfig(tasks, chunk=2, attention_samples=0, limit=6))
    same(found, chunked)
    check_store(tmp_path / "a", found)
    assert found["n"]["matching.auc"] == 6 == found["n"]["retrieval.recall@1"]


def test_pictures_are_drawn_the_same_whatever_the_chunks(place, tmp_path):
    drawing = DrawingConfig(str(place / "dual"))
    config, chunked = (
        EvaluateConfig(("text_to_image",), chunk=size, attention_samples=0, drawing=drawing, limit=3) for size in (9, 2)
    )
    found = run(place, tmp_path / "a", "draws", config)
    same(found, run(place, tmp_path / "b", "draws", chunked))
    check_store(tmp_path / "a", found)
    assert found["n"]["text_to_image.fid"] == 3 and not found["details"]["text_to_image.fid"]["full_rank"]
