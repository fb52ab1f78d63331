"""Predicting the next token.

Shapes: B rows of this process, T tokens, M scored positions, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vlmpipe.models.collective import mean
from vlmpipe.train.objectives.base import Batch, Result, model_inputs


@dataclass(frozen=True)
class LanguageModeling:
    """Next-token cross entropy on answers and captions only; every scored token of the whole batch weighs the same."""

    def __call__(self, model: nn.Module, batch: Batch) -> Result:
        labels_BT = batch["labels"]
        select_BT = labels_BT != -100
        outputs = model(**model_inputs(batch), select=select_BT, heads=("language_model",))
        labels_M = labels_BT[select_BT]
        total = F.cross_entropy(outputs.logits.float(), labels_M, reduction="sum")
        # Scored tokens per process: dividing by it makes the mean over processes a mean over tokens.
        share = 1 / mean(outputs.logits.new_tensor(labels_M.numel(), dtype=torch.float32)).clamp(min=1)
        hits = (outputs.logits.argmax(dim=-1) == labels_M).sum()
        return total * share, {"accuracy": (hits * share).detach()}
