"""The page of the zoo says what was measured, and what was not."""

from PIL import Image

from benchmarks.zoo import small_presets
from benchmarks.zoo_page import LARGEST, Row, rows_of, save, sheet, spread, write_page
from tests.models.tiny import PRESETS, TEXTS
from vlmpipe.config import parse
from vlmpipe.evaluate.tasks import Sample
from vlmpipe.models import build
from vlmpipe.models import save as save_model
from vlmpipe.models.vlm import VLMConfig
from vlmpipe.shards import write_json

ROW = Row("clip", "finetune", 1_500_000, "vqa", "accuracy", 0.5, 0.25, 0.3, 600, 61.2, True)

SHOWN = """Experiment,rev,metrics.vqa.accuracy,metrics.segmentation.iou,params.seed
,main,!,!,0
clip,12ab,0.5,!,0
clipseg,34cd,-,0.7,0
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
    write_page(tmp_path / "zoo.md", [ROW], ["clip", "vilt"], [], SHOWN)
    text = (tmp_path / "zoo.md").read_text()
    line = "| clip | 1.5M | finetune | vqa | accuracy | 0.500 | 0.250 | 0.300 | 600 | 61 | passed |"
    assert line in text and "Not yet run: vilt." in text and "| clip | 0.500 |  |" in text


def test_pictures_are_small_files_of_different_samples(tmp_path):
    samples = [Sample(str(number), number // 2, 0, "q", ("a",)) for number in range(40)]
    assert len({sample.image for sample in spread(samples)}) == len(spread(samples)) == 4
    save(sheet([(Image.effect_noise((64, 64), 90).convert("RGB"), "what is it? a noise")] * 4), tmp_path / "a.jpg")
    assert (tmp_path / "a.jpg").stat().st_size <= LARGEST
