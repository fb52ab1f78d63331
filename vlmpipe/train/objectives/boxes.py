"""Boxes of what texts ask for, and which predicted box answers for which true one.

Shapes: n pictures of this process, N predicted boxes of a picture, G most true boxes of a picture, Q most queries of
a picture, M pairs of a predicted and a true box.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.collective import mean
from vlmpipe.train.objectives.base import Batch, Result, model_inputs, require

NONE = -1  # the label of what only fills up


@dataclass(frozen=True)
class Boxes:
    """Set prediction (DETR, arXiv 2005.12872) as OWL-ViT trains it (arXiv 2205.06230, appendix A1.3): each true box
    is given to one predicted box, at the least cost in all; these learn its place and its query, all others that they
    show none.

    A picture's losses are divided by the number of its boxes, and every picture of the whole batch weighs the same.

    Of the batch it takes:
        images [n, C, Y, X]; tokens, segments, positions [B, T]: a query a row; those of what is not in the picture
            teach what a thing is not.
        image_rows [n] the row at which each picture's queries begin, ascending; absent: one query a picture.
        boxes float [n, G, 4]: centre x and y, width and height, in shares of the picture, filled up with anything.
        box_labels int64 [n, G]: which of its picture's queries a box shows, from 0; -1 where there is no box.

    Attributes:
        classes, places, overlaps: weights of the focal loss, of the L1 distance, and of 1 - GIoU.
        alpha, gamma: of the focal loss (arXiv 1708.02002): how much a hit weighs against a miss, and how little what
            is already right. Values of the released models' configs (github.com/google-research/scenic, owl_vit).
    """

    classes: float = 1.0
    places: float = 1.0
    overlaps: float = 1.0
    alpha: float = 0.3
    gamma: float = 2.0

    def __call__(self, model: nn.Module, batch: Batch) -> Result:
        require(self, batch, "boxes", "box_labels")
        outputs = model(**model_inputs(batch), heads=("detection",))
        boxes_nN4, logits_nNQ = outputs.boxes.float(), outputs.classes.float()
        true_nG4, labels_nG = batch["boxes"].float(), batch["box_labels"]
        check_labels(labels_nG, outputs.classes)
        picture_M, patch_M, box_M = match(self.costs(boxes_nN4, logits_nNQ, true_nG4, labels_nG), labels_nG)
        count_n = (labels_nG != NONE).sum(dim=1).clamp(min=1)
        target_nNQ = torch.zeros_like(logits_nNQ)
        target_nNQ[picture_M, patch_M, labels_nG[picture_M, box_M]] = 1
        found_M4, true_M4 = boxes_nN4[picture_M, patch_M], true_nG4[picture_M, box_M]
        giou_M, iou_M = overlap(corners(found_M4), corners(true_M4))
        weight_M = 1 / count_n[picture_M]
        parts = {
            "class_loss": (self.focal(logits_nNQ, target_nNQ).sum(dim=(1, 2)) / count_n).sum(),
            "place_loss": ((found_M4 - true_M4).abs().sum(dim=1) * weight_M).sum(),
            "overlap_loss": ((1 - giou_M) * weight_M).sum(),
        }
        share = 1 / mean(logits_nNQ.new_tensor(len(logits_nNQ)))
        weights = (self.classes, self.places, self.overlaps)
        loss = sum(weight * part for weight, part in zip(weights, parts.values())) * share
        boxes = mean(logits_nNQ.new_tensor(len(iou_M))).clamp(min=1)
        metrics = {name: (part * share).detach() for name, part in parts.items()}
        return loss, metrics | {"iou": (iou_M.sum() / boxes).detach()}

    def focal(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of each logit for a target of 0 or 1."""
        miss = (logits.sigmoid() - target).abs()  # how wrong
        weight = self.alpha * target + (1 - self.alpha) * (1 - target)
        return weight * miss**self.gamma * F.binary_cross_entropy_with_logits(logits, target, reduction="none")

    @torch.no_grad()
    def costs(self, boxes_nN4, logits_nNQ, true_nG4, labels_nG) -> Tensor:
        """[n, N, G] what it would cost to give each true box to each predicted one."""
        gained_nNQ = self.focal(logits_nNQ, torch.ones_like(logits_nNQ)) - self.focal(
            logits_nNQ, torch.zeros_like(logits_nNQ)
        )
        query_nNG = labels_nG.clamp(min=0)[:, None].expand(-1, logits_nNQ.shape[1], -1)
        apart = (boxes_nN4[:, :, None] - true_nG4[:, None]).abs().sum(dim=-1)
        giou, _ = overlap(corners(boxes_nN4)[:, :, None], corners(true_nG4)[:, None])
        return self.classes * gained_nNQ.gather(2, query_nNG) + self.places * apart - self.overlaps * giou


def check_labels(labels_nG: Tensor, classes_nNQ: Tensor) -> None:
    """Raise `UserError` where a label is no query of its picture."""
    queries_n = (classes_nNQ[:, 0] > torch.finfo(classes_nNQ.dtype).min).sum(dim=1)
    wrong_n = (labels_nG >= queries_n[:, None]).any(dim=1)
    if wrong_n.any():
        picture = int(wrong_n.int().argmax())
        raise UserError(
            f"box_labels: found {int(labels_nG[picture].max())} for a picture with {int(queries_n[picture])} queries; "
            f"expected numbers of the picture's own queries, from 0, or -1 where there is no box"
        )


def match(costs_nNG: Tensor, labels_nG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs at the least cost in each picture's sum (the Hungarian method): numbers [M] of picture, predicted box and
    true box. Where a picture has more true boxes than predicted ones, the costliest stay without."""
    # Training imports with torch alone; boxes need this.
    from scipy.optimize import linear_sum_assignment

    pairs = []
    # A model that has gone wrong says so through its loss, not here.
    costs, labels = costs_nNG.nan_to_num().cpu().numpy(), labels_nG.cpu().numpy()
    for picture, (cost_NG, label_G) in enumerate(zip(costs, labels)):
        (real,) = (label_G != NONE).nonzero()
        patches, places = linear_sum_assignment(cost_NG[:, real])
        pairs += [(picture, patch, real[place]) for patch, place in zip(patches, places)]
    found = torch.tensor(pairs, dtype=torch.int64, device=costs_nNG.device).reshape(-1, 3)
    return found[:, 0], found[:, 1], found[:, 2]


def corners(boxes: Tensor) -> Tensor:
    """[..., 4] left, top, right, bottom from centre x and y, width and height."""
    centre, size = boxes.split(2, dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def overlap(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Generalized and plain intersection over union of boxes given by their corners [..., 4], broadcast.

    GIoU (arXiv 1902.09630) is IoU less the share of the smallest box around both that neither covers: -1 to 1.
    """
    tiny = torch.finfo(one.dtype).tiny
    shared = (torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])).clamp(min=0)
    around = torch.maximum(one[..., 2:], other[..., 2:]) - torch.minimum(one[..., :2], other[..., :2])
    areas = [(box[..., 2:] - box[..., :2]).prod(dim=-1) for box in (one, other)]
    shared, around = shared.prod(dim=-1), around.prod(dim=-1)
    either = areas[0] + areas[1] - shared
    iou = shared / either.clamp(min=tiny)
    return iou - (around - either) / around.clamp(min=tiny), iou
