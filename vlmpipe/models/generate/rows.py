"""What a model is asked, as the tensors of its forward pass: pictures, prompts, and examples shown before them.

Shapes: B rows, n pictures, C colours, Y and X pixels, T tokens.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

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
LEAST_TEXT = 16  # tokens for which there must be room behind several pictures


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
) -> dict[str, Any]:
    """Inputs of `forward` for one prompt about each picture, after the same examples in every row.

    With `once` what several rows begin with, up to their last picture, is there once, where the model can read it that
    way: `start` holds its inputs, and `readers` [B] which of its rows each row goes on from. `decode.prefill` takes
    them.
    """
    marked = any(processor.picture in prompt.ids for prompt in prompts)
    single = once and reads_pictures_first(model)
    if not (examples or marked or single):
        return {
            **picture_inputs(model, processor, images),
            **to_device(stack([[prompt] for prompt in prompts]), model, QUESTIONED),
        }
    before = []
    for example in examples:
        before += said(processor, example.image, processor.encode_answer(example.question, example.answer))
    rows = [[*before, *said(processor, image, prompt)] for image, prompt in zip(images, prompts, strict=True)]
    if single:
        starts, readers = shared([start_of(row) for row in rows])
        if len(starts) < len(rows):
            return go_on(model, processor, starts, readers, [row[-1][1] for row in rows])
    return interleave(model, processor, rows)


def said(processor: Processor, seen: Image.Image | tuple[Image.Image, ...], text: EncodedText) -> list[Part]:
    """Pictures and their text: the pictures where the text marks them, as chat templates do, or else before it."""
    *first, last = seen if isinstance(seen, tuple) else (seen,)
    at = text.ids.index(processor.picture) if processor.picture in text.ids else None
    start, rest = ((), text.ids) if at is None else (text.ids[:at], text.ids[at + 1 :])
    alone = [(image, EncodedText((), 0)) for image in first]
    return [(None, EncodedText(start, 0)), *alone, (last, EncodedText(rest, 0))]


def start_of(row: Sequence[Part]) -> list[Part]:
    """A row up to its last picture."""
    return [*row[:-1], (row[-1][0], EncodedText((), 0))]


def shared(starts: Sequence[Sequence[Part]]) -> tuple[list[Sequence[Part]], list[int]]:
    """The starts that differ, and for each start its number among them."""
    numbers: dict[object, int] = {}
    contents: dict[int, object] = {}
    readers = []
    for start in starts:
        for image, _ in start:
            if image is not None and id(image) not in contents:
                contents[id(image)] = (image.mode, image.size, image.tobytes())
        key = tuple((image is not None and contents[id(image)], text.ids) for image, text in start)
        readers.append(numbers.setdefault(key, len(numbers)))
    return [starts[readers.index(number)] for number in range(len(numbers))], readers


def go_on(
    model: VisionLanguageModel, processor: Processor, starts: Sequence[Sequence[Part]], readers: Sequence[int],
    texts: Sequence[EncodedText],
) -> dict[str, Any]:
    """Inputs of `forward` for the starts, and for texts that go on from them."""
    start = interleave(model, processor, starts)
    positions = start["positions"] if start["positions"].ndim == 2 else start["positions"].amax(dim=2)
    ends = positions.masked_fill(start["segments"] == PADDING, -1).amax(dim=1) + 1
    batch = to_device(stack([[text] for text in texts]), model, QUESTIONED)
    readers = torch.tensor(readers, device=model.device)
    batch["positions"] = batch["positions"] + ends[readers][:, None]
    check_length(model, int(batch["positions"].max()) + 1)
    return {**batch, "start": start, "readers": readers}


def check_length(model: VisionLanguageModel, length: int) -> None:
    if model.text.position_embedding is not None and length > model.config.text.context:
        raise UserError(
            f"found a row of {length} tokens for text.context {model.config.text.context}; give fewer examples"
        )


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
    check_length(model, length)
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


def with_room(model: VisionLanguageModel, processor: Processor, pictures: int) -> Processor:
    """A processor whose texts are short enough for so many pictures before them; the given one stays as it is.

    Raises:
        UserError: no room is left, or the model reads one picture alone.
    """
    if pictures < 2:
        return processor
    if model.language_model is None:
        raise UserError(
            f"found {pictures} pictures in a row; expected a model with heads.language_model or heads.statement for "
            f"them; choose another model or task"
        )
    taken = pictures * getattr(model.fusion, "length", 0) if model.text.position_embedding is not None else 0
    left = model.config.text.context - taken
    if left < LEAST_TEXT:
        raise UserError(
            f"text.context: found {model.config.text.context} for {pictures} pictures of {model.fusion.length} tokens; "
            f"expected at least {taken + LEAST_TEXT}; raise model.architecture.text.context"
        )
    roomy = copy(processor)
    roomy.text_limit = min(processor.text_limit, left)
    return roomy
