"""The page of the zoo says what was measured, and what was not."""

from dataclasses import replace

import pytest
from PIL import Image

from benchmarks.zoo import done_before, read_rows, small_presets
from benchmarks.zoo_page import LARGEST, Row, rows_of, save, sheet, spread, write_page
from tests.models.tiny import PRESETS, TEXTS
from vlmpipe.config import parse
from vlmpipe.errors import UserError
from vlmpipe.evaluate.tasks import Sample
from vlmpipe.models import build
from vlmpipe.models import save as save_model
from vlmpipe.models.vlm import VLMConfig
from vlmpipe.shards import write_json

ROW = Row("clip", "finetune", 1_500_000, "vqa", "accuracy", 0.5, 0.25, 0.3, 600, 61.2, True)

PAIRS = "results/pretrain.json:metrics.captioning.pair_accuracy,results/finetune.json:metrics.captioning.pair_accuracy"
SHOWN = f"""Experiment,rev,metrics.vqa.accuracy,metrics.segmentation.iou,{PAIRS},params.seed
,main,!,!,!,!,0
clip,12ab,0.5,!,!,!,0
clipseg,34cd,-,0.7,0.625,!,0
vilt,56ef,0.25,!,0.625,0.75,0
"""


def test_small_presets_are_those_that_train_on_two_cores():
    found = small_presets()
    assert {"clip", "clipseg", "detector", "flamingo", "flava", "llava", "simvlm", "vilt"} <= set(found)
    assert not {"llava-1.5-7b", "flava-full", "clip-vit-b-16"} & set(found)


def test_rows_are_of_the_newest_evaluation_of_each_metric(tmp_path):
    params = {"results": "results", "root": "data"}
    save_model(*build(parse(VLMConfig, PRESETS["dual"], "dual"), TEXTS), tmp_path / "data/models/finetune")
    write_json(tmp_path / "data/state/pretrain/timing.json", {"seconds": 2.0})
    write_json(tmp_path / "data/state/finetune/timing.json", {"seconds": 3.0})
    for stage, recall in (("pretrain", 0.5), ("finetune", 0.75)):
        metrics = {"captioning.recall@1": recall, "captioning.recall@1_blind": 0.1}
        if stage == "finetune":
            metrics |= {"vqa.accuracy": 0.6, "vqa.accuracy_wrong_image": 0.3, "vqa.accuracy_blind": 0.4}
        write_json(tmp_path / f"results/metrics/{stage}.json", {"metrics": metrics, "n": dict.fromkeys(metrics, 9)})
    first, second = rows_of("dual", tmp_path, params, passed=True)
    assert (first.task, first.score, first.wrong, first.blind, first.samples) == ("vqa", 0.6, 0.3, 0.4, 9)
    assert (second.metric, second.score, second.wrong, second.blind) == ("recall@1", 0.75, None, 0.1)
    assert first.seconds == 5.0 and first.parameters > 1000


def test_the_page_has_a_line_a_score_and_names_what_was_not_run(tmp_path):
    write_page(tmp_path / "zoo.md", [ROW], ["clip", "vilt"], SHOWN)
    text = (tmp_path / "zoo.md").read_text()
    line = "| clip | 1.5M | finetune | vqa | accuracy | 0.500 | 0.250 | 0.300 | 600 | 61 | passed |"
    assert line in text and "Not yet run: vilt." in text and "1 of 2 were run so far" in text
    assert "With the defaults were run: clip." in text and "no independent check" not in text


def test_dvcs_table_takes_the_later_of_two_measurements_and_names_whom_it_lacks(tmp_path):
    write_page(tmp_path / "zoo.md", [ROW, replace(ROW, model="siglip", passed=False)], ["clip", "siglip"], SHOWN)
    table = (tmp_path / "zoo.md").read_text().partition("## dvc exp show")[2].split("\n")
    assert table[2] == "| experiment | vqa.accuracy | segmentation.iou | captioning.pair_accuracy |"
    assert table[4:7] == ["| clip | 0.500 |  |  |", "| clipseg |  | 0.700 | 0.625 |", "| vilt | 0.250 |  | 0.750 |"]
    assert table[8].endswith("only the table above has: siglip.")


def test_rows_of_other_settings_are_named_on_the_page_and_not_mixed_in_a_run(tmp_path):
    short = replace(ROW, model="vilt", settings=("train.pretrain.steps=5",))
    write_page(tmp_path / "zoo.md", [ROW, short], ["clip", "vilt"], SHOWN)
    text = (tmp_path / "zoo.md").read_text()
    assert "With the defaults were run: clip." in text and "no independent check" in text
    assert "Not with the defaults were run: vilt, but with:\n\n```\ntrain.pretrain.steps=5\n```" in text
    write_json(tmp_path / "rows" / "vilt.json", [vars(short)])
    assert read_rows(tmp_path, "vilt") == [short] and not done_before(tmp_path, "clip", [])
    assert done_before(tmp_path, "vilt", ["train.pretrain.steps=5"])
    with pytest.raises(UserError, match=r"found vilt measured with .*steps=5; expected the defaults"):
        done_before(tmp_path, "vilt", [])


def test_pictures_are_small_files_of_different_samples(tmp_path):
    samples = [Sample(str(number), number // 2, 0, "q", ("a",)) for number in range(40)]
    assert len({sample.image for sample in spread(samples)}) == len(spread(samples)) == 4
    save(sheet([(Image.effect_noise((64, 64), 90).convert("RGB"), "what is it? a noise")] * 4), tmp_path / "a.jpg")
    assert (tmp_path / "a.jpg").stat().st_size <= LARGEST
