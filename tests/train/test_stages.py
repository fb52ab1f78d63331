"""The training stages: a model directory out of data in, the same bytes however often they were interrupted."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
import torch

from tests.models.tiny import PRESETS
from vlmpipe.config import parse
from vlmpipe.dispatch import Cluster, local_ray
from vlmpipe.errors import UserError
from vlmpipe.models.directory import build, load, save
from vlmpipe.models.vlm import VLMConfig
from vlmpipe.shards import write_manifest, write_table
from vlmpipe.train.adapters import LoraConfig
from vlmpipe.train.live import live
from vlmpipe.train.loop import TrainConfig
from vlmpipe.train.optim import OptimizerConfig, Rule, ScheduleConfig
from vlmpipe.train.stages import ScorerConfig, adopt_vision, finetune, pretrain, train_scorer

INLINE = Cluster(backend="inline", threads=1)
OPTIMIZER = OptimizerConfig(lr=3e-3, schedule=ScheduleConfig(warmup=2))
CONFIG = TrainConfig(steps=12, batch_size=8, optimizer=OPTIMIZER, checkpoint_every=4, log_every=2)
COLORS = {"red": (220, 30, 30), "green": (20, 180, 40), "blue": (30, 60, 220), "white": (250, 250, 250)}


def model(preset: str = "prefix") -> VLMConfig:
    return parse(VLMConfig, PRESETS[preset], preset)


def picture(color: str, suffix: str = "png") -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (32, 32), COLORS[color]).save(file, "PNG" if suffix == "png" else "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """Twenty-two plain pictures and what colour they have: epochs end inside batches."""
    directory = tmp_path_factory.mktemp("packed")
    colors = (list(COLORS) * 6)[:22]
    table = pa.table(
        {
            "image": [{"bytes": picture(color), "path": None} for color in colors],
            "caption": [f"a {color} picture" for color in colors],
        }
    )
    write_table(directory / "train" / "part-00000.parquet", table)
    write_manifest(directory, "packed", [])
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def losses(directory: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "curves.jsonl").read_text().splitlines()]


def run_pretrain(packed: Path, root: Path, cluster: Cluster = INLINE, config: TrainConfig = CONFIG) -> Path:
    pretrain(packed, root / "scorer", root / "out", root / "state", model(), config, cluster)
    return root / "out"


def test_pretrain_writes_a_model_directory_of_the_same_bytes(packed, tmp_path):
    first = run_pretrain(packed, tmp_path / "first")
    assert sorted(contents(first)) == ["config.json", "curves.jsonl", "model.safetensors", "tokenizer.json"]
    assert contents(first) == contents(run_pretrain(packed, tmp_path / "second"))
    assert losses(first)[-1] < 0.8 * losses(first)[0]
    load(first)
    kept = sorted(path.name for path in (tmp_path / "first" / "state").iterdir())
    assert kept == ["live", "timing.json", "timing.jsonl"]


def test_pretraining_can_start_from_the_scorers_eyes(packed, tmp_path):
    dual, processor = build(model("dual"), ["a red picture"], seed=3)
    save(dual, processor, tmp_path / "scorer")
    config = dataclasses.replace(CONFIG, vision="scorer", optimizer=OptimizerConfig(rules=(Rule(r"vision\..*", None),)))
    trained, _ = load(run_pretrain(packed, tmp_path, config=config))
    towers = trained.vision.state_dict(), dual.vision.state_dict()
    assert all(torch.equal(towers[0][name], towers[1][name]) for name in towers[1])


def test_a_stem_alone_gives_the_scorers_blocks_to_the_joint_stack(tmp_path):
    dual, processor = build(model("dual"), ["a red picture"], seed=3)
    save(dual, processor, tmp_path / "scorer")
    stem = {**PRESETS["dual"]["vision"], "class_token": True, "pool": "class", "final_norm": False}
    stem["transformer"] = {**stem["transformer"], "depth": 0}
    text = {**PRESETS["dual"]["text"], "pool": "first"}
    fusion = {"kind": "single_stream", "single_stream": {"types": 2}}
    parts = {"vision": stem, "text": text, "fusion": fusion, "heads": {"matching": {}}}
    config = parse(VLMConfig, parts, "test")
    joint, _ = build(config, ["a red picture"], seed=4)
    words = joint.text.token_embedding.weight.clone()
    adopt_vision(joint, tmp_path / "scorer")
    mine, tower = joint.state_dict(), dual.vision.state_dict()
    assert torch.equal(mine["vision.position_embedding"][1:], tower["position_embedding"])
    blocks = [name for name in tower if name.startswith("transformer.")]
    assert blocks and all(torch.equal(mine[f"text.{name}"], tower[name]) for name in blocks)
    assert torch.equal(joint.text.token_embedding.weight, words)


def test_a_scorer_of_another_shape_lends_no_eyes(packed, tmp_path):
    config = dataclasses.replace(CONFIG, vision="scorer")
    with pytest.raises(UserError, match="found no model of ours"):
        run_pretrain(packed, tmp_path, config=config)
    other = model("dual")
    other = dataclasses.replace(other, vision=dataclasses.replace(other.vision, image_size=64))
    save(*build(other, ["a red picture"]), tmp_path / "scorer")
    with pytest.raises(UserError, match=r"train\.pretrain\.vision=scratch"):
        run_pretrain(packed, tmp_path, config=config)


def test_killed_and_rerun_gives_the_same_bytes(packed, tmp_path):
    whole = run_pretrain(packed, tmp_path / "whole")
    script = (
        "from test_stages import *; import vlmpipe.train.batches as b\n"
        "at = b.Batches.at\n"
        "b.Batches.at = lambda self, step: os.kill(os.getpid(), signal.SIGKILL) if step == 7 else at(self, step)\n"
        f"run_pretrain(Path({str(packed)!r}), Path({str(tmp_path / 'killed')!r}))"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    killed = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths}, check=False)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "killed" / "out").exists()
    assert contents(run_pretrain(packed, tmp_path / "killed")) == contents(whole)
    timing = json.loads((tmp_path / "killed" / "state" / "timing.json").read_text())
    assert (timing["resumed_from"], timing["steps"]) == (4, 12)


def test_other_data_starts_over(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("vlmpipe.train.stages.publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run_pretrain(packed, tmp_path)
    monkeypatch.undo()
    assert list((tmp_path / "state" / "checkpoints").iterdir())
    run_pretrain(packed, tmp_path, config=dataclasses.replace(CONFIG, seed=1))
    assert json.loads((tmp_path / "state" / "timing.json").read_text())["resumed_from"] == 0


def write_questions(root: Path) -> Path:
    """One question about each plain picture."""
    from vlmpipe.data.vqa import VqaExample, write_vqa

    examples = [
        VqaExample(number, number, "what color is it?", (color,) * 10, "other", "what color is")
        for number, color in enumerate(COLORS)
    ]
    write_vqa(root / "train", examples, enumerate(picture(color) for color in COLORS), "train")
    return root


def test_finetune_goes_on_from_init_and_rehearses(packed, tmp_path):
    init = run_pretrain(packed, tmp_path / "pretrain")
    write_questions(tmp_path / "questions")
    for captions in (False, True):
        root = tmp_path / f"finetune-{captions}"
        config = dataclasses.replace(CONFIG, captions=captions)
        finetune(init, tmp_path / "questions", packed, root / "out", root / "state", config, INLINE)
    plain, rehearsed = (tmp_path / f"finetune-{captions}" / "out" for captions in (False, True))
    assert contents(plain)["tokenizer.json"] == contents(init)["tokenizer.json"]
    assert losses(plain)[-1] < losses(plain)[0] and losses(plain) != losses(rehearsed)


def test_a_tuned_dual_encoder_knows_what_to_choose_among(packed, tmp_path):
    save(*build(model("dual"), ["a red picture"]), tmp_path / "init")
    questions = write_questions(tmp_path / "questions")
    finetune(tmp_path / "init", questions, packed, tmp_path / "out", tmp_path / "state", CONFIG, INLINE)
    assert load(tmp_path / "out")[1].answers == tuple(sorted(COLORS))


def test_scorer_is_trained_on_the_trusted_shards(tmp_path):
    from vlmpipe.models.scorer import load_scorer
    from vlmpipe.shards import write_tar

    trusted = tmp_path / "trusted"
    colors = list(COLORS) * 3
    uids = [f"{number:032x}" for number in range(len(colors))]
    members = [(f"{uid}.jpg", picture(color, "jpg")) for uid, color in zip(uids, colors, strict=True)]
    digest = write_tar(trusted / "00000.tar", members)
    write_table(trusted / "00000.parquet", pa.table({"uid": uids, "caption": [f"all {color}" for color in colors]}))
    write_manifest(trusted, "pool", [{"name": "00000", "rows": len(uids), "files": {"00000.tar": digest}}])
    config = ScorerConfig(model=model("dual"), train=CONFIG)
    train_scorer(trusted, tmp_path / "out", tmp_path / "state", config, INLINE)
    assert load_scorer(tmp_path / "out").encode_texts(["all red"]).shape == (1, 16)


def test_scorer_from_hugging_face_is_copied_without_pickles(tmp_path):
    source = tmp_path / "hub"
    source.mkdir()
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "merges.txt"):
        (source / name).write_bytes(name.encode())
    config = ScorerConfig(huggingface=str(source))
    train_scorer(tmp_path, tmp_path / "out", tmp_path / "state", config, INLINE)
    assert sorted(contents(tmp_path / "out")) == ["config.json", "merges.txt", "model.safetensors"]
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match="found no safetensors"):
        train_scorer(tmp_path, tmp_path / "out", tmp_path / "state", config, INLINE)


def test_configs_that_make_no_stage_are_refused(packed, tmp_path):
    with pytest.raises(UserError, match="found neither huggingface and model"):
        ScorerConfig()
    with pytest.raises(UserError, match=r"found no heads\.projection"):
        train_scorer(tmp_path, tmp_path / "out", tmp_path / "state", ScorerConfig(model=model("prefix")), INLINE)
    with pytest.raises(UserError, match=r"found objective 'contrastiv'; did you mean 'contrastive'"):
        run_pretrain(packed, tmp_path, config=dataclasses.replace(CONFIG, objective="contrastiv"))


def test_finetuning_by_adapters_leaves_an_ordinary_model(packed, tmp_path):
    init = run_pretrain(packed, tmp_path / "pretrain")
    questions = write_questions(tmp_path / "questions")
    config = dataclasses.replace(CONFIG, lora=LoraConfig(rank=2))
    finetune(init, questions, packed, tmp_path / "out", tmp_path / "state", config, INLINE)
    before, after = (load(directory)[0].state_dict() for directory in (init, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed and all(name.startswith("text.transformer.") for name in changed)
    with pytest.raises(UserError, match=r"train\.pretrain: found lora; expected it in train\.finetune alone"):
        run_pretrain(packed, tmp_path, config=config)


def test_packed_rows_train_and_are_the_same_bytes_again(packed, tmp_path):
    config = dataclasses.replace(CONFIG, pack=64, batch_size=2)
    first = run_pretrain(packed, tmp_path / "first", config=config)
    assert contents(first) == contents(run_pretrain(packed, tmp_path / "second", config=config))
    assert losses(first)[-1] < 0.8 * losses(first)[0]
    timing = json.loads((tmp_path / "first/state/timing.jsonl").read_text().splitlines()[-1])
    assert 0 < timing["samples_per_second"] < timing["tokens_per_second"]
    with pytest.raises(UserError, match="pack: found a model with fusion 'none'"):
        pretrain(packed, tmp_path, tmp_path / "out", tmp_path / "dual", model("dual"), config, INLINE)


def test_what_dvc_shows_of_a_run(packed, tmp_path):
    run_pretrain(packed, tmp_path)
    live = tmp_path / "state/live"
    last = json.loads((live / "metrics.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "out/curves.jsonl").read_text().splitlines()]
    assert last["step"] == 12 and last["loss"] == lines[-1]["loss"] and last["mfu"] > 0
    header, *rows = [row.split("\t") for row in (live / "plots/metrics/loss.tsv").read_text().splitlines()]
    assert header == ["step", "loss"] and [int(step) for step, _ in rows] == [2, 4, 6, 8, 10, 12]
    assert [float(loss) for _, loss in rows] == [line["loss"] for line in lines[1::2]]
    assert not list(live.rglob("dvc.yaml"))


def test_nothing_is_sent_to_whoever_has_a_token(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr("dvclive.studio.post_live_metrics", lambda *words, **facts: sent.append(words))
    monkeypatch.setenv("DVC_STUDIO_TOKEN", "secret")
    monkeypatch.setenv("DVC_STUDIO_REPO_URL", "git@studio.test:a/b.git")
    live(tmp_path / "live", False)({"step": 1, "loss": 2.0})
    assert (tmp_path / "live/metrics.json").exists() and not sent


def test_outside_a_dvc_repository_nothing_is_written_nor_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    live(tmp_path / "live", False)({"step": 1, "loss": 2.0})
    assert [path.name for path in tmp_path.iterdir()] == [".git"]


@pytest.mark.slow
def test_a_stage_killed_on_ray_goes_on(packed, tmp_path):
    """The stage's own process is killed while its Ray worker trains; the rerun is on Ray too."""
    config = dataclasses.replace(CONFIG, steps=300, checkpoint_every=10, log_every=10)
    script = (
        "from test_stages import *\n"
        f"run_pretrain(Path({str(packed)!r}), Path({str(tmp_path)!r}), Cluster(threads=1), {config!r})"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths})
    checkpoints = tmp_path / "state" / "checkpoints"
    end = time.monotonic() + 120
    while not list(checkpoints.glob("step-*")) and time.monotonic() < end:
        time.sleep(0.1)
    process.kill()
    process.wait()
    reached = max(int(path.name[5:]) for path in checkpoints.glob("step-*"))
    assert 0 < reached < 300
    run_pretrain(packed, tmp_path, Cluster(threads=1), config)
    timing = json.loads((tmp_path / "state" / "timing.json").read_text())
    assert timing["resumed_from"] >= reached and len(losses(tmp_path / "out")) == 300


@pytest.fixture(scope="module")
def ray_of_two_cores():
    with local_ray(cpus=2):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["prefix", "dual"])
def test_two_workers_give_the_curve_of_one(packed, tmp_path, preset, ray_of_two_cores):
    config = dataclasses.replace(CONFIG, steps=8)
    scorer = tmp_path / "scorer"
    pretrain(packed, scorer, tmp_path / "one", tmp_path / "a", model(preset), config, INLINE)
    two = Cluster(workers=2, cpus_per_worker=1, threads=1)
    pretrain(packed, scorer, tmp_path / "two", tmp_path / "b", model(preset), config, two)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.slow
def test_one_of_two_workers_is_killed_mid_epoch(packed, tmp_path, ray_of_two_cores):
    """Ray starts both again; they go on from the checkpoint, and every step has the batch that it always had."""
    config = dataclasses.replace(CONFIG, steps=300, checkpoint_every=10, log_every=1)
    two = Cluster(workers=2, cpus_per_worker=1, threads=1)
    whole = run_pretrain(packed, tmp_path / "whole", two, config)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_pretrain, packed, tmp_path / "killed", two, config)
        progress = tmp_path / "killed" / "state" / "progress.jsonl"
        wait_for(lambda: running.done() or (progress.exists() and progress.read_text().count("\n") > 25))
        ours = psutil.Process().children(recursive=True)
        _, second = [process for process in ours if "RayTrainWorker" in " ".join(process.cmdline())]
        second.kill()
        killed = running.result()
    resumed_from = json.loads((tmp_path / "killed" / "state" / "timing.json").read_text())["resumed_from"]
    assert 20 <= resumed_from < 300 and resumed_from % 10 == 0
    assert contents(killed) == contents(whole)  # curves.jsonl holds every step once, with the loss of its batch


def wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"nothing came for {seconds} s"
        time.sleep(0.02)
