"""Writing a picture code by code.

Shapes: B rows of this process, T tokens, N codes of a picture, K codes to choose from.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from vlmpipe.models.text import PADDING
from vlmpipe.train.objectives.base import Batch, Result, model_inputs


@dataclass(frozen=True)
class ImageTokens:
    """Cross entropy of each code of the picture, given the caption and the codes before it (Parti, arXiv 2206.10789).

    Batch keys: images, which the model turns into codes, and tokens, segments, positions of one caption a row.
    In training a share `drop` of the captions is cut down to its first token, so that the model also learns to draw
    without one, as classifier-free guidance needs (arXiv 2207.12598).
    """

    drop: float = 0.1

    def __call__(self, model: nn.Module, batch: Batch) -> Result:
        segments_BT = batch["segments"]
        if model.training and self.drop:
            dropped_B = torch.rand(len(segments_BT), device=segments_BT.device) < self.drop
            later_T = torch.arange(segments_BT.shape[1], device=segments_BT.device) > 0
            segments_BT = segments_BT.masked_fill(dropped_B[:, None] & later_T, PADDING)
        outputs = model(**model_inputs(batch, segments=segments_BT), heads=("image_tokens",))
        logits_BNK, codes_BN = outputs.image_logits, outputs.image_codes
        loss = F.cross_entropy(logits_BNK.float().flatten(0, 1), codes_BN.flatten())
        return loss, {"accuracy": (logits_BNK.argmax(dim=-1) == codes_BN).float().mean().detach()}
