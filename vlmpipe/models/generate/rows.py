"""What a model is asked, as the tensors of its forward pass: pictures, prompts, and examples shown before them.

Shapes: B rows, n pictures, C colours, Y and X pixels, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.fill import fill_up
from vlmpipe.models.native import pack
from vlmpipe.models.places import row_positions, token_count
from vlmpipe.models.processor import EncodedText, Processor, stack
from vlmpipe.models.text import PADDING, SHARED
from vlmpipe.models.vlm import VisionLanguageModel


@dataclass(frozen=True)
class Example:
    """One answered question about a picture, shown before the one that is asked; an empty question is a caption."""

    image: Image.Image
    question: str
    answer: str


Part = tuple[Image.Image | None, EncodedText]

# The text inputs of `forward`, of which a text encoder alone takes the first three.
WORDS = ("tokens", "segments", "positions")
QUESTIONED = (*WORDS, "prefix")


def to_device(
    batch: dict[str, Tensor], model: VisionLanguageModel, names: Sequence[str] = WORDS
) -> dict[str, Tensor]:
    """The text inputs of `forward` from what `stack` made."""
    return {name: batch[name].to(model.device) for name in names}


def picture_inputs(
    model: VisionLanguageModel, processor: Processor, images: Sequence[Image.Image]
) -> dict[str, Tensor]:
    """`images` of the forward pass, `grids` where pictures keep their own sizes, and `image_rows` where a row has a
    tuple of pictures."""
    if any(isinstance(seen, tuple) for seen in images):
        rows = [seen if isinstance(seen, tuple) else (seen,) for seen in images]
        owners = torch.tensor([row for row, seen in enumerate(rows) for _ in seen], device=model.device)
        flat = [picture for seen in rows for picture in seen]
        return {**picture_inputs(model, processor, flat), "image_rows": owners}
    vision, own = model.config.vision, processor.config.resize == "native"
    if vision.native is not None and own:
        patches, grids = pack([[image] for image in images], vision)
        return {"images": patches.to(model.device), "grids": grids}
    if own:
        filled = fill_up([processor.image(image) for image in images], vision.patch_size)
        return {name: tensor.to(model.device) for name, tensor in filled.items()}
    return {"images": processor.images(images).to(model.device)}


def ask(
    model: VisionLanguageModel, processor: Processor, images: Sequence[Image.Image], prompts: Sequence[EncodedText],
    examples: Sequence[Example] = (), once: bool = False,
) -> dict[str, Tensor]:
    """Inputs of `forward` for one prompt about each picture, after the same examples in every row.

    With `once` a picture that several rows ask about is there once, and `readers` [B] says which one each row asks
    about, where the model can read it that way: `decode.prefill` does.
    """
    marked = any(processor.picture in prompt.ids for prompt in prompts)
    if not examples and not marked:
        asked = to_device(stack([[prompt] for prompt in prompts]), model, QUESTIONED)
        single = once and reads_pictures_first(model) and not any(isinstance(seen, tuple) for seen in images)
        distinct, readers = shared(images) if single else (images, [])
        if len(distinct) < len(images):
            asked["readers"] = torch.tensor(readers, device=model.device)
            images = distinct
        return {**picture_inputs(model, processor, images), **asked}
    before = []
    for example in examples:
        before += said(processor, example.image, processor.encode_answer(example.question, example.answer))
    rows = [[*before, *said(processor, image, prompt)] for image, prompt in zip(images, prompts, strict=True)]
    return interleave(model, processor, rows)


def said(processor: Processor, seen: Image.Image | tuple[Image.Image, ...], text: EncodedText) -> list[Part]:
    """Pictures and their text: the pictures where the text marks them, as chat templates do, or else before it."""
    *first, last = seen if isinstance(seen, tuple) else (seen,)
    at = text.ids.index(processor.picture) if processor.picture in text.ids else None
    start, rest = ((), text.ids) if at is None else (text.ids[:at], text.ids[at + 1 :])
    alone = [(image, EncodedText((), 0)) for image in first]
    return [(None, EncodedText(start, 0)), *alone, (last, EncodedText(rest, 0))]


def shared(images: Sequence[Image.Image]) -> tuple[list[Image.Image], list[int]]:
    """The pictures that differ, and for each picture its number among them."""
    numbers: dict[object, int] = {}
    distinct, readers, same = [], [], {}
    for image in images:
        if id(image) not in same:
            content = (image.mode, image.size, image.tobytes())
            if content not in numbers:
                numbers[content] = len(distinct)
                distinct.append(image)
            same[id(image)] = numbers[content]
        readers.append(same[id(image)])
    return distinct, readers


def reads_pictures_first(model: VisionLanguageModel) -> bool:
    """Whether image tokens before the words are the same whatever the words are."""
    return in_row(model) and not getattr(model.fusion, "given", False)


def interleave(
    model: VisionLanguageModel, processor: Processor, rows: Sequence[Sequence[Part]]
) -> dict[str, Tensor]:
    """Inputs of `forward` for rows of (picture or none, text) after each other, as one text that sees all before it.

    Raises:
        UserError: a row is longer than the positions that the model has learned.
    """
    given = picture_inputs(model, processor, [image for row in rows for image, _ in row if image is not None])
    counts = iter(tokens_of_pictures(model, given))
    placed = [[(0 if image is None else next(counts), text) for image, text in row] for row in rows]
    length = max(sum(count + len(text.ids) for count, text in row) for row in placed)
    if model.text.position_embedding is not None and length > model.config.text.context:
        raise UserError(
            f"found a row of {length} tokens for text.context {model.config.text.context}; give fewer examples"
        )
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    segments, places = torch.full_like(tokens, PADDING), torch.zeros_like(tokens, dtype=torch.bool)
    for index, row in enumerate(placed):
        at = 0
        for count, text in row:
            end = at + count + len(text.ids)
            places[index, at : at + count] = True
            segments[index, at:end] = 1
            tokens[index, at + count : end] = torch.tensor(text.ids)
            at = end
    batch = {"tokens": tokens, "segments": segments, "positions": positions_of(model, segments, places, given)}
    if getattr(model.fusion, "full", False):
        # Image tokens that look both ways do so in what all words share.
        batch["segments"] = segments.masked_fill(places, SHARED)
    owners = torch.tensor([index for index, row in enumerate(rows) for image, _ in row if image is not None])
    real = segments != PADDING
    given_words = real & (real.flip(1).cumsum(dim=1).flip(1) > 1)  # all but the one that the answer starts after
    batch |= {"image_places": places, "image_rows": owners, "prefix": given_words}
    return {**given, **{name: value.to(model.device) for name, value in batch.items()}}


def tokens_of_pictures(model: VisionLanguageModel, given: dict[str, Tensor]) -> list[int]:
    """Places that each picture takes in its row: its tokens where they stand among the words, one where words look at
    them from outside."""
    if "grids" in given:
        return [token_count(tuple(grid), model.config.vision.native.merge) for grid in given["grids"].tolist()]
    return [model.fusion.length if in_row(model) else 1] * len(given["images"])


def in_row(model: VisionLanguageModel) -> bool:
    """Whether image tokens stand among the words."""
    return getattr(model.fusion, "in_row", False)


def positions_of(model: VisionLanguageModel, segments: Tensor, places: Tensor, given: dict[str, Tensor]) -> Tensor:
    """[B, T] or, where the model has places in pictures, [B, T, 3]."""
    vision = model.config.vision
    if not model.config.text.rotary_sections or vision.native is None:
        return torch.arange(segments.shape[1]).expand(len(segments), -1)
    if "grids" in given:
        grids = [tuple(grid) for grid in given["grids"].tolist()]
    else:
        grids = [(1, *(side // vision.patch_size for side in given["images"].shape[-2:]))] * len(given["images"])
    return row_positions(segments, places, grids, vision.native.merge)
