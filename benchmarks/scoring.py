"""What scoring costs beside the model itself: annotate's embeddings and scores against the bare model.

    make bench-scoring        python benchmarks/scoring.py [--pairs N] [--batch-size N] [--rounds N]

A CLIP of ViT-B/32's size with random weights, written and loaded as a Hugging Face directory. Bare: image and text
towers on tensors that wait in memory, in batches. Ours: annotate's own loop from encoded pictures and captions to typed
columns (decode, resize, normalise, tokenise, forward, cosine, float16 columns), made ready on threads beside the
forward pass. Both in turns, with the same batches, threads and padding. Two shares are printed: of wall time (a core is
free for the threads, or the model is on a GPU), and of CPU time (every core has a worker of its own, so what runs
beside the model is paid for). On a CPU the lower one counts.
"""

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vlmpipe.curate.annotators.loop import Row, measure
from vlmpipe.curate.annotators.table import AnnotateConfig
from vlmpipe.dispatch import limit_threads
from vlmpipe.images import decode_rgb

TARGET = 0.95
WORDS = "a the red blue large small dog cat house tree river street person photo of in on with near old".split()
OFF = dict.fromkeys(("geometry", "quality", "hashes", "text", "language", "pii"))


def write_clip(folder: Path, layers: int | None) -> None:
    """A Hugging Face directory of openai/clip-vit-base-patch32's shape: 151M random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = CLIPConfig()  # its defaults are ViT-B/32 but for the width of the shared space
    if layers:
        config.text_config.num_hidden_layers = config.vision_config.num_hidden_layers = layers
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil().save_pretrained(folder)
    marks = ["<|startoftext|>", "<|endoftext|>", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate([*marks, *WORDS])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{marks[0]} $A {marks[1]}", special_tokens=[(marks[0], 0), (marks[1], 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=marks[0], eos_token=marks[1], pad_token=marks[1], unk_token="<unk>",
        model_max_length=77,
    ).save_pretrained(folder)


def made_rows(count: int) -> list[Row]:
    """Pictures of 256 to 400 pixels a side as jpeg, captions of 8 to 20 words."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        size = int(rng.integers(256, 400)), int(rng.integers(256, 400))
        buffer = io.BytesIO()
        coarse.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        rows.append(Row(str(number), " ".join(rng.choice(WORDS, rng.integers(8, 21))), buffer.getvalue()))
    return rows


def batches(rows: list[Row], size: int) -> Iterator[tuple[list[Row], dict]]:
    return ((rows[at : at + size], {}) for at in range(0, len(rows), size))


class Bare:
    """The model by itself, through transformers, and the tensors of every batch where it will want them."""

    def __init__(self, folder: str, rows: list[Row], size: int, device: torch.device):
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        self.model = AutoModel.from_pretrained(folder, trust_remote_code=False).to(device).eval()
        pictures = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.tensors = []
        for part, _ in batches(rows, size):
            pixels = pictures(images=[decode_rgb(row.data) for row in part], return_tensors="pt")
            tokens = tokenizer([row.caption for row in part], padding=True, return_tensors="pt")
            self.tensors.append((pixels.to(device), tokens.to(device)))

    @torch.inference_mode()
    def run(self, count: int | None = None) -> None:
        for pixels, tokens in self.tensors[:count]:
            self.model.get_image_features(**pixels)
            self.model.get_text_features(**tokens)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()


def clocked(work: Callable[[], None]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def ours(annotators: dict, rows: list[Row], config: AnnotateConfig) -> None:
    tables = list(measure(batches(rows, config.batch_size), annotators, config.threads))
    assert sum(map(len, tables)) == len(rows) and not any(t["clip_score"].null_count for t in tables)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=None, help="256 on a CPU, 8192 on a GPU")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None, help="that decode: 1 on a CPU, 8 on a GPU")
    parser.add_argument("--layers", type=int, default=None, help="for trying the benchmark: fewer than 12")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    print(f"device: {torch.cuda.get_device_name() if gpu else 'CPU; no GPU here, so none is measured'}")
    pairs, threads = options.pairs or (8192 if gpu else 256), options.threads or (8 if gpu else 1)
    limit_threads(1)  # as every shard's worker computes
    config = AnnotateConfig(batch_size=options.batch_size, threads=threads, **OFF)
    with tempfile.TemporaryDirectory(prefix="bench-scoring-") as name:
        write_clip(Path(name), options.layers)
        annotators = config.build(["embeddings"], name)
        rows = made_rows(pairs)
        bare = Bare(name, rows, options.batch_size, annotators["embeddings"].tools.scorer.device)
        bare.run(1)  # both warm up: what is imported and allocated once is no part of the throughput
        ours(annotators, rows[: options.batch_size], config)
        total = np.zeros((2, 2))  # bare and ours; wall and CPU seconds
        for number in range(options.rounds):
            spent = np.array([clocked(bare.run), clocked(lambda: ours(annotators, rows, config))])
            total += spent
            print(f"round {number + 1}: pairs/s of wall time: bare model {pairs / spent[0, 0]:.2f}, annotate "
                  f"{pairs / spent[1, 0]:.2f}; of CPU time: {pairs / spent[0, 1]:.2f}, {pairs / spent[1, 1]:.2f}",
                  flush=True)
    wall, cpu = total[0] / total[1]
    ratio = wall if gpu else min(wall, cpu)
    print(f"{pairs} pairs in batches of {options.batch_size}, model on {torch.get_num_threads()} thread(s), "
          f"{threads} beside it")
    print(f"share of the bare model's throughput: {100 * wall:.1f}% of wall time, {100 * cpu:.1f}% of CPU time "
          f"(target {100 * TARGET:.0f}%)")
    return 0 if ratio >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
