"""How likely a model holds each of a list of texts: prompts are read once, then all texts of a row in one go.

Shapes: B rows, A texts of a row, T tokens of those that are read together.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.fusion.cross import Media
from vlmpipe.models.generate.decode import Written, prefill
from vlmpipe.models.text import PADDING, SHARED
from vlmpipe.models.vlm import VisionLanguageModel

# Tokens of one row's texts that are read together.
TOGETHER = 512


@torch.inference_mode()
def log_likelihoods(
    model: VisionLanguageModel, batch: dict[str, Tensor], texts: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """The log-probability in nats of each text [B][A] of token ids after its row's prompt.

    Raises:
        UserError: a text is longer than the positions that the model has left.
    """
    written = prefill(model, batch, TOGETHER)
    longest, room = max(len(text) for row in texts for text in row), int(written.room_B.min())
    if longest - 1 > room:
        raise UserError(f"found a text of {longest} tokens where the model has {room} positions left; shorten it")
    first_BV = written.logits_BV.float().log_softmax(dim=-1)
    # What was read is now for all texts to see; they never see each other.
    cache = written.cache
    cache.segments = cache.segments.masked_fill(cache.segments != PADDING, SHARED)
    if isinstance(cache.memory, Media):
        cache.memory = cache.memory.shared()
    totals = [first_BV[index, [text[0] for text in row]].tolist() for index, row in enumerate(texts)]
    filled, segments = list(cache.filled), cache.segments
    for part in parts(texts):
        for (row, number), score in read(model, written, texts, part).items():
            totals[row][number] += score
        cache.filled, cache.segments = list(filled), segments
    return totals


def parts(texts: Sequence[Sequence[Sequence[int]]]) -> list[list[list[int]]]:
    """For each pass the numbers of the texts [B][…] that are read in it; texts of one token need none."""
    found: list[list[list[int]]] = []
    for row, candidates in enumerate(texts):
        at, used = 0, 0
        for number, text in enumerate(candidates):
            if len(text) < 2:
                continue
            if used and used + len(text) - 1 > TOGETHER:
                at, used = at + 1, 0
            while len(found) <= at:
                found.append([[] for _ in texts])
            found[at][row].append(number)
            used += len(text) - 1
    return found


def read(
    model: VisionLanguageModel, written: Written, texts: Sequence[Sequence[Sequence[int]]], part: list[list[int]]
) -> dict[tuple[int, int], float]:
    """What the tokens after the first of each text add, by (row, number of the text)."""
    length = max(sum(len(texts[row][number]) - 1 for number in numbers) for row, numbers in enumerate(part))
    tokens = torch.zeros(len(part), length, dtype=torch.int64)
    segments, steps = torch.full_like(tokens, PADDING), torch.zeros_like(tokens)
    labels, owner = torch.full_like(tokens, -100), torch.zeros_like(tokens)
    for row, numbers in enumerate(part):
        at = 0
        for number in numbers:
            text = torch.tensor(texts[row][number])
            end = at + len(text) - 1
            tokens[row, at:end], labels[row, at:end] = text[:-1], text[1:]
            segments[row, at:end], owner[row, at:end] = number + 2, number
            steps[row, at:end] = torch.arange(len(text) - 1)
            at = end
    device = model.device
    positions = written.positions_B[:, None] + steps.to(device)
    scored = (labels != -100).to(device)
    logits_MV = model(
        tokens=tokens.to(device), segments=segments.to(device), positions=positions.masked_fill(~scored, 0),
        select=scored, cache=written.cache, heads=("language_model",),
    ).logits
    scores = -F.cross_entropy(logits_MV.float(), labels.to(device)[scored], reduction="none")
    found: dict[tuple[int, int], float] = {}
    rows = torch.arange(len(part))[:, None].expand_as(owner)
    for row, number, score in zip(
        rows[labels != -100].tolist(), owner[labels != -100].tolist(), scores.tolist(), strict=True
    ):
        found[row, number] = found.get((row, number), 0.0) + score
    return found
