"""Samples a second and MFU in training on a GPU: CLIP ViT-B/16, and a packed LLaVA-style model with a 0.5B text model.

    make bench-train-gpu        python benchmarks/train_gpu.py [--part clip|llava] [--compile] [--tiny]

Needs torch and transformers and what they bring, no installation of this project: run it in a checkout. transformers
trains in its Trainer where `accelerate` is installed, else in the plain loop of its documentation. open_clip takes part
where it is installed, and the missing are named. All sides: bf16 autocast, the same shapes, batch and samples, data
loading included; windows take turns, a ratio is the median over rounds.

clip: ViT-B/16 at 224 pixels with CLIP's text tower. Ours against open_clip (target 1.3) and transformers (1.5); MFU
at least 50%.
llava: ViT-B/16 before a language model of Qwen2.5-0.5B's shape, pictures of 196 tokens; ours packs samples into rows of
4,096 tokens, transformers fills up to the longest of its batch. Target 1.5, MFU at least 45%.

MFU: the arithmetic of our step, counted, over what NVIDIA's data sheet says is the peak of dense bf16. On a machine
without a GPU this says so, takes the smallest shapes, and its figures mean nothing.
"""

import argparse
import gc
import importlib.util
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
PILLOW = importlib.util.find_spec("PIL") is not None
if not PILLOW:  # torch and transformers do without it; pictures are drawn here, so nothing is ever asked of it
    sys.modules["PIL"] = MagicMock()

from benchmarks.train_sides import (  # noqa: E402
    BETAS,
    CLIP,
    DECAY,
    EPS,
    LR,
    TINY,
    OpenClip,
    Ours,
    Run,
    Shape,
    Tower,
    Transformers,
    draw,
    find_open_clip,
    interleave,
    now,
    parameters,
    verdict,
)

if not PILLOW:
    del sys.modules["PIL"]  # transformers looks for it
B16 = Tower(768, 12, 12)
SHAPES = {
    "clip": Shape(B16, Tower(512, 12, 8), image=224, patch=16, vocab=49408, context=77, embed=512),
    "llava": Shape(B16, Tower(896, 24, 14, hidden=4864, kv_heads=2), image=224, patch=16, vocab=151936, context=4096,
                   tied=True),
}
TARGETS = {"open_clip": 1.3, "transformers": 1.5}
MFU = {"clip": 0.50, "llava": 0.45}


class PlainLoop(Transformers):
    """The model of transformers in a loop as its documentation has it, where its Trainer can't be had."""

    def window(self) -> np.ndarray:
        run, device = self.run, "cuda" if torch.cuda.is_available() else "cpu"
        model = self.model.to(device).train()
        step = torch.compile(model) if run.compile else model
        optimizer = torch.optim.AdamW(model.parameters(), LR, BETAS, EPS, DECAY, fused=True)
        loader = torch.utils.data.DataLoader(
            self.dataset, run.batch, shuffle=True, drop_last=True, num_workers=run.workers, collate_fn=self.collate,
            pin_memory=device == "cuda",
        )
        times = []
        while len(times) < run.warm + run.steps:
            for batch in loader:
                moved = {name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                         for name, value in batch.items()}
                with torch.autocast(device, torch.bfloat16, enabled=run.precision == "bf16"):
                    loss = step(**moved).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
                times.append(now())
                if len(times) == run.warm + run.steps:
                    break
        return run.batch * run.steps / (times[-1] - times[run.warm - 1])


def transformers_side(shape: Shape, dataset, run: Run, length: int = 0) -> Transformers:
    if importlib.util.find_spec("accelerate"):
        return Transformers(shape, dataset, run, length=length)
    print("accelerate is not installed: transformers trains in a plain loop instead of its Trainer")
    return PlainLoop(shape, dataset, run, length=length)


def open_clip_side(shape: Shape, dataset, run: Run, cache: Path) -> list[OpenClip]:
    if not importlib.util.find_spec("open_clip") and not cache.exists():
        print("open_clip is not installed: not compared (pip install open_clip_torch, or --cache DIR to fetch it)")
        return []
    find_open_clip(cache)
    return [OpenClip(shape, dataset, run)]


def clip(shape: Shape, run: Run, options: argparse.Namespace) -> None:
    dataset = draw(shape, 4 * run.batch)
    peers = open_clip_side(shape, dataset, run, options.cache)
    peers.append(transformers_side(shape, dataset, run, shape.context))
    judge("clip", Ours(shape, dataset, run), peers, options.rounds)


def llava(shape: Shape, run: Run, options: argparse.Namespace) -> None:
    pack = 128 if options.tiny else 4096
    samples = max(1, pack // (shape.patches + 52))  # of a packed row, about
    dataset = draw(shape, 8 * run.batch * samples)
    ours = Ours(shape, dataset, run, pack=pack)
    peer = transformers_side(shape, dataset, replace(run, batch=run.batch * samples))
    judge("llava", ours, [peer], options.rounds)


def judge(part: str, ours: Ours, peers: list, rounds: int) -> None:
    run = ours.run
    print(f"{part}, {run.precision}, batch {run.batch}; parameters: {parameters([ours, *peers])}", flush=True)
    rates = interleave([ours, *peers], rounds)
    if not torch.cuda.is_available():
        print("it runs; no GPU, so nothing was measured")
        return
    for peer in peers:
        verdict(rates, "ours", peer.name, TARGETS[peer.name])
    shares = [facts["mfu"] for facts in ours.facts[1:] if "mfu" in facts]
    if not shares:
        print("MFU: not measured; the peak of this GPU is not known")
        return
    share = statistics.median(shares)
    print(f"MFU {share:.1%}, target {MFU[part]:.0%}: {'met' if share >= MFU[part] else 'NOT met'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("clip", "llava"), action="append", help="default: both")
    parser.add_argument("--batch", type=int, help="default: 256 pairs, 8 packed rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a window, a multiple of --warm")
    parser.add_argument("--warm", type=int, default=5, help="steps of a window before the clock")
    parser.add_argument("--workers", type=int, default=8, help="processes that load data for the peers")
    parser.add_argument("--compile", action="store_true", help="torch.compile on all sides")
    parser.add_argument("--tiny", action="store_true", help="smallest shapes: proves that it runs, measures nothing")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/vlmpipe", help="of open_clip")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("found no GPU: smallest shapes on CPU; the figures below mean nothing")
        options.tiny = True
    for part in options.part or ("clip", "llava"):
        batch = options.batch or (4 if options.tiny else {"clip": 256, "llava": 8}[part])
        run = Run(batch, "bf16", options.warm, options.steps, options.workers, options.compile)
        {"clip": clip, "llava": llava}[part]((TINY if options.tiny else SHAPES)[part], run, options)
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
