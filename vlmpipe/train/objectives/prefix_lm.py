"""Predicting the rest of a text whose beginning is read as a whole.

Shapes: B rows of this process, T tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmpipe.train.objectives.base import Batch, Result
from vlmpipe.train.objectives.language import LanguageModeling


@dataclass(frozen=True)
class PrefixLM:
    """Each text is cut at random; what stands before the cut is given, the rest is learned (SimVLM, arXiv 2108.10904,
    equation 3). Pictures are given always.

    Batch keys: images, tokens, segments, positions, labels, and `prefix` [B, T] bool: the tokens of each text that are
    given whatever the cut, such as a question. The cut falls before any of the tokens that have a label, each as
    likely; the last token before it starts the decoder, which needs no start token of its own. Where `random` is false
    it falls before the first, as when the model answers.

    For a model with fusion `encoder_decoder`, or `prefix` with `attention: prefix`.
    """

    random: bool = True

    def __call__(self, model: nn.Module, batch: Batch) -> Result:
        if self.random:
            prefix_BT, labels_BT = cut(batch["segments"], batch["labels"], batch["prefix"])
            batch = {**batch, "prefix": prefix_BT, "labels": labels_BT}
        return LanguageModeling()(model, batch)


def cut(segments_BT: Tensor, labels_BT: Tensor, prefix_BT: Tensor) -> tuple[Tensor, Tensor]:
    """A longer prefix, and the labels that are left, with one random cut for each text."""
    learned_BT = labels_BT != -100
    same_BTT = (segments_BT[:, :, None] == segments_BT[:, None, :]) & learned_BT[:, None, :]
    total_BT = same_BTT.sum(dim=2)
    place_BT = same_BTT.tril(-1).sum(dim=2)  # learned tokens of the same text before this one
    texts = max(1, int(segments_BT.max()))
    share = torch.rand(len(segments_BT), texts + 1, device=segments_BT.device).gather(1, segments_BT.clamp(min=0))
    given_BT = learned_BT & (place_BT < (share * total_BT).floor())
    return prefix_BT | given_BT, labels_BT.masked_fill(given_BT, -100)
