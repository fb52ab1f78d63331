"""Contrast between pictures and texts.

Shapes: B rows of this process, W processes, G = W * B rows in all, T tokens, E shared width.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpipe.models.collective import distributed, gather
from vlmpipe.train.objectives.base import Batch, Result


def text_ids(batch: Batch) -> Tensor:
    """[B] int64, equal for equal texts: a hash by place, which can be compared across processes."""
    places = torch.arange(1, batch["tokens"].shape[1] + 1, device=batch["tokens"].device)
    # Any odd multipliers will do; int64 wraps around.
    mixed = (batch["tokens"] + 1) * 6364136223846793005 + places * 1442695040888963407
    mixed = (mixed ^ (mixed >> 29)) * 2862933555777941757 * (batch["segments"] != 0)
    return mixed.sum(dim=1)


@dataclass(frozen=True)
class Contrastive:
    """Softmax contrast of each image with every text and each text with every image (CLIP, arXiv 2103.00020).

    Pairs whose text is the same to the letter are no negatives of one another.

    Embedding and loss are apart, so that a batch in parts can have the loss of the whole (`vlmpipe.train.cached`).
    """

    def __call__(self, model: nn.Module, batch: Batch) -> Result:
        return self.loss(self.embed(model, batch))

    def embed(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`image` and `text` [B, E], `ids` [B], and `scale`: all that the loss asks of a model and a batch. And `bias`
        of a model that has one."""
        outputs = model(
            images=batch["images"],
            tokens=batch["tokens"],
            segments=batch["segments"],
            positions=batch["positions"],
            heads=("projection",),
        )
        bias = {} if outputs.bias is None else {"bias": outputs.bias}
        return {
            "image": outputs.image_embedding, "text": outputs.text_embedding,
            "ids": text_ids(batch), "scale": outputs.scale, **bias,
        }

    def loss(self, embedded: dict[str, Tensor]) -> Result:
        image_BE, text_BE, ids_B, scale = (embedded[name] for name in ("image", "text", "ids", "scale"))
        image_GE, text_GE = gather(image_BE), gather(text_BE)
        ids_G = gather(ids_B)
        rank = dist.get_rank() if distributed() else 0
        target_B = torch.arange(len(ids_B), device=ids_B.device) + rank * len(ids_B)
        same_BG = ids_B[:, None] == ids_G
        same_BG[torch.arange(len(ids_B)), target_B] = False
        losses, hits = [], []
        for one_BE, all_GE in ((image_BE, text_GE), (text_BE, image_GE)):
            logits_BG = (scale * one_BE @ all_GE.T).float().masked_fill(same_BG, -torch.inf)
            losses.append(F.cross_entropy(logits_BG, target_B))
            hits.append((logits_BG.argmax(dim=1) == target_B).float().mean())
        accuracy = torch.stack(hits).mean().detach()
        return torch.stack(losses).mean(), {"accuracy": accuracy, "scale": scale.detach()}
