"""`evaluate MODEL --task NAME`: any model directory on one task, as a table, by the stage's code."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import transformers

from tests.evaluate.test_tasks import INLINE, write_model, write_packed, write_questions
from tests.models.tiny import make
from vlmpipe.__main__ import main
from vlmpipe.data.task_world import write_tasks
from vlmpipe.errors import UserError
from vlmpipe.evaluate.command import find_model, run, show
from vlmpipe.evaluate.compare import resample
from vlmpipe.evaluate.store import read_scores
from vlmpipe.evaluate.tasks import EvaluateConfig, evaluate
from vlmpipe.models import read_model, save
from vlmpipe.models.parity import random_module

TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}{% endfor %}ASSISTANT:"
)


def write_llava(directory: Path) -> None:
    """A LLaVA as its makers would save it, with a chat template."""
    _config, theirs = random_module("llava", image_token_index=3)
    _, own = make("prefix")
    theirs.resize_token_embeddings(own.vocab_size + 1)
    theirs.save_pretrained(directory)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=own.tokenizer, eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    facts = json.loads((directory / "config.json").read_text())
    mark = tokenizer.convert_tokens_to_ids("<image>")
    (directory / "config.json").write_text(json.dumps({**facts, "image_token_index": mark}))
    pictures = transformers.CLIPImageProcessorPil(size={"height": 20, "width": 20}, do_center_crop=False)
    pictures.save_pretrained(directory)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("command")
    write_questions(root / "questions" / "test")
    write_packed(root / "packed" / "test")
    write_model(root / "ours", "prefix")
    write_llava(root / "theirs")
    return root


def test_the_table_is_of_what_the_stage_scores(place, tmp_path, capsys):
    out = tmp_path / "out"
    typed = ["evaluate", str(place / "ours"), "--task=vqa", "--data", str(place / "questions"), "--out", str(out)]
    assert main([*typed, "--limit", "20", "--batch-size", "8", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    staged, config = tmp_path / "staged", EvaluateConfig(tasks=("vqa",), attention_samples=0, limit=20, batch_size=8)
    paths = {"model": place / "ours", "packed": place / "packed", "questions": place / "questions"}
    evaluate("test", out=staged, metrics=staged / "metrics.json", config=config, cluster=INLINE, **paths)
    for name in ("samples.parquet", "scores.parquet", "metrics.json"):
        assert (out / name).read_bytes() == (staged / name).read_bytes(), name
    found = json.loads((out / "metrics.json").read_text())
    low, high = resample(read_scores(out).scored("vqa.accuracy"), 0).interval()
    row = next(line.split(maxsplit=2) for line in lines if line.startswith("vqa.accuracy "))
    assert row == ["vqa.accuracy", f"{found['metrics']['vqa.accuracy']:.4f}", f"[{low:.4f}, {high:.4f}]  20"]
    assert len(lines) == len(found["metrics"]) + 2 and lines[-1] == f"answers and scores: {out}"


def test_a_hugging_face_directory_is_evaluated_as_it_is(place, tmp_path):
    rows, out = run(str(place / "theirs"), "vqa", place / "questions", limit=12, out=tmp_path)
    found = pq.read_table(out / "samples.parquet").to_pylist()
    assert len(found) == 12
    assert all(row["prediction"] is not None and row["wrong_prediction"] is not None for row in found)
    assert {row.metric for row in rows} >= {"vqa.accuracy", "vqa.accuracy_blind"} and all(row.n <= 12 for row in rows)
    rows, _ = run(str(place / "theirs"), "captioning", place / "packed", out=tmp_path / "captions")
    assert next(row for row in rows if row.metric == "captioning.perplexity").interval is not None
    assert "[" in show(rows).splitlines()[1]


def test_what_does_not_feed_the_model_is_named(place, tmp_path):
    write_llava(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"found no preprocessor_config.json beside the model; expected what feeds it"):
        read_model(tmp_path)
    for file in (*tmp_path.glob("tokenizer*"), *tmp_path.glob("*.jinja")):
        file.unlink()
    with pytest.raises(UserError, match=r"found no tokenizer.json and no preprocessor_config.json"):
        read_model(tmp_path)
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"found no config.json in .*; expected a model directory"):
        read_model(tmp_path)
    random_module("clip_vision_model")[1].save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"found a VisionEncoder alone; expected a model of pictures and words"):
        read_model(tmp_path)


@pytest.mark.parametrize("changes, line", [
    ({"task": "vqv"}, r"--task: found 'vqv'; did you mean 'vqa'\?; expected one of captioning"),
    ({"data": Path("nowhere")}, r"nowhere: found no folder test/; expected one with official files"),
    ({"device": "tpu"}, r"--device: found 'tpu'; expected cpu, cuda or cuda:N"),
    ({"export": ("csv", Path("x"))}, r"--export: found 'csv'; expected one of lmms-eval"),
    ({"task": "text_to_image"}, r"--task: found text_to_image, and no evaluate.finetune.drawing.scorer; expected"),
])
def test_what_was_typed_wrong_is_named(place, changes, line):
    with pytest.raises(UserError, match=line):
        run(**{"model": str(place / "ours"), "task": "vqa", "data": place / "questions", **changes})


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    root = tmp_path_factory.mktemp("classes")
    write_tasks(root, 60, seed=5, size=48, tasks=["classes"])
    save(*make("dual"), root / "model")
    return root


def test_folders_of_classes_are_their_own_pictures(classes, tmp_path):
    rows, _ = run(str(classes / "model"), "classification", classes / "classes", "folders", out=tmp_path)
    named = {row.metric: row for row in rows}
    assert named["classification.accuracy"].n == named["contamination.classification"].n == 12


def test_params_say_how_their_own_data_is_asked(classes, tmp_path, monkeypatch):
    fairness = {"columns": ["size"], "queries": ["a shape"], "k": 4, "minimum": 2}
    monkeypatch.setattr("vlmpipe.compose.read_params", lambda: {
        "root": "unused", "task": {"reader": "folders", "path": str(classes / "classes"), "images": "."},
        "evaluate": {"finetune": {"tasks": ["vqa"], "cost_samples": 4, "fairness": fairness, "limit": 10}},
    })
    named = {row.metric: row for row in run(str(classes / "model"), "fairness", out=tmp_path)[0]}
    assert named["fairness.size.max_skew@4"].n == 10 and "checkpoint.round_trip" not in named
    with pytest.raises(UserError, match=r"and no evaluate.finetune.drawing"):
        run(str(classes / "model"), "text_to_image")


def test_the_champion_is_asked_for_by_that_name(monkeypatch, place):
    monkeypatch.setattr("vlmpipe.publish.champion_model", lambda params: place / "ours")
    monkeypatch.setattr("vlmpipe.compose.read_params", lambda: {})
    assert find_model("champion") == place / "ours" == find_model(str(place / "ours"))
