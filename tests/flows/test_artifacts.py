import base64
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flows import artifacts
from flows.artifacts import cell, expectations_text, samples_text, show, slug, verdict_text
from vlmpipe.errors import GateFailed
from vlmpipe.evaluate import tasks
from vlmpipe.evaluate.gate import GateConfig, Rule, gate
from vlmpipe.evaluate.waivers import Waiver, add_waivers, today

PARAMS = {"profile": "toy", "root": "data/toy", "results": "results/toy"}


@pytest.fixture
def made(monkeypatch) -> dict:
    """Artifacts by key instead of a server."""
    found = {}
    monkeypatch.setattr(artifacts, "create_table_artifact", lambda table, key, **_: found.update({key: table}))
    monkeypatch.setattr(artifacts, "create_markdown_artifact", lambda text, key, **_: found.update({key: text}))
    monkeypatch.setattr(artifacts, "create_link_artifact", lambda link, key, **_: found.update({key: link}))
    return found


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def test_what_is_missing_is_skipped(tmp_path, made):
    for stage in ("select", "audit", "evaluate_finetune", "gate_data", "report", "download@one", "unheard_of"):
        show(stage, tmp_path, PARAMS)
    assert made == {}


def test_each_stage_shows_its_files(tmp_path, made):
    data, results = tmp_path / "data/toy", tmp_path / "results/toy"
    write(data / "selection/funnel.json", {"steps": [{"reason": "too_small", "dropped": 3, "nested": [1]}]})
    group = {"group": "nurse", "rows": 10, "retention": 0.5, "reasons": [{"reason": "x"}]}
    write(data / "audit/bias.json", {"groupings": {"professions": {"groups": [group]}}})
    record = {"suite": "pools", "success": False, "message": "success_rate 0.2 is below 0.5"}
    write(data / "audit/expectations.json", [record, {"suite": "pools", "success": True, "message": None}])
    write(data / "audit/data_docs/index.html", "")
    write(results / "metrics/finetune.json", {"metrics": {"vqa.accuracy": 0.9}, "n": {"vqa.accuracy": 300}})
    write(data / "report/index.html", "")
    for stage in ("select", "audit", "evaluate_finetune", "report"):
        show(stage, tmp_path, PARAMS)
    assert made["toy-funnel"] == [{"reason": "too_small", "dropped": 3}]
    assert made["toy-bias"] == [{"grouping": "professions", "group": "nurse", "rows": 10, "retention": 0.5}]
    assert "1 of 2 expectations hold" in made["toy-expectations"]
    assert (data / "audit/data_docs/index.html").as_uri() in made["toy-expectations"]
    assert made["toy-metrics-finetune"] == [{"metric": "vqa.accuracy", "value": 0.9, "n": 300}]
    assert made["toy-report"] == (data / "report/index.html").as_uri()


def test_a_verdict_shows_every_number(tmp_path, made):
    write(tmp_path / "m.json", {"metrics": {"vqa.accuracy": 0.7, "vqa.wrong": 0.1}, "n": {"vqa.accuracy": 300}})
    rules = {"a": Rule("vqa.accuracy", min=0.85), "b": Rule("vqa.wrong", max=0.5)}
    path = tmp_path / "results/toy/gates/finetune/verdict.json"
    with pytest.raises(GateFailed):
        gate("finetune", [tmp_path / "m.json"], None, path, GateConfig(rules))
    show("gate_finetune", tmp_path, PARAMS)
    text = made["toy-gate-finetune"]
    assert text == verdict_text(json.loads(path.read_text()))
    assert text.startswith("## finetune: FAIL\n\n- **vqa.accuracy 0.7 is below the floor 0.85 (n 300)**")
    assert "| **FAIL** | vqa.accuracy |  | min | 0.7 | 0.85 |  |  | 300 |" in text
    assert "| PASS | vqa.wrong |  | max | 0.1 | 0.5 |" in text

    waivers = tmp_path / "waivers.yaml"
    add_waivers(waivers, [Waiver("a", "Ada", "the lamp was | broken", today().isoformat())])
    gate("finetune", [tmp_path / "m.json"], None, path, GateConfig(rules), waivers=waivers)
    text = verdict_text(json.loads(path.read_text()))
    assert text.startswith(f"## finetune: PASS\n\n- 'a' waived by Ada until {today()}: the lamp was \\| broken")
    assert "| **FAIL** (waived) | vqa.accuracy |" in text


def test_samples_carry_their_pictures(tmp_path):
    row = {"task": "vqa", "sample_id": "7/a", "question": "what | colour?", "prediction": "red", "answers": ["red"] * 3}
    rows = [row | {"score": 1.0}, row | {"sample_id": "8", "score": 0.0}]  # the second has no picture
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "samples.parquet")
    (tmp_path / "attention").mkdir()
    picture = np.zeros((300, 200, 3), np.uint8)
    picture[..., 0] = 255
    np.savez(tmp_path / "attention/vqa-7_a.npz", picture=picture, map=np.zeros((2, 2)))
    text = samples_text(tmp_path)
    [line] = text.splitlines()[2:]
    assert line.endswith(r"| what \| colour? | red | red | 1 |")
    encoded = line.partition("base64,")[2].partition(")")[0]
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert max(image.size) == artifacts.PICTURE_PX and image.getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize("sample_id", ["42", "7/a", "What colour?", "…"])
def test_samples_are_named_as_evaluate_names_them(sample_id):
    assert slug(sample_id) == tasks.slug(sample_id)


def test_text_from_the_web_stays_in_its_cell():
    assert cell("a|b\n<script>`x` [y](z) ![i](u)") == r"a\|b &lt;script&gt;\`x\` \[y\](z) \!\[i\](u)"
    assert cell(None) == "" and cell(0.123456) == "0.1235"


def test_expectations_without_docs_have_no_link(tmp_path):
    assert "Data Docs" not in expectations_text([], tmp_path / "data_docs/index.html")


def test_a_broken_file_does_not_fail_the_stage(tmp_path, made, monkeypatch):
    warned = []
    logger = type("Logger", (), {"warning": lambda self, *arguments, **options: warned.append(arguments)})()
    monkeypatch.setattr(artifacts, "get_run_logger", lambda: logger)
    write(tmp_path / "data/toy/audit/bias.json", ["unexpected"])
    show("audit", tmp_path, PARAMS)
    assert made == {} and warned[0][1] == "audit"
