"""Masks of what phrases mean.

Shapes: B phrases of this process, Y and X pixels.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from vlmpipe.errors import UserError
from vlmpipe.models.collective import mean
from vlmpipe.train.objectives.base import Batch, Result, model_inputs, require

UNSCORED = 255  # as PASCAL VOC marks the border of things


@dataclass(frozen=True)
class Masks:
    """Binary cross entropy of every pixel (CLIPSeg, arXiv 2112.10003); all pixels of the whole batch weigh the same.

    Of the batch it takes:
        images [n, C, Y, X]; tokens, segments, positions [B, T]: a phrase a row.
        image_rows [n] the row at which each picture's phrases begin, ascending; absent: one phrase a picture.
        masks uint8 [B, Y, X]: 1 where the picture shows what the phrase says, 0 where it doesn't, 255 where nobody
            knows, which is not scored. As large as the pictures that the model sees.
    """

    def __call__(self, model: nn.Module, batch: Batch) -> Result:
        require(self, batch, "masks")
        logits_BYX = model(**model_inputs(batch), heads=("mask",)).masks.float()
        masks_BYX = batch["masks"]
        if masks_BYX.shape != logits_BYX.shape:
            raise UserError(
                f"masks: found {list(masks_BYX.shape)}; expected {list(logits_BYX.shape)}, one a phrase, as large as "
                f"its picture; resize them with the pictures"
            )
        there, scored = masks_BYX == 1, masks_BYX != UNSCORED
        losses = F.binary_cross_entropy_with_logits(logits_BYX, there.float(), weight=scored.float(), reduction="sum")
        loss = losses / mean(scored.sum().float()).clamp(min=1)
        found = (logits_BYX > 0) & scored
        shared, either = (found & there).sum(), (found | there).sum()
        return loss, {"iou": shared / mean(either.float()).clamp(min=1)}
