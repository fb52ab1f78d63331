"""Text to image: are pictures that a model draws like real ones, and do they show what their caption says?

Shapes: B captions, E width of the scorer's space.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from vlmpipe.data.task import TaskConfig
from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import clip_score, fid
from vlmpipe.evaluate.store import Counts
from vlmpipe.evaluate.tasks.base import EvaluateConfig, Sample, Scores, means
from vlmpipe.evaluate.tasks.captions import read_captions
from vlmpipe.models import Processor, VisionLanguageModel
from vlmpipe.models.draw import draw, picture_loss
from vlmpipe.models.scorer import Scorer, load_scorer


def read_drawings(directory: Path, task: TaskConfig | None = None) -> list[Sample]:
    """One sample per packed pair; what it is drawn from beside its own caption is that of another picture
    (`wrong_truth`)."""
    samples = read_captions(directory, task)
    caption_of = {sample.id: sample.answers[0] for sample in samples}
    return [replace(sample, wrong_truth=caption_of[sample.wrong_image]) for sample in samples]


def predict_drawings(
    model: VisionLanguageModel, processor: Processor, batch: Sequence[Sample], right: Sequence[Image.Image],
    wrong: Sequence[Image.Image], config: EvaluateConfig,
) -> list[dict]:
    """The loss of the true picture's codes after its caption and after the other one; and the scorer's embeddings of
    the true picture, of what is drawn from either caption, and of the caption.

    Raises:
        UserError: the model writes no pictures, or no scorer is named.
    """
    if model.image_tokens is None:
        raise UserError(
            "found a model without heads.image_tokens; expected one for the task 'text_to_image'; use "
            "model=text-to-image or choose other tasks in evaluate"
        )
    scorer = scorer_of(config.drawing.scorer)
    texts, others = ([said(sample) for sample in batch] for said in (lambda s: s.answers[0], lambda s: s.wrong_truth))
    pixels = processor.images(right)
    losses = [picture_loss(model, processor, pixels, said).tolist() for said in (texts, others)]
    drawn = [paint(model, processor, batch, said, config) for said in (texts, others)]
    embedded = [scorer.encode_images(pictures).numpy() for pictures in (right, *drawn)]
    names = ("nll", "wrong_nll", "real", "made", "wrong_made", "text")
    columns = zip(*losses, *embedded, scorer.encode_texts(texts).numpy(), strict=True)
    return [dict(zip(names, row, strict=True)) | {"tokens": model.codes.config.length} for row in columns]


def paint(
    model: VisionLanguageModel, processor: Processor, batch: Sequence[Sample], texts: Sequence[str],
    config: EvaluateConfig,
) -> list[Image.Image]:
    """A picture for each text. A sample's seed is its own, so that no batch changes what is drawn."""
    seeds = [config.seed + zlib.crc32(sample.id.encode()) for sample in batch]
    how = config.drawing
    return draw(
        model, processor, texts, temperature=how.temperature, top_k=how.top_k, guidance=how.guidance, seed=seeds
    )


@lru_cache(maxsize=1)
def scorer_of(source: str | None) -> Scorer:
    """Loaded once in a worker.

    Raises:
        UserError: none is named, or what `load_scorer` says.
    """
    if source is None:
        raise UserError(
            "evaluate.drawing.scorer: found none; expected a dual encoder to judge what is drawn; name its directory, "
            "such as that of the pipeline's scorer"
        )
    return load_scorer(source)


# --- scores ------------------------------------------------------------------------------------------------

def score_drawings(samples: list[Sample], rows: list[dict]) -> Scores:
    """Perplexity of true pictures' codes after either caption; CLIPScore of what is drawn from the caption, of what is
    drawn from another one and of the true picture; the Frechet distance between drawn and true pictures.

    The distance is of the whole set and has no counts; see `metrics.fid` for what few pictures make of it.
    """
    by_id = {sample.id: row for sample, row in zip(samples, rows, strict=True)}
    text = column(by_id, "text")
    scores = {name: clip_score(column(by_id, name), text) for name in ("made", "wrong_made", "real")}
    counts = {
        "perplexity": codes(by_id, "nll"), "perplexity_wrong_caption": codes(by_id, "wrong_nll"),
        "clip_score": means(scores["made"].per_sample),
        "clip_score_wrong_caption": means(scores["wrong_made"].per_sample),
        "clip_score_gain": means({
            key: score - scores["wrong_made"].per_sample[key] for key, score in scores["made"].per_sample.items()
        }),
        "clip_score_real": means(scores["real"].per_sample),
    }
    stored = {
        key: {"score": score, "wrong_score": scores["wrong_made"].per_sample[key]}
        for key, score in scores["made"].per_sample.items()
    }
    distance = fid(column(by_id, "made"), column(by_id, "real"))
    found = Scores.of(counts, stored, {"fid": distance.details})
    whole = {
        "caption_gain": found.metrics["perplexity_wrong_caption"] / found.metrics["perplexity"], "fid": distance.value
    }
    return replace(found, metrics=found.metrics | whole, n=found.n | dict.fromkeys(whole, len(samples)))


def column(by_id: Mapping[str, Mapping], name: str) -> dict[str, Any]:
    return {key: row[name] for key, row in by_id.items()}


def codes(by_id: Mapping[str, Mapping], name: str) -> Counts:
    return Counts("exp_ratio", {key: (row[name], float(row["tokens"])) for key, row in by_id.items()})
