"""The blind twin: what a model says without a picture, for lack of another way with a blank one of its mean colour.

What it gets right then, the text alone gives away (arXiv 1612.00837), in the questions or in what it learned to expect.
The base task is that of the records: questions, classes, statements or referring expressions.
"""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from vlmpipe.data.task import TaskConfig
from vlmpipe.evaluate.tasks.base import EvaluateConfig, Sample, Scores, means
from vlmpipe.evaluate.tasks.conditions import hits, predict_under, read_base, renamed, score_under
from vlmpipe.models import Processor, VisionLanguageModel


def read_prior(split: Path, files: TaskConfig) -> list[Sample]:
    return read_base(split, files, "text_prior")


def predict_prior(
    model: VisionLanguageModel, processor: Processor, batch: Sequence[Sample], right: Sequence, wrong: Sequence,
    config: EvaluateConfig,
) -> list[dict]:
    """What the model says with the right, the wrong and a blank picture."""
    nothing = {"blank": [blank(model, seen) for seen in right]}
    return predict_under(model, processor, batch, right, wrong, nothing, config)


def blank(model: VisionLanguageModel, seen):
    """A picture of that size, or pictures, of the colour that the model's normalisation makes zero."""
    if isinstance(seen, tuple):
        return tuple(blank(model, picture) for picture in seen)
    return Image.new("RGB", seen.size, tuple(round(255 * value) for value in model.config.vision.mean))


def score_prior(samples: list[Sample], rows: list[dict]) -> Scores:
    """The base task's accuracies, the same with the blank picture (`accuracy_blank`), and what looking adds to that."""
    clean, prior = score_under(samples, rows), score_under(samples, rows, "blank")
    blind = hits(prior)
    gain = {key: hit - blind[key] for key, hit in hits(clean).items()}
    counts = {
        **renamed(clean.counts, "accuracy", "accuracy"), **renamed(prior.counts, "accuracy", "accuracy_blank"),
        **renamed(clean.counts, "accuracy_wrong_image", "accuracy_wrong_image"),
        **renamed(clean.counts, "accuracy_blind", "accuracy_blind"), "gain_over_blank": means(gain),
    }
    return Scores.of(counts, clean.rows)
