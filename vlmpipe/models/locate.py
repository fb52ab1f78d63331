"""Where in a picture is what a phrase says: masks and boxes in the picture's own pixels.

Shapes: P phrases, K boxes found, y and x pixels of the picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.processor import Processor, stack
from vlmpipe.models.vlm import Outputs, VisionLanguageModel


@dataclass(frozen=True)
class Found:
    """Boxes, the surest first.

    Attributes:
        boxes: [K, 4] left, top, right, bottom in pixels.
        scores: [K] from 0 to 1.
        phrases: [K] int64, the number of the phrase that each box shows best.
    """

    boxes: Tensor
    scores: Tensor
    phrases: Tensor


def segment(model: VisionLanguageModel, processor: Any, image: Image.Image, phrases: Sequence[str]) -> Tensor:
    """[P, y, x] how likely each pixel of `image` shows what each phrase says; what the model doesn't see gets 0.

    Args:
        processor: of this model, ours or one from Hugging Face.

    Raises:
        UserError: no phrase, or a model without masks.
    """
    logits = look(model, processor, image, phrases, "mask").masks.float().cpu()
    left, top, right, bottom = window(processor, image.size)
    seen = F.interpolate(logits[:, None], (bottom - top, right - left), mode="bilinear", align_corners=False)[:, 0]
    found = torch.zeros(len(phrases), image.height, image.width)
    found[:, top:bottom, left:right] = seen.sigmoid()
    return found


def detect(
    model: VisionLanguageModel, processor: Any, image: Image.Image, phrases: Sequence[str], least: float = 0.1
) -> Found:
    """Boxes of `image` around what the phrases name, with a score of `least` at least.

    Args:
        processor: of this model, ours or one from Hugging Face.

    Raises:
        UserError: no phrase, or a model without boxes.
    """
    outputs = look(model, processor, image, phrases, "detection")
    scores, phrase = outputs.classes[0].float().cpu().sigmoid().max(dim=-1)
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= least]
    x, y, width, height = outputs.boxes[0].float().cpu()[order].unbind(dim=-1)
    corners = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=-1).clamp(0, 1)
    left, top, right, bottom = window(processor, image.size)
    size, origin = torch.tensor([right - left, bottom - top]), torch.tensor([left, top])
    return Found(corners * size.repeat(2) + origin.repeat(2), scores[order], phrase[order])


@torch.no_grad()
def look(model, processor: Any, image: Image.Image, phrases: Sequence[str], head: str) -> Outputs:
    """What `head` of the model says of one picture and several phrases."""
    if not phrases:
        raise UserError("found no phrase; expected at least one to look for")
    if getattr(model, head) is None:
        raise UserError(f"found a model without heads.{head}; expected one that was trained with it")
    batch = stack([[processor.encode(phrase)] for phrase in phrases])
    inputs = {name: batch[name].to(model.device) for name in ("tokens", "segments", "positions")}
    first = torch.zeros(1, dtype=torch.int64, device=model.device)
    return model(images=processor.images([image]).to(model.device), **inputs, image_rows=first, heads=(head,))


def window(processor: Any, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what the model sees of a picture of this width and height."""
    width, height = size
    share = middle(processor)
    if share is None:
        return 0, 0, width, height
    side = round(min(size) * share)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def middle(processor: Any) -> float | None:
    """How much of the shorter side is in the square that is cut out; None: the whole picture is squashed into one."""
    if isinstance(processor, Processor):
        return 1.0 if processor.config.resize == "crop" else None
    pictures = processor.pictures  # an image processor from Hugging Face
    if not getattr(pictures, "do_center_crop", False):
        return None
    shortest = getattr(pictures.size, "shortest_edge", None)
    return pictures.crop_size.height / shortest if shortest else None
