"""The training stages: where data and weights come from, and the model directory that goes out.

Each stage describes a `Job` and sends `work` to where training runs. A stage that is killed goes on from its
checkpoint when it is run again with the same config, data and initial weights.
"""

import dataclasses
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from vlmpipe.config import to_dict
from vlmpipe.data.task import TaskConfig
from vlmpipe.dispatch import Cluster, run_training
from vlmpipe.errors import UserError
from vlmpipe.models.collective import BatchNorm
from vlmpipe.models.directory import build, is_model, load, save
from vlmpipe.models.pretrained.load import WANTED, locate
from vlmpipe.models.read import read_model
from vlmpipe.models.vlm import VisionLanguageModel, VLMConfig
from vlmpipe.shards import sha256_file, write_json
from vlmpipe.train.adapters import add_adapters, merge_adapters, rules_with_adapters
from vlmpipe.train.batches import Batches, Dataset
from vlmpipe.train.checkpoint import fingerprint, newest
from vlmpipe.train.live import live
from vlmpipe.train.loop import CHECKPOINTS, CURVES, TIMING, TrainConfig, train
from vlmpipe.train.objectives import check_objective, make_objective, takes_any_size
from vlmpipe.train.packing import MarkedBatches, PackedBatches, Packer, places_of
from vlmpipe.train.parallel import place
from vlmpipe.train.pictures import OwnSizes, Pictures, decode_images
from vlmpipe.train.regions import RegionDataset
from vlmpipe.train.sources import Source, read_packed, read_shards
from vlmpipe.train.tasks import Labelled, TaskSource, read_task

# Settings that change when a run saves and shows, not what it computes.
BESIDE_THE_RUN = ("log_every", "checkpoint_every", "keep", "prefetch")
# In the state of a run: where DVC's tools find its curves, and what stays when the run is done.
LIVE = "live"
KEPT = ("timing.json", TIMING, LIVE)


@dataclass(frozen=True)
class ScorerConfig:
    """What scores pairs: a CLIP or SigLIP from Hugging Face (directory or hub id), or one trained here."""

    huggingface: str | None = None
    model: VLMConfig | None = None
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if (self.huggingface is None) == (self.model is None):
            found = "neither" if self.model is None else "both"
            raise UserError(f"found {found} huggingface and model; expected one of the two; set the other to null")


@dataclass(frozen=True)
class Job:
    """One training run as it travels to its workers."""

    kind: Literal["scorer", "pretrain", "finetune"]
    config: TrainConfig
    data: Path
    state: Path
    architecture: VLMConfig | None = None  # null: start from `init`
    init: Path | None = None
    vision: Path | None = None  # a scorer whose vision tower the new model starts from
    rehearse: Path | None = None  # a packed dataset whose captions are trained on too
    task: TaskConfig | None = None  # how the files of `data` are read, of fine-tuning


def train_scorer(trusted: Path, out: Path, state: Path, config: ScorerConfig, cluster: Cluster) -> None:
    """Train a dual encoder on the trusted set (the recipe of arXiv 2309.17425), or fetch the configured one."""
    if config.huggingface is not None:
        publish(out, lambda partial: fetch(config.huggingface, partial))
        return
    if config.model.heads.projection is None:
        raise UserError("train.scorer.model: found no heads.projection; expected a dual encoder such as model=clip")
    run(Job("scorer", config.train, trusted, state, architecture=config.model), out, cluster)


def pretrain(
    packed: Path, scorer: Path, out: Path, state: Path, model: VLMConfig, config: TrainConfig, cluster: Cluster
) -> None:
    """Train a new model on the packed captions, from the scorer's vision tower where the config says so (as LLaVA
    starts from CLIP's, arXiv 2304.08485), or go on from the directory in `config.init`, whose architecture it keeps."""
    vision = scorer if config.vision == "scorer" else None
    architecture = model if config.init is None else None
    init = None if config.init is None else Path(config.init)
    run(Job("pretrain", config, packed, state, architecture, init, vision), out, cluster)


def finetune(
    init: Path, questions: Path, packed: Path, out: Path, state: Path, config: TrainConfig, cluster: Cluster,
    task: TaskConfig | None = None,
) -> None:
    """Go on from the model in `init` with the training split of a task, and with the captions where the config says so.

    Args:
        questions: the folder of the task's files; `task` says in which format (by default VQAv2's questions).
    """
    rehearse, task = packed if config.captions else None, task or TaskConfig()
    data = Path(questions) / "train"
    run(Job("finetune", config, data, state, init=init, rehearse=rehearse, task=task), out, cluster)


def run(job: Job, out: Path, cluster: Cluster) -> None:
    """Train where the cluster says, put the model directory at `out` and clear what was kept for resuming.

    Raises:
        KeyboardInterrupt: the stage was told to end (SIGTERM); its checkpoint is kept.
    """
    check_objective(job.config.objective)
    if job.kind != "finetune" and job.config.lora is not None:
        raise UserError(
            f"train.{job.kind}: found lora; expected it in train.finetune alone, where there are weights to adapt; "
            f"set it to null"
        )
    paths = {name: value.absolute() for name, value in vars(job).items() if isinstance(value, Path)}
    job = dataclasses.replace(job, **paths)  # workers may stand in another directory
    summary = run_training(work, job, cluster, job.state, job.kind)
    if summary["stopped"]:
        raise KeyboardInterrupt
    publish(out, lambda partial: shutil.copytree(job.state / "result", partial))
    write_json(job.state / "timing.json", summary)
    for path in job.state.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def work(job: Job, report: Callable[[dict], None], stopped: Callable[[], bool]) -> dict:
    """What every training worker does; rank 0 leaves the model directory in `state/result`."""
    rank, world = place()
    config = job.config
    source = read_source(job)
    if job.architecture is None:
        model, processor = read_model(job.init)
    else:
        model, processor = build(job.architecture, source.texts, config.seed)
    if job.vision is not None:
        adopt_vision(model, job.vision)
    if model.language_model is None:
        processor.answers = source.answers_for(model) or processor.answers
    cache = job.state / "cache" / f"images-{rank}.bytes"
    images = decode_images(source.images, len(source.images), processor, cache, model.config)
    if model.codes is not None and job.architecture is not None:
        model.codes.fit(images, config.seed)  # the same in every process
    dataset, fitting = source.lessons(images, model, processor, config.per_row)
    batches = make_batches(dataset, model, config, rank, world)
    objective = make_objective(config.objective or fitting, model)
    check_sizes(images, objective)
    if config.lora is not None:
        add_adapters(model, config.lora, config.seed)
        config = with_adapters(config)
    run = identity(job)
    resumes = newest(job.state / CHECKPOINTS, run) is not None
    listeners = (report, live(job.state / LIVE, resumes)) if rank == 0 else ()
    summary = train(model, objective, batches, config, job.state, run, partial(tell, listeners), stopped)
    if config.lora is not None:
        merge_adapters(model)
    if rank == 0 and not summary.stopped:
        write_result(job.state, model, processor)
    return dataclasses.asdict(summary)


def check_sizes(images: Pictures, objective: Callable) -> None:
    """Refuse pictures of several sizes where an objective exchanges, hides or compares whole ones."""
    if isinstance(images, OwnSizes) and images.several and not takes_any_size(objective):
        raise UserError(
            "objective: found pictures that keep their own sizes; expected objectives that leave them as they are, "
            "such as language_modeling, masked_text or answers; choose those, or a model whose pictures have one size"
        )


def make_batches(
    dataset: Dataset | Labelled | RegionDataset, model: VisionLanguageModel, config: TrainConfig, rank: int, world: int
) -> Batches:
    """Batches of one part of an update.

    Raises:
        UserError: samples of this model can't share rows.
    """
    size = config.batch_size // config.accumulation
    marked = isinstance(dataset, Dataset) and dataset.marked
    if config.pack is None and marked:
        packer = Packer(dataset, None, places_of(model, dataset.images))
        return MarkedBatches(packer, size, config.seed, rank, world)
    if config.pack is None:
        return Batches(dataset, size, config.seed, rank, world)
    if not isinstance(dataset, Dataset):
        raise UserError("pack: found rows that are more than a text; expected null for such a task; set pack to null")
    kind = model.config.fusion.kind
    if kind != "prefix":
        raise UserError(
            f"pack: found a model with fusion '{kind}'; expected one that reads pictures in its row, such as "
            f"model=llava; set pack to null"
        )
    if world > 1 and any(isinstance(part, BatchNorm) for part in model.modules()):
        raise UserError(
            f"pack: found batch norm and {world} workers, whose rows hold different numbers of pictures; expected as "
            f"many on each; set pack to null, vision.stem to patch, or cluster.workers to 1"
        )
    packer = Packer(dataset, config.pack, places_of(model, dataset.images))
    return PackedBatches(packer, size, config.seed, rank, world)


def with_adapters(config: TrainConfig) -> TrainConfig:
    """The same run for a model whose adapters learn."""
    optimizer = dataclasses.replace(config.optimizer, rules=rules_with_adapters(config.optimizer.rules))
    return dataclasses.replace(config, optimizer=optimizer)


def tell(listeners: tuple[Callable[[dict], None], ...], facts: dict) -> None:
    for listener in listeners:
        listener(facts)


# Of a vision tower what its weights' meaning does not hang on.
FREE = (
    "class_token", "pool", "pooler", "mask_token", "final_norm", "interpolation", "patch_dropout", "frames", "layer",
)


def adopt_vision(model: VisionLanguageModel, scorer: Path) -> None:
    """Give `model` the vision tower of the dual encoder in `scorer`: what has no place there (class and mask tokens)
    starts anew. A model whose pictures have a stem alone takes the tower's blocks as the first of those that read words
    and picture together, as ViLT starts from a ViT (arXiv 2102.03334, 4.2).

    Raises:
        UserError: the two towers are not the same shape, or the scorer is not one of ours.
    """
    if not is_model(scorer):
        raise UserError(f"{scorer}: found no model of ours; train one, or set train.pretrain.vision=scratch")
    tower = load(scorer)[0].vision
    joint = model.vision.config.transformer is not None and not model.vision.config.transformer.depth
    own = dataclasses.replace(model.vision.config, **{name: getattr(tower.config, name) for name in FREE})
    if joint:
        depth = min(tower.config.transformer.depth, model.text.config.transformer.depth)
        own = dataclasses.replace(own, transformer=dataclasses.replace(model.text.config.transformer, depth=depth))
    if tower.config != own:
        raise UserError(
            f"{scorer}: found vision {tower.config}; expected {own}; make model.architecture.vision and "
            f"train.scorer.model.vision equal, or set train.pretrain.vision=scratch"
        )
    places = model.state_dict()
    for name, tensor in tower.state_dict().items():
        blocks = joint and name.startswith(("transformer.", "norm."))
        place = places[f"text.{name}" if blocks else f"vision.{name}"]
        # The class token has the first position.
        (place[-len(tensor) :] if name == "position_embedding" else place).copy_(tensor)


def read_source(job: Job) -> Source | TaskSource:
    if job.kind == "scorer":
        return read_shards(job.data)
    if job.kind == "pretrain":
        return read_packed(job.data / "train")
    return read_task(job.data, job.task, read_packed(job.rehearse / "train") if job.rehearse else None)


def write_result(state: Path, model, processor) -> None:
    result = state / "result"
    shutil.rmtree(result, ignore_errors=True)
    save(model, processor, result)
    shutil.copyfile(state / CURVES, result / CURVES)


def identity(job: Job) -> str:
    """The fingerprint that a checkpoint must have to be gone on from: config, data and initial weights."""
    config = {key: value for key, value in to_dict(job.config).items() if key not in BESIDE_THE_RUN}
    return fingerprint(
        {
            "kind": job.kind,
            "config": config,
            "architecture": job.architecture and to_dict(job.architecture),
            "task": job.task and [to_dict(job.task), listing(job.data)],
            "data": [digests(path, "*.json") for path in (job.data, job.rehearse) if path],
            "init": [digests(path, "*") for path in (job.init, job.vision) if path],
        }
    )


def digests(directory: Path, pattern: str) -> dict[str, str]:
    """sha256 of the files below `directory`; of a dataset its manifests are enough, for they list the rest."""
    files = sorted(path for path in directory.rglob(pattern) if path.is_file())
    return {str(path.relative_to(directory)): sha256_file(path) for path in files}


def listing(directory: Path) -> list[tuple[str, int]]:
    """Names and sizes of the files below `directory`, for datasets without a manifest."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return [(path.relative_to(directory).as_posix(), path.stat().st_size) for path in files]


def publish(out: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a directory beside `out`, then give it that name: nobody sees half of it."""
    out = Path(out)
    partial = out.with_name(f".{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    write(partial)
    shutil.rmtree(out, ignore_errors=True)
    os.rename(partial, out)


def fetch(source: str, target: Path) -> None:
    """Copy a Hugging Face model from a directory or the hub, so that the scorer is versioned with what it scored.

    Raises:
        UserError: there is no such model, or it has no safetensors.
    """
    directory = locate(source)
    target.mkdir()
    for path in {path for pattern in WANTED for path in directory.glob(pattern)}:
        shutil.copyfile(path, target / path.name)
    if not list(target.glob("*.safetensors")):
        raise UserError(f"found no safetensors in '{source}'; expected a Hugging Face model with them; choose another")
