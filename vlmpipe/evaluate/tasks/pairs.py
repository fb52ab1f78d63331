"""How well texts fit pictures, in whatever way a model can tell.

Shapes: B pictures, E width of the shared space.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from vlmpipe.evaluate.tasks.captions import match
from vlmpipe.models import Processor, VisionLanguageModel
from vlmpipe.models.draw import picture_loss
from vlmpipe.models.generate import ask, embed_texts, log_likelihoods

Texts = Sequence[Sequence[str]]


def pair_scores(
    model: VisionLanguageModel, processor: Processor, images: Sequence[Image.Image], texts: Texts, size: int = 64
) -> list[list[float]]:
    """For each picture a score of each of its texts; higher fits better. Scores of different models don't compare.

    A language model: the mean log-likelihood a token of the text given the picture, which favours no length
    (VisualGPTScore, arXiv 2306.01879). A model that writes pictures: the log-likelihood of the picture given the text.
    A dual encoder: the cosine. One that only says whether both match: the log-odds of that.

    Args:
        size: pairs, or pictures where they are read once for all their texts, in one forward pass.

    Raises:
        UserError: the model can do none of these.
    """
    if model.image_tokens is not None:
        return pair_by_pair(partial(drawn, model, processor), images, texts, size)
    if model.language_model is not None:
        found = [
            said(model, processor, images[at : at + size], texts[at : at + size]) for at in range(0, len(images), size)
        ]
        return [row for part in found for row in part]
    if model.projection is not None:
        return cosines(model, processor, images, texts, size)
    return pair_by_pair(partial(match, model, processor), images, texts, size)


def pair_by_pair(score: Callable, images: Sequence[Image.Image], texts: Texts, size: int) -> list[list[float]]:
    """`score`: numbers of pictures and as many texts, `size` at most."""
    pairs = [(image, text) for image, own in zip(images, texts, strict=True) for text in own]
    flat = iter([
        value for at in range(0, len(pairs), size) for value in score(*map(list, zip(*pairs[at : at + size])))
    ])
    return [[next(flat) for _ in own] for own in texts]


def drawn(model: VisionLanguageModel, processor: Processor, images: Sequence[Image.Image], texts: Sequence[str]):
    return (-picture_loss(model, processor, processor.images(images), texts)).tolist()


def said(
    model: VisionLanguageModel, processor: Processor, images: Sequence[Image.Image], texts: Texts
) -> list[list[float]]:
    """Each picture is read once, then all its texts."""
    encoded = [[caption_ids(processor, text) for text in own] for own in texts]
    batch = ask(model, processor, images, [processor.encode_question("")] * len(images))
    rows = zip(log_likelihoods(model, batch, encoded), encoded, strict=True)
    return [[total / len(ids) for total, ids in zip(totals, own, strict=True)] for totals, own in rows]


def caption_ids(processor: Processor, text: str) -> tuple[int, ...]:
    """The tokens of a caption and its end."""
    encoded = processor.encode_answer("", text)
    return encoded.ids[encoded.start :]


def cosines(
    model: VisionLanguageModel, processor: Processor, images: Sequence[Image.Image], texts: Texts, size: int
) -> list[list[float]]:
    """Each picture and each distinct text is embedded once."""
    distinct = list(dict.fromkeys(text for own in texts for text in own))
    images_BE = embed_images(model, processor, images, size)
    parts = [embed_texts(model, processor, distinct[at : at + size]) for at in range(0, len(distinct), size)]
    place, texts_TE = {text: number for number, text in enumerate(distinct)}, torch.cat(parts)
    return [
        (texts_TE[[place[text] for text in own]] @ image_E).tolist()
        for image_E, own in zip(images_BE, texts, strict=True)
    ]


@torch.no_grad()
def embed_images(
    model: VisionLanguageModel, processor: Processor, images: Sequence[Image.Image], size: int = 64
) -> Tensor:
    """[B, E] unit norm."""
    parts = [images[at : at + size] for at in range(0, len(images), size)]
    return torch.cat([model.encode_image(processor.images(part).to(model.device)) for part in parts])
