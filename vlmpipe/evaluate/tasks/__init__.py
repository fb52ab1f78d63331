"""Tasks: what a model is asked on held-out data, with the right picture and with a wrong one, and the numbers from it.

A task binds a reader, what the model does with a batch, and the metrics of the answers. A model that scores as
well with the wrong picture does not look.
"""

from vlmpipe.evaluate.tasks.base import EvaluateConfig, Sample, Scores, Task, decode, mismatch, slug
from vlmpipe.evaluate.tasks.captions import caption_loss, predict_captions, score_captions
from vlmpipe.evaluate.tasks.chunks import device, split
from vlmpipe.evaluate.tasks.look import spread
from vlmpipe.evaluate.tasks.run import TASKS, choose_samples, evaluate

__all__ = [
    "TASKS",
    "EvaluateConfig",
    "Sample",
    "Scores",
    "Task",
    "caption_loss",
    "choose_samples",
    "decode",
    "device",
    "evaluate",
    "mismatch",
    "predict_captions",
    "score_captions",
    "slug",
    "split",
    "spread",
]
