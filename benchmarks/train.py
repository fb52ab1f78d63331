"""Samples a second in training on CPU: our loop, open_clip's and transformers' Trainer, side by side.

    make bench-train        python benchmarks/train.py [--part clip|llava] [--precision float32|bf16] [--rounds N]

The same shapes, batch, precision, samples, threads and machine in one process. Each side trains in windows that take
turns, so that noise hits all alike; the first step of a window is not timed. A ratio is the median over rounds.

clip: ViT of width 384 and depth 6 on 128 pixels with a text tower of width 256 and depth 4, vocabulary and context as
CLIP's. Our batches are as long as their longest caption; open_clip's are always 77 tokens long, and so are those of
transformers' contrastive example; so both ways are shown for us and for transformers.
llava: that ViT before a Llama of width 256 and depth 6 with 7,168 words: its output matrix has the share of the weights
that it has in Qwen2.5-0.5B, 28%. Both sides fill up to the longest row.

open_clip goes into a folder of its own under --cache (made on the first run, from a package index). It imports
torchvision; where there is none, empty names stand in for its transforms, which aren't used here.
"""

import argparse
import gc
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.train_sides import (
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
    parameters,
    verdict,
)

TARGET = 1.2
VISION = Tower(384, 6, 6)
CLIP = Shape(VISION, Tower(256, 4, 4), image=128, patch=16, vocab=49408, context=77, embed=256)
LLAVA = Shape(VISION, Tower(256, 6, 4, hidden=688), image=128, patch=16, vocab=7168, context=512)


def clip(shape: Shape, run: Run, rounds: int, cache: Path) -> bool:
    find_open_clip(cache)
    dataset = draw(shape, 8 * run.batch)
    equal = f"ours at {shape.context} tokens"
    sides = [
        Ours(shape, dataset, run), OpenClip(shape, dataset, run),
        Transformers(shape, dataset, run, f"transformers at {shape.context} tokens", shape.context),
        Ours(shape, dataset, run, equal, shape.context), Transformers(shape, dataset, run),
    ]
    print(f"CLIP ViT, {run.precision}, batch {run.batch}; parameters: {parameters(sides)}")
    rates = interleave(sides, rounds)
    fixed = sides[2].name
    print("as each is used:")
    met = [verdict(rates, "ours", peer, TARGET) for peer in ("open_clip", fixed)]
    print("texts of equal length:")
    verdict(rates, equal, "open_clip", TARGET)
    verdict(rates, equal, fixed, TARGET)
    verdict(rates, "ours", "transformers", TARGET)
    return all(met)


def llava(shape: Shape, run: Run, rounds: int, cache: Path) -> bool:
    dataset = draw(shape, 8 * run.batch)
    sides = [Ours(shape, dataset, run), Transformers(shape, dataset, run)]
    print(f"LLaVA-style, {run.precision}, batch {run.batch}; parameters: {parameters(sides)}")
    return verdict(interleave(sides, rounds), "ours", "transformers", TARGET)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("clip", "llava"), action="append", help="default: both")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a window")
    parser.add_argument("--tiny", action="store_true", help="smallest shapes: proves that it runs, measures nothing")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/vlmpipe", help="of open_clip")
    options = parser.parse_args()
    run = Run(options.batch, options.precision, warm=1, steps=options.steps)
    shapes = TINY if options.tiny else {"clip": CLIP, "llava": LLAVA}
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    met = []
    for part in options.part or ("clip", "llava"):
        met.append({"clip": clip, "llava": llava}[part](shapes[part], run, options.rounds, options.cache))
        gc.collect()
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
