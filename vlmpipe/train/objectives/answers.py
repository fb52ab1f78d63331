"""Answers as classes, and statements about several pictures.

Shapes: B rows of this process, A answers, n pictures.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpipe.train.objectives.base import Batch, Result, model_inputs, require
from vlmpipe.train.objectives.masked import head, without


def soft_targets(answers: Sequence[Sequence[str]], known: Mapping[str, int], classes: int) -> Tensor:
    """[B, A] float32 from the people's answers of each question: 0.3, 0.6, 0.9 for one, two, three who said so, 1 for
    more, as ViLT was trained (arXiv 2102.03334; about VQA's accuracy). Unknown answers are left out.

    known: the class of each answer. classes: of the head, A.
    """
    scores = torch.zeros(len(answers), classes)
    for row, given in enumerate(answers):
        for answer, count in Counter(given).items():
            if answer in known:
                scores[row, known[answer]] = min(0.3 * count, 1.0)
    return scores


@dataclass(frozen=True)
class Answers:
    """Visual questions as classification: binary cross entropy with each answer's score, summed over answers.

    Batch: images, tokens, segments, positions of the questions; `answers` [B, A] in 0 .. 1, see `soft_targets`.
    """

    def __call__(self, model: nn.Module, batch: Batch) -> Result:
        require(self, batch, "images", "tokens", "segments", "positions", "answers")
        head(model, "answers")
        logits_BA = model(**model_inputs(batch), heads=("answers",)).answers
        scores_BA = batch["answers"]
        loss = F.binary_cross_entropy_with_logits(logits_BA.float(), scores_BA) * scores_BA.shape[1]
        accuracy = scores_BA.gather(1, logits_BA.argmax(dim=1, keepdim=True)).mean()
        return loss, {"accuracy": accuracy}


def a_pass_a_picture(batch: Batch) -> Batch:
    """The batch with its texts repeated for each of their pictures, which are told apart by `frames`: 0, 1, …"""
    rows = batch["image_rows"]
    number = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
    words = {name: batch[name][rows] for name in ("tokens", "segments", "positions", "types") if name in batch}
    return {**without(batch, "image_rows"), **words, "frames": number}


@dataclass(frozen=True)
class Statements:
    """Whether a statement about several pictures holds (NLVR2): a pass for each, whose pooled tokens are read together.

    Batch: images, `image_rows` with as many pictures in every row as the head `statement` reads, tokens, segments,
    positions, `statement_labels` [B] int64.
    """

    def __call__(self, model: nn.Module, batch: Batch) -> Result:
        require(self, batch, "images", "image_rows", "tokens", "segments", "positions", "statement_labels")
        head(model, "statement")
        logits_BA = model(**model_inputs(a_pass_a_picture(batch)), heads=("statement",)).statement
        labels_B = batch["statement_labels"]
        accuracy = (logits_BA.argmax(dim=1) == labels_B).float().mean()
        return F.cross_entropy(logits_BA.float(), labels_B), {"accuracy": accuracy}
