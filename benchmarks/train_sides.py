"""The sides of the training benchmarks: our loop, open_clip's and transformers' on the same shapes and samples.

A side trains for some steps and says when each ended. Samples are drawn: noise for pictures, and texts as long as real
ones, so that nothing has to be downloaded. All sides get pictures as uint8 of the model's size and texts as token ids.
"""

import argparse
import contextlib
import importlib.util
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmpipe.models.fusion import FusionConfig
from vlmpipe.models.heads import HeadsConfig, LanguageModelConfig, ProjectionConfig
from vlmpipe.models.layers import TransformerConfig
from vlmpipe.models.processor import EncodedText
from vlmpipe.models.text import TextConfig
from vlmpipe.models.vision import CLIP_MEAN, CLIP_STD, VisionConfig
from vlmpipe.models.vlm import VisionLanguageModel, VLMConfig
from vlmpipe.train.batches import Batches, Dataset
from vlmpipe.train.loop import TrainConfig, train
from vlmpipe.train.objectives import make_objective
from vlmpipe.train.optim import OptimizerConfig, ScheduleConfig
from vlmpipe.train.packing import PackedBatches, Packer, places_of

OPEN_CLIP = "open_clip_torch==3.3.0"
BESIDE_OPEN_CLIP = ("ftfy", "wcwidth")  # what its tokenizer imports
LR, DECAY, BETAS, EPS, CLIP = 1e-4, 0.1, (0.9, 0.98), 1e-6, 1.0


@dataclass(frozen=True)
class Tower:
    width: int
    depth: int
    heads: int
    hidden: int = 0  # 0: four times the width
    kv_heads: int = 0

    @property
    def inner(self) -> int:
        return self.hidden or 4 * self.width


@dataclass(frozen=True)
class Shape:
    """One model for all sides. `text` is a CLIP text tower, or a Llama where `embed` is 0."""

    vision: Tower
    text: Tower
    image: int
    patch: int
    vocab: int
    context: int
    embed: int = 0  # of the shared space
    tied: bool = False  # the word embedding is the output matrix

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


# To try a benchmark out, where its figures mean nothing.
TINY = {
    "clip": Shape(Tower(32, 2, 2), Tower(32, 2, 2), image=32, patch=16, vocab=64, context=77, embed=16),
    "llava": Shape(Tower(32, 2, 2), Tower(32, 2, 4, hidden=64, kv_heads=2), image=32, patch=16, vocab=64, context=256,
                   tied=True),
}


@dataclass(frozen=True)
class Run:
    """How each side trains."""

    batch: int
    precision: str  # float32 or bf16
    warm: int  # steps before the clock
    steps: int  # steps on the clock, a multiple of `warm`
    workers: int = 1  # processes that load data for the peers; ours has its thread
    compile: bool = False


# --- samples -------------------------------------------------------------------------------------------------------

def draw(shape: Shape, count: int, seed: int = 0) -> Dataset:
    """`count` pictures with a text each: captions of 12 tokens in the middle, as alt texts have, or questions of 8 to
    24 with answers of 10 to 60. The last token of a caption has the highest number of all, as CLIP's end of text."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, 3, shape.image, shape.image), np.uint8)
    texts = [caption(shape, random) if shape.embed else answered(shape, random) for _ in range(count)]
    return Dataset(images, tuple((number, (text,)) for number, text in enumerate(texts)))


def caption(shape: Shape, random: np.random.Generator) -> EncodedText:
    length = int(np.clip(random.lognormal(np.log(12), 0.45), 5, shape.context))
    return EncodedText((*random.integers(3, shape.vocab - 2, length - 1).tolist(), shape.vocab - 1), 0)


def answered(shape: Shape, random: np.random.Generator) -> EncodedText:
    asked, said = int(random.integers(8, 25)), int(random.integers(10, 61))
    return EncodedText(tuple(random.integers(3, shape.vocab - 2, asked + said).tolist()), asked)


def filled(ids: Sequence[Sequence[int]], length: int, value: int = 0) -> Tensor:
    """[B, length] with `value` behind each row."""
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in ids])


class Normalised(torch.utils.data.Dataset):
    """A dataset as the peers read it: pictures normalised one by one, as their image processors do, and token ids."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, EncodedText]:
        number, (text,) = self.dataset.rows[index]
        image = torch.from_numpy(self.dataset.images[number]).float().div_(255)
        return image.sub_(self.mean).div_(self.std), text


def now() -> np.ndarray:
    """Seconds of the clock and of CPU time of this process, when the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


# --- ours ----------------------------------------------------------------------------------------------------------

def our_config(shape: Shape) -> VLMConfig:
    vision = VisionConfig(
        transformer=TransformerConfig(shape.vision.width, shape.vision.depth, shape.vision.heads,
                                      hidden=shape.vision.inner),
        image_size=shape.image, patch_size=shape.patch, stem_bias=False, class_token=True, pool="class",
        input_norm=True, layer=-1 if shape.embed else -2,
    )
    tower = shape.text
    sizes = {"width": tower.width, "depth": tower.depth, "heads": tower.heads, "hidden": tower.inner}
    if shape.embed:
        text = TextConfig(TransformerConfig(**sizes), shape.vocab, shape.context, pool="last")
        return VLMConfig(vision, text, FusionConfig("none"), HeadsConfig(projection=ProjectionConfig(shape.embed)))
    llama = TransformerConfig(**sizes, kv_heads=tower.kv_heads, norm="rms", activation="silu", gated=True, bias=False)
    text = TextConfig(llama, shape.vocab, shape.context, positions="rotary")
    fusion = FusionConfig("prefix", projector="mlp", attention="causal")
    return VLMConfig(vision, text, fusion, HeadsConfig(language_model=LanguageModelConfig(tied=shape.tied)))


class LongBatches(Batches):
    """The same batches with texts filled up to `length` tokens."""

    length = 0

    def at(self, step: int) -> dict[str, Tensor]:
        batch = super().at(step)
        missing = self.length - batch["tokens"].shape[1]
        fill = {"labels": -100}
        return {
            name: F.pad(values, (0, missing), value=fill.get(name, 0)) if values.ndim == 2 else values
            for name, values in batch.items()
        }


class Ours:
    """`vlmpipe.train.loop.train`. `length`: of every text; 0: of the longest in its batch. `pack`: tokens of a row that
    several samples share, of which `run.batch` are a batch."""

    def __init__(self, shape: Shape, dataset: Dataset, run: Run, name: str = "ours", length: int = 0, pack: int = 0):
        self.name, self.run, self.facts = name, run, []
        torch.manual_seed(0)
        self.model = VisionLanguageModel(our_config(shape))
        self.objective = make_objective(None, self.model)
        if pack:
            self.batches = PackedBatches(Packer(dataset, pack, places_of(self.model, dataset.images)), run.batch)
        elif length:
            self.batches = LongBatches(dataset, run.batch)
            self.batches.length = length
        else:
            self.batches = Batches(dataset, run.batch)
        self.config = TrainConfig(
            steps=run.warm + run.steps, batch_size=run.batch, precision=run.precision, compile=run.compile,
            log_every=run.warm, checkpoint_every=run.warm + run.steps, keep=1,
            optimizer=OptimizerConfig(LR, DECAY, BETAS, EPS, CLIP, schedule=ScheduleConfig("constant", warmup=1)),
        )

    def window(self) -> np.ndarray:
        """Samples a second (see `now`), after the warm-up; the checkpoint at the end is not in it."""
        times, self.facts = [], []

        def note(facts: dict) -> None:
            times.append(now())
            self.facts.append(facts)

        with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
            train(self.model, self.objective, self.batches, self.config, Path(folder), report=note)
        return self.samples() / (times[-1] - times[0])

    def samples(self) -> int:
        """On the clock; a packed row holds several."""
        if not isinstance(self.batches, PackedBatches):
            return self.run.batch * self.run.steps
        steps = range(self.run.warm, self.run.warm + self.run.steps)
        return sum(len(members) for step in steps for members in self.batches.indices(step))


# --- transformers --------------------------------------------------------------------------------------------------

def their_vision(shape: Shape) -> dict:
    tower = shape.vision
    return {
        "hidden_size": tower.width, "intermediate_size": tower.inner, "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads, "image_size": shape.image, "patch_size": shape.patch, "hidden_act": "gelu",
    }


def their_clip(shape: Shape):
    from transformers import CLIPConfig, CLIPModel

    tower = shape.text
    text = {
        "hidden_size": tower.width, "intermediate_size": tower.inner, "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads, "vocab_size": shape.vocab, "max_position_embeddings": shape.context,
        "hidden_act": "gelu", "eos_token_id": shape.vocab - 1, "bos_token_id": 1, "pad_token_id": 0,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=their_vision(shape), projection_dim=shape.embed))


def their_llava(shape: Shape):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tower = shape.text
    text = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=tower.width, intermediate_size=tower.inner,
        num_hidden_layers=tower.depth, num_attention_heads=tower.heads,
        num_key_value_heads=tower.kv_heads or tower.heads, max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied, pad_token_id=0, use_cache=False,
    )
    return LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(**their_vision(shape)), text_config=text, image_token_index=shape.vocab - 1,
        image_seq_length=shape.patches, vision_feature_layer=-2, tie_word_embeddings=shape.tied,
    ))


class Transformers:
    """Its model in its Trainer, as it is by default, with the same rate, decay and clipping."""

    def __init__(self, shape: Shape, dataset: Dataset, run: Run, name: str = "transformers", length: int = 0):
        self.name, self.run, self.shape, self.length = name, run, shape, length
        self.dataset = Normalised(dataset)
        torch.manual_seed(0)
        self.model = their_clip(shape) if shape.embed else their_llava(shape)

    def collate(self, samples: list[tuple[Tensor, EncodedText]]) -> dict:
        pictures = torch.stack([picture for picture, _ in samples])
        texts = [text for _, text in samples]
        return (self.pairs if self.shape.embed else self.rows)(texts) | {"pixel_values": pictures}

    def pairs(self, texts: list[EncodedText]) -> dict:
        length = self.length or max(len(text.ids) for text in texts)
        mask = filled([[1] * len(text.ids) for text in texts], length)
        return {"input_ids": filled([text.ids for text in texts], length), "attention_mask": mask, "return_loss": True}

    def rows(self, texts: list[EncodedText]) -> dict:
        before = [self.shape.vocab - 1] * self.shape.patches
        length = len(before) + max(len(text.ids) for text in texts)
        labels = [[-100] * (len(before) + text.start) + list(text.ids[text.start:]) for text in texts]
        return {
            "input_ids": filled([[*before, *text.ids] for text in texts], length),
            "attention_mask": filled([[1] * (len(before) + len(text.ids)) for text in texts], length),
            "labels": filled(labels, length, -100),
        }

    def window(self) -> np.ndarray:
        from transformers import Trainer, TrainerCallback, TrainingArguments

        times, run = [], self.run

        class Clock(TrainerCallback):
            def on_step_end(self, args, state, control, **others):
                times.append(now())

        with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
            arguments = TrainingArguments(
                folder, max_steps=run.warm + run.steps, per_device_train_batch_size=run.batch, learning_rate=LR,
                weight_decay=DECAY, adam_beta1=BETAS[0], adam_beta2=BETAS[1], adam_epsilon=EPS, max_grad_norm=CLIP,
                lr_scheduler_type="constant", bf16=run.precision == "bf16", save_strategy="no", report_to=[],
                disable_tqdm=True, logging_strategy="no", remove_unused_columns=False,
                dataloader_num_workers=run.workers, use_cpu=not torch.cuda.is_available(), torch_compile=run.compile,
            )
            trainer = Trainer(
                self.model, arguments, data_collator=self.collate, train_dataset=self.dataset, callbacks=[Clock()]
            )
            trainer.train()
        return run.batch * run.steps / (times[-1] - times[run.warm - 1])


# --- open_clip -----------------------------------------------------------------------------------------------------

def find_open_clip(cache: Path) -> None:
    """Make `open_clip` importable: the installed one, or one in a folder of its own (made once, from a package index).

    It imports torchvision for what happens to pictures before they come here; where torchvision is missing, names
    without a function stand in for it. Its model, loss, and training loop are its own.
    """
    import transformers  # looks for torchvision by itself

    if not importable("open_clip"):
        folder = cache / OPEN_CLIP.replace("==", "-")
        if not (folder / "open_clip").exists():
            pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
            subprocess.run([*pip, "--target", str(folder), OPEN_CLIP, *BESIDE_OPEN_CLIP], check=True)
        sys.path.append(str(folder))
    with contextlib.nullcontext() if transformers.utils.is_torchvision_available() else stand_in():
        import open_clip_train.train  # noqa: F401


def importable(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """Names of torchvision that do nothing, while `open_clip` is imported."""
    members = {
        "torchvision": (), "torchvision.transforms": (
            "Normalize", "Compose", "RandomResizedCrop", "InterpolationMode", "ToTensor", "Resize", "CenterCrop",
            "ColorJitter", "Grayscale",
        ),
        "torchvision.transforms.functional": (), "torchvision.ops": (), "torchvision.ops.misc": ("FrozenBatchNorm2d",),
    }
    modules = {name: types.ModuleType(name) for name in members}
    for name, module in modules.items():
        for member in members[name]:
            setattr(module, member, type(member, (torch.nn.Module,), {"BICUBIC": 3, "BILINEAR": 2}))
        above, _, last = name.rpartition(".")
        if above:
            setattr(modules[above], last, module)
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


class Loader:
    """Endless batches as `train_one_epoch` wants them, `steps` of them; `times` holds when each was asked for."""

    def __init__(self, loader: torch.utils.data.DataLoader, steps: int):
        self.loader, self.num_batches, self.num_samples = loader, steps, steps * loader.batch_size
        self.times: list[np.ndarray] = []
        self.dataloader = self

    def set_epoch(self, epoch: int) -> None:
        """Samples are drawn anew anyway."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        given = 0
        while given < self.num_batches:
            for batch in self.loader:
                self.stamp()
                yield batch
                given += 1
                if given == self.num_batches:
                    break
        self.stamp()

    def stamp(self) -> None:
        self.times.append(now())


class OpenClip:
    """Its CLIP, its ClipLoss and its own `train_one_epoch`, with AdamW made as its `main` does."""

    def __init__(self, shape: Shape, dataset: Dataset, run: Run, name: str = "open_clip"):
        from open_clip.loss import ClipLoss
        from open_clip.model import CLIP as Model

        self.name, self.run, self.shape = name, run, shape
        torch.manual_seed(0)
        self.model = Model(
            shape.embed,
            {"layers": shape.vision.depth, "width": shape.vision.width,
             "head_width": shape.vision.width // shape.vision.heads, "patch_size": shape.patch,
             "image_size": shape.image},
            {"context_length": shape.context, "vocab_size": shape.vocab, "width": shape.text.width,
             "heads": shape.text.heads, "layers": shape.text.depth},
            output_dict=True,
        )
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.step = torch.compile(self.model) if run.compile else self.model
        self.loss = ClipLoss()
        self.loader = torch.utils.data.DataLoader(
            Normalised(dataset), run.batch, shuffle=True, drop_last=True, num_workers=run.workers,
            collate_fn=self.collate, pin_memory=torch.cuda.is_available(),
        )

    def collate(self, samples: list[tuple[Tensor, EncodedText]]) -> tuple[Tensor, Tensor]:
        tokens = filled([text.ids for _, text in samples], self.shape.context)
        return torch.stack([picture for picture, _ in samples]), tokens

    def optimizer(self) -> torch.optim.AdamW:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(
            [{"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
             {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": DECAY}],
            lr=LR, betas=BETAS, eps=EPS,
        )

    def window(self) -> np.ndarray:
        from open_clip_train.train import train_one_epoch

        run = self.run
        device = "cuda" if torch.cuda.is_available() else "cpu"
        arguments = argparse.Namespace(
            device=device, precision="amp_bf16" if run.precision == "bf16" else "fp32", distill=False, accum_freq=1,
            skip_scheduler=True, grad_clip_norm=CLIP, horovod=False, rank=0, local_rank=0, log_local=False,
            log_every_n_steps=100, batch_size=run.batch, world_size=1, wandb=False, save_logs=False,
        )
        loader = Loader(self.loader, run.warm + run.steps)
        train_one_epoch(self.step, {"train": loader}, self.loss, 0, self.optimizer(), None, None, None, arguments)
        return run.batch * run.steps / (loader.times[-1] - loader.times[run.warm])


# --- side by side --------------------------------------------------------------------------------------------------

def interleave(sides: Sequence, rounds: int) -> dict[str, np.ndarray]:
    """[rounds, 2] samples a second of every side, by the clock and by CPU time; the sides take turns, and another
    begins each time."""
    rates: dict[str, list[np.ndarray]] = {side.name: [] for side in sides}
    for number in range(rounds):
        for place in range(len(sides)):
            side = sides[(number + place) % len(sides)]
            rates[side.name].append(side.window())
        print("  round", number + 1, {name: found[-1].round(1).tolist() for name, found in rates.items()}, flush=True)
    return {name: np.stack(found) for name, found in rates.items()}


def verdict(rates: dict[str, np.ndarray], ours: str, peer: str, target: float) -> bool:
    """Print the ratio of two sides, by the clock and by CPU time: the median over rounds of the ratio in each. The
    clock decides."""
    mine, theirs = np.median(rates[ours], axis=0), np.median(rates[peer], axis=0)
    ratios = rates[ours] / rates[peer]
    ratio, cpu = np.median(ratios, axis=0)
    met = bool(ratio >= target)
    print(f"{ours} {mine[0]:.1f} samples/s, {peer} {theirs[0]:.1f}: ratio {ratio:.2f} ({ratios[:, 0].min():.2f} to "
          f"{ratios[:, 0].max():.2f}), target {target:g}: {'met' if met else 'NOT met'}; by CPU time {mine[1]:.1f} and "
          f"{theirs[1]:.1f}: ratio {cpu:.2f} ({ratios[:, 1].min():.2f} to {ratios[:, 1].max():.2f})", flush=True)
    return met


def parameters(sides: Sequence) -> str:
    return ", ".join(f"{side.name} {sum(p.numel() for p in side.model.parameters()):,}" for side in sides)
