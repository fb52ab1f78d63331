"""An evaluation in lmms-eval's files."""

import hashlib
import json
from types import SimpleNamespace

import pytest

from tests.evaluate.test_command import place  # noqa: F401
from vlmpipe.evaluate.command import run
from vlmpipe.evaluate.compare import resample
from vlmpipe.evaluate.lmms_files import results as written_results
from vlmpipe.evaluate.lmms_files import sanitized, write_lmms
from vlmpipe.evaluate.store import read_scores


@pytest.fixture
def written(place, tmp_path):  # noqa: F811
    """(the samples, the results, the evaluation's folder)."""
    run(str(place / "ours"), "vqa", place / "questions", out=tmp_path / "out", export=("lmms-eval", tmp_path / "x"))
    lines, facts = write_lmms(tmp_path / "out", tmp_path / "again", "lab/models/mine", "vqa", "20250131_235959")
    assert lines.relative_to(tmp_path).as_posix() == "again/models__mine/20250131_235959_samples_vqa.jsonl"
    assert len(list((tmp_path / "x").glob("*/*_samples_vqa.jsonl"))) == 1
    samples = [json.loads(line) for line in lines.read_text().splitlines()]
    return samples, json.loads(facts.read_text()), tmp_path / "out"


def test_each_sample_is_a_line_with_its_numbers(written):
    samples, results, out = written
    values = read_scores(out).values("vqa.accuracy")
    assert [sample["doc_id"] for sample in samples] == list(range(24)) and len(values) == 24
    assert [sample["score"] for sample in samples] == [values[str(number)] for number in range(24)]
    assert samples[0]["input"] == "what color is it" and samples[0]["target"] == "blue"
    assert "accuracy.color" in samples[0] and "accuracy.color" not in samples[1]
    assert not {"resps", "doc", "arguments"} & set(samples[0])
    chained = "".join(f"sample_{number}{sample['doc_hash']}" for number, sample in enumerate(samples))
    assert results["task_hashes"] == {"vqa": hashlib.sha256(chained.encode()).hexdigest()}
    doc = {"question_id": "0", "image_id": "0", "question": "what color is it", "answers": ["blue"] * 10}
    text = json.dumps(doc, indent=2, ensure_ascii=False)
    assert samples[0]["doc_hash"] == hashlib.sha256(text.encode()).hexdigest()


def test_results_have_values_errors_and_directions(written):
    _, results, out = written
    found = json.loads((out / "metrics.json").read_text())["metrics"]
    numbers = results["results"]["vqa"]
    for metric in ("accuracy", "accuracy_wrong_image"):
        error = resample(read_scores(out).scored(f"vqa.{metric}"), 0).standard_error
        assert numbers[f"{metric},none"] == found[f"vqa.{metric}"] and numbers[f"{metric}_stderr,none"] == error
    assert numbers["samples"] == 24 and results["n-samples"] == {"vqa": {"original": 24, "effective": 24}}
    assert results["higher_is_better"]["vqa"]["accuracy"] and results["configs"]["vqa"]["score_key"] == "score"
    assert not results["higher_is_better"]["vqa"]["accuracy_wrong_image"]
    assert (results["model_name"], results["model_name_sanitized"]) == ("lab/models/mine", "models__mine")


@pytest.mark.parametrize("task, shots", [("few_shot", 10), ("vqa", 0)])
def test_the_examples_before_a_question_are_counted(task, shots):
    found = {f"{task}.{name}": 0.5 for name in ("accuracy", "accuracy.k0", "accuracy.k2", "accuracy.k10", "gain")}
    store = SimpleNamespace(metrics=(), evaluation={"metric_versions": {task: 1}})
    results = written_results(store, {"metrics": found}, task, 3)
    assert results["n-shot"] == {task: shots} and results["configs"][task]["num_fewshot"] == shots


def test_a_folder_has_one_name():
    assert sanitized("champion") == "champion" and sanitized("/data/models/finetune/") == "models__finetune"
