"""Beam search, by the rules of `transformers`: the same texts with the same scores.

Shapes: B rows still being searched, K beams, C = 2 K candidates, T tokens written so far, L most tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmpipe.models.generate.config import GenerationConfig
from vlmpipe.models.generate.decode import Written, advance, prefill
from vlmpipe.models.generate.trie import Trie
from vlmpipe.models.vlm import VisionLanguageModel


@dataclass(frozen=True)
class Hypothesis:
    """A text and its log-probability / length^penalty."""

    ids: tuple[int, ...]
    score: float


@dataclass
class Beams:
    """Texts that go on and texts that ended, best first; a score of -inf is none."""

    tokens_BKL: Tensor
    scores_BK: Tensor  # log-probabilities
    ended_BKL: Tensor
    lengths_BK: Tensor
    ended_scores_BK: Tensor  # by length

    def rows(self, kept: Tensor) -> "Beams":
        return Beams(*(value[kept] for value in vars(self).values()))


@torch.inference_mode()
def beam_search(
    model: VisionLanguageModel, batch: dict[str, Tensor], limit: int, eos: int, config: GenerationConfig,
    choices: Sequence[Trie] | None = None,
) -> list[list[Hypothesis]]:
    """The best texts of each row, at most `config.beams`, best first. Arguments as in `decode`."""
    count, beams = len(batch["tokens"]), config.beams
    found: list[list[Hypothesis]] = [[] for _ in range(count)]
    written = prefill(model, batch, limit)
    limits_B = written.room_B.clamp(max=limit)
    rows = (limits_B > 0).nonzero()[:, 0]
    if not len(rows):
        return found
    written.select(rows)
    logits_BKV, limits_B = written.logits_BV[rows][:, None], limits_B[rows]
    state = start(len(rows), beams, limit, eos, model.device)
    for step in range(limit):
        scores_BKV = logits_BKV.float().log_softmax(dim=-1)
        if choices is not None:
            forbid(scores_BKV, state.tokens_BKL[:, :, :step], [choices[row] for row in rows.tolist()])
        last_B = limits_B == step + 1
        state, parents_BK, over_B = extend(state, scores_BKV, step, eos, last_B, config)
        for index in over_B.nonzero()[:, 0].tolist():
            found[rows[index]] = hypotheses(state, index)
        kept = (~over_B).nonzero()[:, 0]
        if not len(kept):
            break
        follow(written, parents_BK, kept, logits_BKV.shape[1])
        state, rows, limits_B = state.rows(kept), rows[kept], limits_B[kept]
        advance(model, written, state.tokens_BKL[:, :, step].flatten())
        logits_BKV = written.logits_BV.unflatten(0, (-1, beams))
    return found


def start(rows: int, beams: int, limit: int, eos: int, device: torch.device) -> Beams:
    """One empty text in each row."""
    tokens = torch.full((rows, beams, limit), eos, device=device)
    none = torch.full((rows, beams), -torch.inf, device=device)
    return Beams(tokens, torch.zeros(rows, 1, device=device), tokens, torch.zeros_like(none, dtype=torch.int64), none)


def forbid(scores_BKV: Tensor, tokens_BKT: Tensor, tries: Sequence[Trie]) -> None:
    """-inf for what no trie has after the words so far."""
    for row, trie in enumerate(tries):
        for beam in range(scores_BKV.shape[1]):
            node = 0
            for token in tokens_BKT[row, beam].tolist():
                node = trie.step(node, token)
            allowed = trie.allowed(node)
            left = torch.full_like(scores_BKV[row, beam], -torch.inf)
            left[allowed] = scores_BKV[row, beam, allowed]
            scores_BKV[row, beam] = left


def extend(
    state: Beams, scores_BKV: Tensor, step: int, eos: int, last_B: Tensor, config: GenerationConfig
) -> tuple[Beams, Tensor, Tensor]:
    """One word more: the state after it, the beam [B, K] that each text came from, and the rows [B] that are done.

    Twice as many candidates as beams are looked at, so that enough go on if all beams end; only the first half may end.
    """
    beams, vocabulary = config.beams, scores_BKV.shape[2]
    total = (scores_BKV + state.scores_BK[:, :, None]).flatten(1)
    scores_BC, index_BC = total.topk(min(2 * beams, total.shape[1]), dim=1)
    parents_BC, words_BC = index_BC // vocabulary, index_BC % vocabulary
    texts_BCL = state.tokens_BKL.gather(1, parents_BC[..., None].expand(-1, -1, state.tokens_BKL.shape[2]))
    texts_BCL[:, :, step] = words_BC
    stops_BC = (words_BC == eos) | last_B[:, None]
    ended = merge(state, texts_BCL[:, :beams], scores_BC[:, :beams], stops_BC[:, :beams], step + 1, config)
    open_BC = scores_BC.masked_fill(stops_BC, -torch.inf)
    going_BK, which_BK = open_BC.topk(beams, dim=1)
    tokens_BKL = texts_BCL.gather(1, which_BK[..., None].expand(-1, -1, texts_BCL.shape[2]))
    worst_B = ended[2].amin(dim=1)
    hopeless_B = going_BK[:, 0] / (step + 1) ** config.length_penalty <= worst_B
    full_B = (worst_B > -torch.inf) & config.early_stopping
    over_B = hopeless_B | full_B | (going_BK[:, 0] == -torch.inf)
    return Beams(tokens_BKL, going_BK, *ended), parents_BC.gather(1, which_BK), over_B


def merge(
    state: Beams, texts_BKL: Tensor, scores_BK: Tensor, stops_BK: Tensor, length: int, config: GenerationConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """The best texts that ended, the new ones among them: tokens, lengths and scores."""
    scores_BK = (scores_BK / length**config.length_penalty).masked_fill(~stops_BK, -torch.inf)
    scores = torch.cat([state.ended_scores_BK, scores_BK], dim=1)
    lengths = torch.cat([state.lengths_BK, torch.full_like(scores_BK, length, dtype=torch.int64)], dim=1)
    tokens = torch.cat([state.ended_BKL, texts_BKL], dim=1)
    best_BK, which_BK = scores.topk(config.beams, dim=1)
    chosen = which_BK[..., None].expand(-1, -1, tokens.shape[2])
    return tokens.gather(1, chosen), lengths.gather(1, which_BK), best_BK


def follow(written: Written, parents_BK: Tensor, kept: Tensor, before: int) -> None:
    """The cache of the beams that go on, of the rows that do; there were `before` beams a row."""
    first_B1 = torch.arange(len(parents_BK), device=parents_BK.device)[:, None] * before
    written.select((first_B1 + parents_BK)[kept].flatten())


def hypotheses(state: Beams, row: int) -> list[Hypothesis]:
    found = []
    for tokens, length, score in zip(
        state.ended_BKL[row].tolist(), state.lengths_BK[row].tolist(), state.ended_scores_BK[row].tolist(), strict=True
    ):
        if score > -torch.inf:
            found.append(Hypothesis(tuple(tokens[:length]), score))
    return found
