"""Answers of a model that knows a fixed list of them.

Shapes: B batch, A answers.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.generate.rows import picture_inputs, to_device
from vlmpipe.models.processor import Processor, stack
from vlmpipe.models.vlm import VisionLanguageModel


def classify_answers(
    model: VisionLanguageModel, processor: Processor, images: Sequence[Image.Image], questions: Sequence[str]
) -> list[str]:
    """For each picture and question the likeliest of `processor.answers`.

    Raises:
        UserError: the model was not tuned on questions.
    """
    logits_BA = answer_logits(model, processor, images, questions)
    return [processor.answers[index] for index in logits_BA.argmax(dim=1).tolist()]


@torch.no_grad()
def answer_logits(
    model: VisionLanguageModel, processor: Processor, images: Sequence[Image.Image], questions: Sequence[str]
) -> Tensor:
    """[B, A] of `processor.answers`: class i of the head `answers` is answer i.

    Raises:
        UserError: the model was not tuned on questions.
    """
    if not processor.answers:
        raise UserError("found no known answers; expected a model tuned on questions; finetune the model")
    words = to_device(stack([[processor.encode(question)] for question in questions]), model)
    logits_BA = model(**picture_inputs(model, processor, images), **words, heads=("answers",)).answers
    return logits_BA[:, : len(processor.answers)]
