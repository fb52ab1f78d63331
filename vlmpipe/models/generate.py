"""Answers, captions, and where the model looked.

Shapes: B batch, T tokens, P prefix tokens, A candidate answers, V vocabulary, L layers, H heads.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.layers import Cache
from vlmpipe.models.processor import EncodedText, Processor, stack
from vlmpipe.models.text import PADDING
from vlmpipe.models.vlm import VisionLanguageModel


def to_device(batch: dict[str, Tensor], model: VisionLanguageModel) -> dict[str, Tensor]:
    """The inputs of `forward` from what `stack` made."""
    return {name: batch[name].to(model.device) for name in ("tokens", "segments", "positions")}


@torch.no_grad()
def generate(
    model: VisionLanguageModel, processor: Processor, images: Tensor, prompts: Sequence[EncodedText], limit: int
) -> list[list[int]]:
    """Greedy decoding of a whole batch with a key-value cache.

    Args:
        images: uint8 [B, C, Y, X].
        prompts: one per image.
        limit: most new tokens; a text also ends where the model's positions do.

    Returns: new token ids of each row, its end token included where it came.
    """
    inputs = to_device(stack([[prompt] for prompt in prompts]), model)
    rows = torch.arange(len(prompts), device=model.device)
    last_B = (inputs["segments"] != PADDING).sum(dim=1) - 1
    room = processor.text_limit - max(len(prompt.ids) for prompt in prompts)
    cache, new, done_B = Cache(), [], torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    select = torch.zeros_like(inputs["tokens"], dtype=torch.bool)
    select[rows, last_B] = True
    logits_BV = model(images=images.to(model.device), **inputs, select=select, cache=cache).logits
    for step in range(min(limit, room)):
        token_B = logits_BV.argmax(dim=-1).masked_fill(done_B, processor.eos)
        new.append(token_B)
        done_B = done_B | (token_B == processor.eos)
        if done_B.all() or step + 1 == min(limit, room):
            break
        positions = (last_B + step + 1)[:, None]
        segments = torch.ones_like(positions)
        logits_BV = model(tokens=token_B[:, None], segments=segments, positions=positions, cache=cache).logits[:, -1]
    return torch.stack(new, dim=1).tolist() if new else [[] for _ in prompts]


def answer(
    model: VisionLanguageModel,
    processor: Processor,
    images: Sequence[Image.Image],
    questions: Sequence[str],
    limit: int = 16,
) -> list[str]:
    """One answer per (image, question): a language model says it, a dual encoder picks one of `processor.answers`."""
    pixels = processor.images(images)
    if model.language_model is None:
        return rank_answers(model, processor, pixels, questions)
    prompts = [processor.encode_question(question) for question in questions]
    return [processor.decode(ids) for ids in generate(model, processor, pixels, prompts, limit)]


def caption(
    model: VisionLanguageModel, processor: Processor, images: Sequence[Image.Image], limit: int = 64
) -> list[str]:
    """One caption per image.

    Raises:
        UserError: the model has no language head.
    """
    if model.language_model is None:
        raise UserError("found a dual encoder; expected a language head to write captions; use model=llava")
    prompts = [processor.encode_question("")] * len(images)
    return [processor.decode(ids) for ids in generate(model, processor, processor.images(images), prompts, limit)]


@torch.no_grad()
def embed_texts(model: VisionLanguageModel, processor: Processor, texts: Sequence[str]) -> Tensor:
    """[B, E] unit norm."""
    return model.encode_text(**to_device(stack([[processor.encode(text)] for text in texts]), model))


@torch.no_grad()
def rank_answers(
    model: VisionLanguageModel, processor: Processor, images: Tensor, questions: Sequence[str]
) -> list[str]:
    """For each image the candidate whose text "question answer" lies nearest. Each distinct text is embedded once."""
    if not processor.answers:
        raise UserError("found no candidate answers; expected a dual encoder tuned on questions; finetune the model")
    distinct = list(dict.fromkeys(questions))
    texts = [f"{question} {candidate}" for question in distinct for candidate in processor.answers]
    parts = [embed_texts(model, processor, texts[at : at + 512]) for at in range(0, len(texts), 512)]
    texts_QAE = torch.cat(parts).unflatten(0, (len(distinct), -1))
    which = torch.tensor([distinct.index(question) for question in questions], device=model.device)
    image_BE = model.encode_image(images.to(model.device))
    scores_BA = (texts_QAE[which] @ image_BE[:, :, None])[:, :, 0]
    return [processor.answers[index] for index in scores_BA.argmax(dim=1).tolist()]


def attention_map(model: VisionLanguageModel, processor: Processor, image: Image.Image, question: str) -> Tensor:
    """[h, w] floats from 0, summing to 1: how much each patch of the picture counted for the answer.

    A language model: attention of the answer's first token to the prefix, weighted by the gradient of its logit and
    averaged over heads and layers (arXiv 2103.15679). A dual encoder: nearness of each patch token to the text.
    """
    pixels = processor.images([image]).to(model.device)
    if model.language_model is None:
        values_N = patch_nearness(model, processor, pixels, question)
    else:
        values_N = answer_relevance(model, processor, pixels, question)
    values_N = values_N.clamp(min=0)
    total = values_N.sum()
    values_N = values_N / total if total > 0 else torch.full_like(values_N, 1 / len(values_N))
    side = math.isqrt(len(values_N))
    return values_N.unflatten(0, (side, side)).cpu()


@torch.enable_grad()
def answer_relevance(model: VisionLanguageModel, processor: Processor, pixels: Tensor, question: str) -> Tensor:
    """[P] relevance of the prefix tokens."""
    inputs = to_device(stack([[processor.encode_question(question)]]), model)
    weights: list[Tensor] = []
    logits_V = model(images=pixels, **inputs, weights=weights).logits[0, -1]
    gradients = torch.autograd.grad(logits_V.max(), weights)
    length = model.fusion.length
    layers = [(w * g).clamp(min=0)[0, :, -1, :length].mean(dim=0) for w, g in zip(weights, gradients, strict=True)]
    return torch.stack(layers).mean(dim=0).detach()


@torch.no_grad()
def patch_nearness(model: VisionLanguageModel, processor: Processor, pixels: Tensor, question: str) -> Tensor:
    """[N] cosine of each projected patch with the text, above the least of them."""
    patches_NE = model.projection.embed_image(model.vision.patches(model.vision(pixels)))[0]
    values_N = patches_NE @ F.normalize(embed_texts(model, processor, [question])[0], dim=-1)
    return values_N - values_N.min()
