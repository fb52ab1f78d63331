"""Decoding of a whole batch with a key-value cache: greedy, sampled, or of given texts only.

Rows that ended leave the batch, so they cost nothing.

Shapes: B rows still being written, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmpipe.models.generate.config import GREEDY, GenerationConfig
from vlmpipe.models.generate.trie import Trie, restrict
from vlmpipe.models.layers import Cache
from vlmpipe.models.text import PADDING
from vlmpipe.models.vlm import VisionLanguageModel

# Rows that ended are taken out once they are so many of all: taking out copies the cache.
ENDED = 0.25


@dataclass
class Written:
    """Where decoding stands: what comes next in each row."""

    cache: Cache
    logits_BV: Tensor
    positions_B: Tensor  # of the next word, in its own text
    room_B: Tensor  # words for which the model has positions left

    def select(self, rows: Tensor) -> None:
        self.cache.select(rows)
        self.positions_B, self.room_B = self.positions_B[rows], self.room_B[rows]


def prefill(model: VisionLanguageModel, batch: dict[str, Any], room: int) -> Written:
    """Read pictures and prompts; `room`: so many words may follow."""
    cache = Cache(room=room + batch["tokens"].shape[1])
    if "start" in batch:
        batch = read_starts(model, batch, cache)
    real_BT = batch["segments"] != PADDING
    length = real_BT.shape[1]
    last_B = length - 1 - real_BT.flip(1).to(torch.uint8).argmax(dim=1)
    logits_BV = model(**batch, only=last_B, cache=cache, heads=("language_model",)).logits[:, 0]
    positions = batch["positions"] if batch["positions"].ndim == 2 else batch["positions"].amax(dim=2)
    positions_B = positions.masked_fill(~real_BT, -1).amax(dim=1) + 1
    offset_B = cache.offset[:, 0] if isinstance(cache.offset, Tensor) else cache.offset
    return Written(cache, logits_BV, positions_B, model.config.text.context - positions_B - offset_B)


def read_starts(model: VisionLanguageModel, batch: dict[str, Any], cache: Cache) -> dict[str, Tensor]:
    """Read what rows begin with once, and give every row the cache of its own; returns what is left to read."""
    first_B = batch["start"]["tokens"].new_zeros(len(batch["start"]["tokens"]))
    model(**batch["start"], only=first_B, cache=cache, heads=())
    cache.select(batch["readers"])
    return {name: value for name, value in batch.items() if name not in ("start", "readers")}


def advance(model: VisionLanguageModel, written: Written, tokens_B: Tensor) -> None:
    """Write one word in each row; in one without positions left it stands anywhere, for nothing is read from it."""
    positions = written.positions_B.masked_fill(written.room_B < 1, 0)[:, None]
    written.logits_BV = model(
        tokens=tokens_B[:, None], segments=torch.ones_like(positions), positions=positions, cache=written.cache,
        heads=("language_model",),
    ).logits[:, -1]
    written.positions_B, written.room_B = written.positions_B + 1, written.room_B - 1


@torch.inference_mode()
def decode(
    model: VisionLanguageModel, batch: dict[str, Any], limit: int, eos: int, config: GenerationConfig = GREEDY,
    choices: Sequence[Trie] | None = None,
) -> list[list[int]]:
    """New token ids of each row, `eos` included where it came.

    Args:
        batch: inputs of `forward`, see `rows.ask`.
        limit: most new tokens; a text also ends where the model's positions do.
        choices: for each row the texts that may be written.
    """
    count = len(batch["tokens"])
    draws = torch.rand(limit, count, generator=torch.Generator().manual_seed(config.seed)).to(model.device)
    written = prefill(model, batch, limit)
    new: list[list[int]] = [[] for _ in range(count)]
    rows = torch.arange(count, device=model.device)
    live_B = written.room_B > 0
    nodes = None if choices is None else [0] * count
    for step in range(limit):
        if not live_B.any():
            break
        logits_BV = written.logits_BV
        if nodes is not None:
            logits_BV = restrict(logits_BV, [choices[row] for row in rows.tolist()], nodes)
        greedy = config.method == "greedy"
        tokens_B = logits_BV.argmax(dim=-1) if greedy else sample(logits_BV, config, draws[step, rows])
        for row, token, live in zip(rows.tolist(), tokens_B.tolist(), live_B.tolist(), strict=True):
            if live:
                new[row].append(token)
        if nodes is not None:
            steps = zip(rows.tolist(), nodes, tokens_B.tolist(), strict=True)
            nodes = [choices[row].step(node, token) for row, node, token in steps]
        live_B = live_B & (tokens_B != eos) & (written.room_B > 1)
        if step + 1 == limit or not live_B.any():
            break
        ended = 1 - live_B.float().mean().item()
        if ended >= ENDED:
            kept = live_B.nonzero()[:, 0]
            written.select(kept)
            rows, tokens_B, live_B = rows[kept], tokens_B[kept], live_B[kept]
            nodes = None if nodes is None else [nodes[index] for index in kept.tolist()]
        advance(model, written, tokens_B)
    return new


def sample(logits_BV: Tensor, config: GenerationConfig, uniform_B: Tensor) -> Tensor:
    """[B] tokens: the one at which the mass, from the likeliest word on, passes `uniform_B` of all that is left."""
    probabilities_BV = keep(logits_BV.float(), config).softmax(dim=-1)
    sorted_BV, tokens_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
    mass_BV = sorted_BV.cumsum(dim=-1)
    place_B1 = (mass_BV <= uniform_B[:, None] * mass_BV[:, -1:]).sum(dim=-1, keepdim=True)
    last_B1 = (sorted_BV > 0).sum(dim=-1, keepdim=True) - 1
    return tokens_BV.gather(1, torch.minimum(place_B1, last_B1))[:, 0]


def keep(logits_BV: Tensor, config: GenerationConfig) -> Tensor:
    """The logits of what may be drawn, the rest -inf: temperature, then `top_k`, then `top_p` (arXiv 1904.09751)."""
    logits_BV = logits_BV / config.temperature
    if config.top_k:
        least_B1 = logits_BV.topk(min(config.top_k, logits_BV.shape[1]), dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if config.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = sorted_BV.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before_BV[:, 0] = 0  # the likeliest always stays
        out_BV = torch.zeros_like(before_BV, dtype=torch.bool).scatter(1, order_BV, before_BV >= config.top_p)
        logits_BV = logits_BV.masked_fill(out_BV, -torch.inf)
    return logits_BV
