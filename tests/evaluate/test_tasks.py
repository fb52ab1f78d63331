"""Tasks: the right and the wrong picture reach the model, and the numbers come out right."""

import io
import json
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

from vlmpipe.config import parse
from vlmpipe.dispatch import Cluster
from vlmpipe.errors import UserError
from vlmpipe.evaluate import tasks
from vlmpipe.evaluate.tasks import EvaluateConfig, Sample, evaluate, mismatch, spread
from vlmpipe.models import VLMConfig, build, load, save
from vlmpipe.shards import write_json, write_manifest, write_table, write_tar

INLINE = Cluster(backend="inline", threads=1)
COLORS = {"red": (230, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230), "white": (250, 250, 250)}
TRANSFORMER = {"width": 16, "depth": 1, "heads": 2, "hidden": 32}


def png(color: str, size: int = 32) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (size, size), COLORS[color]).save(data, "png")
    return data.getvalue()


def write_questions(directory, per_color: int = 3) -> None:
    """Pictures of one colour, `per_color` identical ones of each; asked for the colour, and whether it is red."""
    images, questions, annotations = [], [], []
    for image_id, color in enumerate(sorted(COLORS) * per_color):
        images.append((str(image_id), png(color)))
        asked = [("what color is it", "color", color), ("is it red", "presence", "yes" if color == "red" else "no")]
        for question, kind, truth in asked:
            key = {"question_id": len(questions), "image_id": image_id}
            questions.append(key | {"question": question})
            given = [{"answer": truth, "answer_confidence": "yes", "answer_id": i + 1} for i in range(10)]
            annotations.append(
                key | {"question_type": kind, "answer_type": "other", "multiple_choice_answer": truth, "answers": given}
            )
    shards = directory / "images"
    digest = write_tar(shards / "00000.tar", [(f"{uid}.png", data) for uid, data in images])
    write_table(shards / "00000.parquet", pa.table({"uid": [uid for uid, _ in images]}))
    write_manifest(shards, "images", [{"name": "00000", "rows": len(images), "files": {"00000.tar": digest}}])
    write_json(directory / "questions.json", {"questions": questions})
    write_json(directory / "annotations.json", {"annotations": annotations})


def write_packed(directory) -> None:
    rows = [
        {"uid": f"{i:032x}", "caption": f"a {color} square", "image": {"bytes": png(color), "path": None}}
        for i, color in enumerate(COLORS)
    ]
    write_table(directory / "0.parquet", pa.Table.from_pylist(rows))


def write_model(directory, kind: str) -> None:
    vision = {"image_size": 16, "patch_size": 8, "transformer": TRANSFORMER}
    text = {"context": 64, "causal": kind == "prefix", "transformer": TRANSFORMER}
    heads = {"language_model": {}} if kind == "prefix" else {"projection": {"width": 8}}
    shape = {"vision": vision, "text": text, "fusion": {"kind": kind}, "heads": heads, "processor": {"vocab_size": 300}}
    config = parse(VLMConfig, yaml.safe_load(json.dumps(shape)), "test")
    model, processor = build(config, ["what color is it red green blue white yes no a square"], seed=1)
    processor.answers = ("red", "green", "blue", "white", "yes", "no")
    save(model, processor, directory)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("evaluate")
    write_questions(root / "questions" / "test")
    write_packed(root / "packed" / "test")
    write_model(root / "llava", "prefix")
    write_model(root / "clip", "none")
    return root


def run(place, out, model="llava", config=EvaluateConfig(attention_samples=2)):  # noqa: B008
    paths = {"model": place / model, "packed": place / "packed", "questions": place / "questions"}
    evaluate("test", out=out / "evaluation", metrics=out / "metrics.json", config=config, cluster=INLINE, **paths)
    rows = pq.read_table(out / "evaluation" / "samples.parquet").to_pylist()
    return json.loads((out / "metrics.json").read_text()), rows


def see(model, processor, batch, right, wrong, config):
    """An oracle that names the colour in the middle of whatever picture it is shown."""

    def look(picture, question):
        found = min(COLORS, key=lambda name: math.dist(COLORS[name], picture.getpixel((16, 16))))
        return found if question.startswith("what") else ("yes" if found == "red" else "no")

    return [
        {"right": look(a, sample.question), "wrong": look(b, sample.question)}
        for sample, a, b in zip(batch, right, wrong, strict=True)
    ]


def test_a_model_that_looks_is_right_with_the_right_picture_only(place, tmp_path, monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "vqa", replace(tasks.TASKS["vqa"], predict=see))
    config = EvaluateConfig(tasks=("vqa",), chunk=5, batch_size=2, attention_samples=0)
    found, rows = run(place, tmp_path, config=config)
    metrics = found["metrics"]
    assert metrics["vqa.accuracy"] == metrics["vqa.accuracy.color"] == metrics["vqa.accuracy.presence"] == 1.0
    assert metrics["vqa.accuracy_wrong_image.color"] == 0.0
    # One colour of four is red and one is shown red: of four presence answers two go wrong.
    assert metrics["vqa.accuracy_wrong_image.presence"] == 0.5
    assert metrics["vqa.accuracy_wrong_image"] == 0.25
    # Blind: three of twelve colours and nine of twelve presences.
    assert metrics["vqa.accuracy_blind"] == pytest.approx(0.5)
    assert metrics["vqa.gain_over_blind"] == pytest.approx(0.5)
    assert found["n"]["vqa.accuracy"] == 24 and found["n"]["vqa.accuracy.color"] == 12
    assert [row["sample_id"] for row in rows] == [str(i) for i in range(24)]
    assert rows[0]["prediction"] == "blue" == rows[0]["answers"][0] != rows[0]["wrong_prediction"]
    assert dict(rows[0]["slices"]) == {"question_type": "color", "answer_type": "other"}


@pytest.mark.parametrize("model", ["llava", "clip"])
def test_evaluate_is_deterministic_whatever_the_chunks(place, tmp_path, model):
    configs = [EvaluateConfig(attention_samples=3), EvaluateConfig(attention_samples=3, chunk=4)]
    first, again, chunked = (run(place, tmp_path / str(i), model, configs[i // 2]) for i in range(3))
    assert first == again
    files = sorted(path.relative_to(tmp_path / "0") for path in (tmp_path / "0").rglob("*") if path.is_file())
    assert len(files) == 7
    for file in files:
        assert (tmp_path / "0" / file).read_bytes() == (tmp_path / "1" / file).read_bytes(), file
    assert chunked[0]["metrics"] == pytest.approx(first[0]["metrics"], rel=1e-4)
    assert set(first[0]["metrics"]) == set(first[0]["n"])
    rates = {key: value for key, value in first[0]["metrics"].items() if "perplexity" not in key and "gain" not in key}
    assert all(0 <= value <= 1 for value in rates.values())


def test_metric_names_of_both_kinds_of_model(place, tmp_path):
    config = EvaluateConfig(tasks=("captioning",), attention_samples=1)
    lm, rows = run(place, tmp_path / "lm", "llava", config)
    dual, _ = run(place, tmp_path / "dual", "clip", config)
    assert set(lm["metrics"]) == {f"captioning.{x}" for x in ("perplexity", "perplexity_wrong_image", "image_gain")}
    assert {"captioning.recall@1", "captioning.image_to_text@1", "captioning.text_to_image@5"} <= set(dual["metrics"])
    assert dual["details"]["captioning.recall@1"] == {"chance": 0.25}
    assert rows[0]["score"] != rows[0]["wrong_score"]
    ratio = lm["metrics"]["captioning.perplexity_wrong_image"] / lm["metrics"]["captioning.perplexity"]
    assert lm["metrics"]["captioning.image_gain"] == pytest.approx(ratio)


def test_caption_loss_is_the_sum_over_its_own_tokens(place):
    """Against one caption at a time, token by token, with nothing selected or padded."""
    model, processor = load(place / "llava")
    pictures = [Image.new("RGB", (16, 16), COLORS[color]) for color in ("red", "blue")]
    captions = ["a red square", "blue"]
    found = tasks.caption_loss(model, processor, pictures, captions)
    for (nll, tokens), picture, text in zip(found, pictures, captions, strict=True):
        encoded = processor.encode_answer("", text)
        ids = torch.tensor([encoded.ids])
        places = torch.arange(ids.shape[1])[None]
        with torch.no_grad():
            logits = model(processor.images([picture]), ids, torch.ones_like(ids), places).logits
        expected = F.cross_entropy(logits[0, encoded.start - 1 : -1], ids[0, encoded.start :], reduction="sum")
        assert nll == pytest.approx(float(expected), rel=1e-4)
        assert tokens == len(encoded.ids) - encoded.start


def test_attention_maps_lie_over_their_pictures(place, tmp_path):
    run(place, tmp_path)
    files = sorted((tmp_path / "evaluation" / "attention").glob("*.npz"))
    assert [file.name for file in files] == ["vqa-0.npz", "vqa-1.npz"]
    with np.load(files[0]) as arrays:
        assert arrays["map"].sum() == pytest.approx(1, rel=1e-4)
        assert arrays["map"].ndim == 2
        assert tuple(arrays["picture"][16, 16]) == COLORS["blue"]


def test_mismatch_never_pairs_equal_keys_and_is_stable():
    keys = {f"s{i}": f"key {i % 7}" for i in range(49)}
    wrong = mismatch(keys, "pictures")
    assert set(wrong) == set(keys) == set(wrong.values())
    assert all(keys[sample] != keys[other] for sample, other in wrong.items())
    assert wrong == mismatch(keys, "pictures")
    with pytest.raises(UserError, match="1 distinct pictures"):
        mismatch({"a": "x", "b": "x"}, "pictures")


def test_limit_draws_the_same_samples_in_order():
    samples = [Sample(str(i), i, i, "", ()) for i in range(100)]
    drawn = [tasks.choose_samples(samples, EvaluateConfig(limit=10)) for _ in range(2)]
    assert drawn[0] == drawn[1] == sorted(drawn[0], key=lambda sample: sample.image)
    assert len({sample.id for sample in drawn[0]}) == 10


def test_spread_takes_turns_between_question_types():
    samples = [Sample(str(i), i, i, "q", (), {"question_type": "count" if i == 9 else "color"}) for i in range(10)]
    assert [sample.id for sample in spread(samples, 3)] == ["0", "9", "1"]


@pytest.mark.parametrize("ids", [["a", "a"], ["../a"], [""]])
def test_sample_ids_must_name_files(ids):
    samples = [Sample(key, 0, 1, "q", ("a", "a")) for key in ids]
    with pytest.raises(UserError, match="found sample id"):
        tasks.split("vqa", "place", samples, 10)


def test_missing_test_data_and_broken_pictures_name_the_remedy(place, tmp_path):
    config = EvaluateConfig(tasks=("captioning",))
    with pytest.raises(UserError, match="rerun the pack stage"):
        evaluate("x", place / "llava", tmp_path, place / "questions", tmp_path, tmp_path / "m.json", config, INLINE)
    with pytest.raises(UserError, match="'x'; expected a picture that decodes"):
        tasks.decode({"x": b"not a picture"}, "x")
    with pytest.raises(UserError, match="no picture for 'y'"):
        tasks.decode({}, "y")


@pytest.mark.parametrize(
    "bad", [{"tasks": []}, {"tasks": ["vqa", "vqa"]}, {"tasks": ["vqq"]}, {"limit": 0}, {"batch_size": 0}]
)
def test_config_refuses(bad):
    with pytest.raises(UserError):
        parse(EvaluateConfig, bad, "evaluate.finetune")
