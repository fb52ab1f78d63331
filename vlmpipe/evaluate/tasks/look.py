"""Where the model looks, for a few samples of a task."""

import io
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmpipe.evaluate.tasks.base import Sample, decode
from vlmpipe.models import Processor, VisionLanguageModel
from vlmpipe.models.generate import attention_map
from vlmpipe.shards import write_bytes_atomic


def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """`count` samples, in turn from each question type, so that every kind is seen."""
    turns: Counter = Counter()
    ranked = []
    for index, sample in enumerate(samples):
        kind = sample.slices.get("question_type", "")
        ranked.append((turns[kind], index))
        turns[kind] += 1
    return [samples[index] for _, index in sorted(ranked)[:count]]


def look(
    model: VisionLanguageModel, processor: Processor, samples: Sequence[Sample], pictures: Mapping[Any, bytes]
) -> list[dict[str, np.ndarray]]:
    """For each sample `map` [h, w] float32, the model's attention over the picture, and `picture` [Y, X, 3] uint8.

    Nothing for a model that can't show it: neither words to explain nor a space that patches share with words.
    """
    if model.vision is None or (model.language_model is None and model.projection is None):
        return []
    looks = []
    for sample in samples:
        if isinstance(sample.image, tuple):  # no map lies over several pictures
            return []
        picture = decode(pictures, sample.image)
        # A dual encoder needs words to look for.
        text = sample.question or (sample.answers[0] if model.language_model is None else "")
        weights = attention_map(model, processor, picture, text).detach().float().numpy()
        looks.append({"map": weights, "picture": np.asarray(picture)})
    return looks


def write_attention(directory: Path, looks: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """One NAME.npz each; those of an earlier run go."""
    shutil.rmtree(directory, ignore_errors=True)
    for name, arrays in looks.items():
        archive = io.BytesIO()
        np.savez_compressed(archive, **arrays)
        write_bytes_atomic(directory / f"{name}.npz", archive.getvalue())
