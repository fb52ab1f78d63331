"""Where a model looked for its answer.

Shapes: B batch, T tokens, M image tokens, P places of the row that are a picture, H heads, D width.
"""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlmpipe.models.generate.rows import ask, in_row, picture_inputs, to_device
from vlmpipe.models.processor import Processor, stack
from vlmpipe.models.vlm import VisionLanguageModel


def attention_map(model: VisionLanguageModel, processor: Processor, image: Image.Image, question: str) -> Tensor:
    """[h, w] floats from 0, summing to 1: how much each place of the picture counted for the answer.

    A language model that reads the picture in its row: attention of the answer's first token to it, weighted by the
    gradient of its logit and averaged over heads and layers (arXiv 2103.15679). One that looks at it from outside:
    image tokens times the gradient of that logit (arXiv 1610.02391). A dual encoder: nearness of each token to
    the text.
    """
    given = picture_inputs(model, processor, [image])
    if model.language_model is None:
        values_N = patch_nearness(model, processor, given["images"], question)
    else:
        batch = ask(model, processor, [image], [processor.encode_question(question)])
        relevance = answer_relevance if in_row(model) else token_relevance
        values_N = relevance(model, batch)
    values_N = values_N.clamp(min=0)
    total = values_N.sum()
    values_N = values_N / total if total > 0 else torch.full_like(values_N, 1 / len(values_N))
    return values_N.unflatten(0, grid_of(model, given, len(values_N))).cpu()


def grid_of(model: VisionLanguageModel, given: dict[str, Tensor], count: int) -> tuple[int, int]:
    """Rows and columns of `count` values that cover the picture."""
    if "grids" in given:
        merge = model.config.vision.native.merge
        return tuple(side // merge for side in given["grids"][0, 1:].tolist())
    height, width = given["images"].shape[-2:]
    rows = round((count * height / width) ** 0.5)
    return rows, count // rows


@torch.enable_grad()
def answer_relevance(model: VisionLanguageModel, batch: dict[str, Tensor]) -> Tensor:
    """[P] relevance of the picture's places in the row."""
    weights: list[Tensor] = []
    logits_V = model(**batch, weights=weights, heads=("language_model",)).logits[0, -1]
    gradients = torch.autograd.grad(logits_V.max(), weights)
    length = weights[0].shape[-1] - batch["tokens"].shape[1]
    layers = [(w * g).clamp(min=0)[0, :, -1, :length].mean(dim=0) for w, g in zip(weights, gradients, strict=True)]
    return torch.stack(layers).mean(dim=0).detach()


@torch.enable_grad()
def token_relevance(model: VisionLanguageModel, batch: dict[str, Tensor]) -> Tensor:
    """[N] relevance of the vision encoder's tokens."""
    seen: list[Tensor] = []

    def keep(module, inputs, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    hook = model.vision.register_forward_hook(keep)
    try:
        logits_V = model(**batch, heads=("language_model",)).logits[0, -1]
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(logits_V.max(), seen)
    return model.vision.patches((seen[0] * gradient).sum(dim=-1, keepdim=True))[0, :, 0].detach()


@torch.no_grad()
def patch_nearness(model: VisionLanguageModel, processor: Processor, pixels: Tensor, question: str) -> Tensor:
    """[N] cosine of each projected patch with the text, above the least of them."""
    patches_NE = model.projection.embed_image(model.vision.patches(model.vision(pixels)))[0]
    text_E = model.encode_text(**to_device(stack([[processor.encode(question)]]), model))[0]
    values_N = patches_NE @ F.normalize(text_E, dim=-1)
    return values_N - values_N.min()
