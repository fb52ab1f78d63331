"""The champion is scored on the same samples in the same dispatch, and an evaluation that was ended goes on."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.evaluate.test_tasks import INLINE, see, write_model, write_packed, write_questions
from vlmpipe.errors import UserError
from vlmpipe.evaluate import tasks
from vlmpipe.evaluate.compare import compare
from vlmpipe.evaluate.metrics import Detections
from vlmpipe.evaluate.store import CHALLENGER, CHAMPION, read_scores
from vlmpipe.evaluate.tasks import EvaluateConfig, chunks, evaluate, resume

CONFIG = EvaluateConfig(chunk=5, attention_samples=1)
BOTH = {"captioning", "vqa"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("rescore")
    write_questions(root / "questions" / "test")
    write_packed(root / "packed" / "test")
    write_model(root / "llava", "prefix")
    write_model(root / "clip", "none")
    return root


def run(place: Path, out: Path, champion: str | None = "llava", config=CONFIG, **more):
    paths = {"model": place / "llava", "packed": place / "packed", "questions": place / "questions"}
    more["champion"] = ("v1.0.0", place / champion) if champion else None
    evaluate("test", out=out, metrics=out / "metrics.json", config=config, cluster=INLINE, **paths, **more)
    return read_scores(out), json.loads((out / "metrics.json").read_text())


def files_of(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def test_a_champion_that_is_the_challenger_differs_by_nothing(place, tmp_path):
    store, found = run(place, tmp_path / "one")
    assert {metric.partition(".")[0] for metric in store.metrics} == BOTH
    assert set(store.metrics) == set(found["metrics"]) and store.metrics == store.metrics_of(CHAMPION)
    for metric, value in found["metrics"].items():
        assert store.value(metric) == pytest.approx(value, rel=1e-12), metric
        assert len(store.scored(metric).ids) == found["n"][metric]
        difference = compare(store.pair(metric), seed=0, replicates=50)
        assert difference.estimate == 0 and not difference.replicates.any()
    # Twelve pictures of four colours: four clusters, whatever they are called.
    assert len(set(store.pair("vqa.accuracy").clusters_N)) == 4
    assert store.slice_values("vqa.accuracy", "question_type") == ["color", "presence"]
    ours, theirs = (pq.read_table(tmp_path / "one" / name) for name in ("samples.parquet", "champion.parquet"))
    assert ours == theirs and len(set(ours["cluster"].to_pylist())) == 4
    run(place, tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_evaluation_says_what_was_scored_and_how(place, tmp_path):
    store, _ = run(place, tmp_path)
    said = store.evaluation
    assert said["champion"] == store.champion == "v1.0.0" and said["metric_versions"] == {"captioning": 1, "vqa": 1}
    assert said["models"][CHALLENGER] == said["models"][CHAMPION] and said["seed"] == 0 and said["unscored"] == {}
    alone, _ = run(place, tmp_path, champion=None)
    assert alone.champion is None and set(alone.evaluation["models"]) == {CHALLENGER}
    assert not (tmp_path / "champion.parquet").exists() and not alone.metrics_of(CHAMPION)
    assert alone.evaluation["samples_sha256"] == said["samples_sha256"]
    assert alone.evaluation["protocol_sha256"] == said["protocol_sha256"]
    other, _ = run(place, tmp_path, champion=None, config=replace(CONFIG, answer_tokens=2, limit=10))
    assert other.evaluation["samples_sha256"] != said["samples_sha256"]
    assert other.evaluation["protocol_sha256"] != said["protocol_sha256"]


def test_a_champion_that_cannot_do_a_task_is_said_and_does_not_end_the_evaluation(place, tmp_path, monkeypatch):
    def only_challenger(model, *rest):
        if model.language_model is None:
            raise UserError("found a model without words; expected words; choose another")
        return see(model, *rest)

    monkeypatch.setitem(tasks.TASKS, "vqa", replace(tasks.TASKS["vqa"], predict=only_challenger))
    store, _ = run(place, tmp_path, "clip", replace(CONFIG, tasks=("vqa",)))
    assert store.evaluation["unscored"]["vqa"].startswith("found a model without words")
    assert store.value("vqa.accuracy") == 1
    with pytest.raises(UserError, match=r"no scores of the champion for 'vqa.accuracy'"):
        store.pair("vqa.accuracy")


def test_an_evaluation_that_was_ended_goes_on(place, tmp_path, monkeypatch):
    run(place, tmp_path / "whole")
    asked = []
    predict = chunks.predict

    def counted(chunk, *rest):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append(chunk.name)
        return predict(chunk, *rest)

    monkeypatch.setattr(chunks, "predict", counted)
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "again", state=tmp_path / "state")
    assert len(list((tmp_path / "state/chunks").iterdir())) == 4
    monkeypatch.setattr(chunks, "predict", predict)
    monkeypatch.setattr(chunks, "read_rows", lambda *key: asked.append(resume.read_rows(*key)) or asked[-1])
    run(place, tmp_path / "again", state=tmp_path / "state")
    # Of twelve chunks two are left; the six of the champion are the challenger's: the models have the same files.
    assert sum(isinstance(one, list) for one in asked) == 10
    assert files_of(tmp_path / "whole") == files_of(tmp_path / "again") and not any((tmp_path / "state").iterdir())


def test_rows_come_back_as_they_were(tmp_path):
    found = Detections(np.ones((2, 4), np.float32), np.array([0.5, 0.25]), ("cat", "dog"))
    row = {"a": None, "b": (1.5, "x"), "mask": np.eye(3, dtype=bool), "scalar": np.float32(0.1), "right": found, "n": 2}
    resume.write_rows(tmp_path, "k", [row])
    (again,) = resume.read_rows(tmp_path, "k")
    assert resume.fingerprint(again) == resume.fingerprint(row) and again["b"] == (1.5, "x") and again["a"] is None
    assert again["mask"].dtype == bool and again["mask"].shape == (3, 3) and again["scalar"].dtype == np.float32
    assert again["right"].labels == ("cat", "dog") and resume.read_rows(tmp_path, "other") is None
