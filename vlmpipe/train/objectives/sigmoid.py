"""Each pair by itself: does this text belong to this picture?

Shapes: B rows of this process, G rows of all processes, E shared width.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.collective import distributed, gather
from vlmpipe.train.objectives.base import Result
from vlmpipe.train.objectives.contrastive import Contrastive


@dataclass(frozen=True)
class Sigmoid(Contrastive):
    """A yes or no for every picture with every text, with a learned scale and bias (SigLIP, arXiv 2303.15343).

    The loss is the sum over a picture's texts, mean over pictures: as in the paper, it grows with the batch. Other
    pictures' texts that are the same to the letter count neither way.
    """

    def loss(self, embedded: dict[str, Tensor]) -> Result:
        """Raises UserError where the model has no bias."""
        if "bias" not in embedded:
            raise UserError("heads.projection.bias: found none; expected a number to start from, such as -10")
        image_BE, ids_B, scale, bias = (embedded[name] for name in ("image", "ids", "scale", "bias"))
        text_GE, ids_G = gather(embedded["text"]), gather(ids_B)
        logits_BG = (scale * image_BE @ text_GE.T + bias).float()
        rows_B = torch.arange(len(ids_B), device=ids_B.device)
        own_B = rows_B + (dist.get_rank() if distributed() else 0) * len(ids_B)
        signs_BG = torch.full_like(logits_BG, -1.0)
        signs_BG[rows_B, own_B] = 1.0
        counted_BG = ids_B[:, None] != ids_G
        counted_BG[rows_B, own_B] = True
        loss = -(F.logsigmoid(signs_BG * logits_BG) * counted_BG).sum(dim=1).mean()
        likeliest_B = logits_BG.masked_fill(~counted_BG, -torch.inf).argmax(dim=1)
        accuracy = (likeliest_B == own_B).float().mean()
        return loss, {"accuracy": accuracy, "scale": scale.detach(), "bias": bias.detach()}
