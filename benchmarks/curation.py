"""Does curation pay? The same model, trained for the same steps on the curated pack and on the raw pool.

    make run && make bench-curation        python benchmarks/curation.py [--steps N] [--out DIR]

Raw is every downloaded picture that decodes, with the caption it came with. Pictures of the evaluation set are
removed from both, so the difference is no leak. Both arms go through the pipeline's own stages with the settings of
params.yaml, and both are tested on the same fresh scenes with true captions and on the same test questions.
Where `make run` has trained the curated arm already, its models are used.
"""

import argparse
import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from vlmpipe import stages
from vlmpipe.compose import PARAMS, read_params
from vlmpipe.config import parse
from vlmpipe.curate.filters import select
from vlmpipe.curate.pack import pack
from vlmpipe.curate.planted import caught
from vlmpipe.data.captions import PAINTERS, caption
from vlmpipe.data.scenes import Scene
from vlmpipe.dispatch import Cluster, local_ray
from vlmpipe.errors import UserError
from vlmpipe.evaluate.tasks import EvaluateConfig, caption_loss, device, evaluate
from vlmpipe.images import decode_rgb
from vlmpipe.models import load
from vlmpipe.progress import progress
from vlmpipe.shards import read_manifest, write_json, write_table
from vlmpipe.train.stages import finetune, pretrain

# Apart from every seed that a world is drawn with: the scenes are new to both arms.
FRESH_SEED = (20_240_601, 7)
FRESH_SCENES = 600
RAW_ORDER = ("downloaded", "decoded", "evaluation_overlap")
RESAMPLES = 2000
MIDDLE = (0.025, 0.975)

Pair = tuple[bytes, str]  # an encoded picture and its caption


@dataclass(frozen=True)
class Arm:
    """One side of the comparison; `nats` and `correct` are paired by test sample."""

    name: str
    rows: int
    nats: np.ndarray
    correct: np.ndarray


def main() -> None:
    options = parse_arguments()
    params = read_params(options.params)
    root = Path(params["root"])
    out = options.out or root / "benchmarks" / "curation"
    configs = {name: stages.configs(stages.STAGES[name], params, None, str(options.params)) for name in
               ("select", "pack", "pretrain", "finetune")}
    if options.steps is not None:
        for name in ("pretrain", "finetune"):
            configs[name]["config"] = replace(configs[name]["config"], steps=options.steps)
    cluster = parse(Cluster, params["cluster"], f"{options.params}: cluster")
    for needed in ("packed", "selection"):
        read_manifest(root / needed)
    questions = Path(params["questions"])
    packed = {"raw": pack_raw(root, questions, out, configs), "curated": root / "packed"}
    fresh = draw_fresh(out / "fresh.parquet")
    trained = {"curated": root / "models"} if options.steps is None else {}
    arms = []
    with local_ray():
        for name in ("raw", "curated"):
            place = out / name
            models = trained.get(name) or train(packed[name], root / "scorer", questions, place, configs, cluster)
            arms.append(measure(name, packed[name], models, questions, fresh, place, cluster))
    words = sum(len(text.split()) for _, text in fresh)
    results = compare(*arms, words)
    write_json(out / "result.json", results)
    show(results, [*sorted(root.glob("world/*/planted.parquet"))], root / "selection" / "decisions.parquet")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=Path, default=Path(PARAMS), help="the workspace's settings")
    parser.add_argument("--steps", type=int, help="steps of each training; both arms are trained anew")
    parser.add_argument("--out", type=Path, help="default: <root>/benchmarks/curation")
    return parser.parse_args()


# --- the two arms ------------------------------------------------------------------------------------------

def pack_raw(root: Path, questions: Path, out: Path, configs: dict) -> Path:
    """Select with every rule off but the one against leaks, and pack as always."""
    pools, annotations = root / "pools", root / "annotations"
    select(pools, annotations, questions, out / "selection", replace(configs["select"]["config"], order=RAW_ORDER))
    pack(pools, annotations, out / "selection", out / "packed", configs["pack"]["config"])
    return out / "packed"


def train(packed: Path, scorer: Path, questions: Path, out: Path, configs: dict, cluster: Cluster) -> Path:
    """Both training stages as the pipeline runs them; they go on from their checkpoints when run again."""
    models, state = out / "models", out / "state"
    pretrain(packed, scorer, models / "pretrain", state / "pretrain", cluster=cluster, **configs["pretrain"])
    finetune(
        models / "pretrain", questions, packed, models / "finetune", state / "finetune", cluster=cluster,
        **configs["finetune"],
    )
    return models


def measure(
    name: str, packed: Path, models: Path, questions: Path, fresh: Sequence[Pair], out: Path, cluster: Cluster
) -> Arm:
    """Caption surprise on the fresh scenes after pretraining, accuracy on the test questions after finetuning."""
    config = EvaluateConfig(tasks=("vqa",), attention_samples=0)
    evaluate(name, models / "finetune", packed, questions, out / "evaluation", out / "metrics.json", config, cluster)
    scored = pq.read_table(out / "evaluation" / "samples.parquet", columns=["score"])
    nats = caption_nats(models / "pretrain", fresh, f"{name}: fresh captions")
    rows = sum(pq.ParquetFile(file).metadata.num_rows for file in (packed / "train").glob("*.parquet"))
    return Arm(name, rows, nats, np.array(scored["score"].to_pylist()))


def caption_nats(model: Path, fresh: Sequence[Pair], label: str) -> np.ndarray:
    """Nats of each true caption given its picture, summed over its tokens: fair between different tokenizers."""
    network, processor = load(model, device())
    if network.language_model is None:
        raise UserError("found a dual encoder; expected a model with a language head; compose with model=llava")
    nats = []
    for at in progress(range(0, len(fresh), 64), math.ceil(len(fresh) / 64), label):
        pictures, texts = zip(*fresh[at : at + 64])
        losses = caption_loss(network, processor, [decode_rgb(data) for data in pictures], texts)
        nats += [nll for nll, _ in losses]
    return np.array(nats)


def draw_fresh(path: Path) -> list[Pair]:
    """Pictures and true captions of scenes that no world holds; kept at `path` to be looked at."""
    rng = np.random.default_rng(FRESH_SEED)
    painters = [phrase for group in PAINTERS.values() for phrase in group]
    fresh = []
    for _ in range(FRESH_SCENES):
        scene, data = Scene.sample(rng), io.BytesIO()
        scene.draw().save(data, "png")
        fresh.append((data.getvalue(), caption(scene, painters[int(rng.integers(len(painters)))], rng)))
    write_table(path, pa.table({"image": [data for data, _ in fresh], "caption": [text for _, text in fresh]}))
    return fresh


# --- the comparison ----------------------------------------------------------------------------------------

def compare(raw: Arm, curated: Arm, words: int) -> dict:
    """Both numbers, their ratio or difference, and its 95% interval by paired bootstrap over test samples."""
    rng = np.random.default_rng(0)
    difference = (raw.nats - curated.nats) / (words / len(raw.nats))
    ratios = np.exp(resampled_means(difference, rng))
    gains = resampled_means(curated.correct - raw.correct, rng)
    perplexity = {arm.name: float(np.exp(arm.nats.sum() / words)) for arm in (raw, curated)}
    accuracy = {arm.name: float(arm.correct.mean()) for arm in (raw, curated)}
    ratio = {"ratio": perplexity["raw"] / perplexity["curated"], "interval": np.quantile(ratios, MIDDLE).tolist()}
    gain = {"difference": accuracy["curated"] - accuracy["raw"], "interval": np.quantile(gains, MIDDLE).tolist()}
    return {
        "caption_perplexity_per_word": perplexity | ratio,
        "vqa_accuracy": accuracy | gain,
        "train_rows": {arm.name: arm.rows for arm in (raw, curated)},
        "n": {"captions": len(raw.nats), "questions": len(raw.correct)},
    }


def resampled_means(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of `values` [N] resampled with replacement, float [RESAMPLES]."""
    return np.array([rng.choice(values, len(values)).mean() for _ in range(RESAMPLES)])


def show(results: dict, plans: Sequence[Path], decisions: Path) -> None:
    console = Console()
    table = Table("", "raw", "curated", "curated is better by", title="The same training on either pool")
    rows = results["train_rows"]
    table.add_row("training pairs", str(rows["raw"]), str(rows["curated"]), "")
    found = results["caption_perplexity_per_word"]
    low, high = found["interval"]
    gain = f"{found['ratio']:.3f}x [{low:.3f}, {high:.3f}]"
    label = f"perplexity per word, {results['n']['captions']} fresh scenes (less is better)"
    table.add_row(label, f"{found['raw']:.3f}", f"{found['curated']:.3f}", gain)
    found = results["vqa_accuracy"]
    low, high = found["interval"]
    gain = f"{100 * found['difference']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
    label = f"VQA accuracy after finetuning, {results['n']['questions']} questions"
    table.add_row(label, f"{100 * found['raw']:.1f}%", f"{100 * found['curated']:.1f}%", gain)
    console.print(table)
    for plan in plans:
        show_planted(console, caught(plan, decisions))


def show_planted(console: Console, found: dict) -> None:
    table = Table("fault", "planted", "caught", "by", title="What was planted and what the selection caught")
    for row in found["rows"]:
        by = ", ".join(f"{reason} {count}" for reason, count in row["reasons"].items())
        table.add_row(row["kind"], str(row["planted"]), str(row["caught"]), by)
    console.print(table)
    if swapped := found["swapped"]:
        precision = "none dropped" if swapped["precision"] is None else f"{swapped['precision']:.3f}"
        console.print(
            f"Swapped captions by the pair score: precision {precision}, recall {swapped['recall']:.3f} "
            f"({swapped['hits']} of {swapped['planted']} planted, {swapped['dropped']} rows dropped)"
        )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
