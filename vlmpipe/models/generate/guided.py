"""A language model that never saw a picture describes one: CLIP says which of its words fit (MaGiC, arXiv 2205.02655).

Shapes: B rows, K candidates, T tokens of the prompt, S tokens so far, D width, V vocabulary, E width of CLIP's space.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.generate.rows import to_device
from vlmpipe.models.heads import LanguageModel
from vlmpipe.models.layers import Cache
from vlmpipe.models.processor import EncodedText, Processor, stack
from vlmpipe.models.text import PADDING, SHARED, TextModel
from vlmpipe.models.vlm import VisionLanguageModel

# For each row and each of its candidate texts (token ids without the prompt): how well it fits the row's picture.
Fit = Callable[[list[list[list[int]]]], Tensor]  # -> [B, K] logits


@dataclass(frozen=True)
class GuidedConfig:
    """The paper's settings for captions. `candidates`: its k; `degeneration`: alpha, how much a word that repeats what
    was said loses; `picture`: beta, how much one that fits the picture wins."""

    candidates: int = 45
    degeneration: float = 0.1
    picture: float = 2.0

    def __post_init__(self):
        if self.candidates < 1:
            raise UserError(f"candidates: found {self.candidates}; expected at least 1")
        if not 0 <= self.degeneration <= 1 or self.picture < 0:
            raise UserError(
                f"degeneration, picture: found {self.degeneration}, {self.picture}; expected 0 to 1, and at least 0"
            )


@torch.inference_mode()
def guided(
    text: TextModel, head: LanguageModel, prompts: Sequence[Sequence[int]], fit: Fit, limit: int, eos: int,
    config: GuidedConfig = GuidedConfig(),
) -> list[list[int]]:
    """New token ids of each row, `eos` included where it came.

    Each word is, of the K likeliest v (equation 5 of the paper), the one with the most
    (1 - alpha) p(v) - alpha max_j cos(h_v, h_j) + beta softmax(fit)(v), where h are the last hidden states.
    """
    device = text.token_embedding.weight.device
    rows = stack([[EncodedText(tuple(prompt), 0)] for prompt in prompts])
    tokens, segments, positions = (rows[name].to(device) for name in ("tokens", "segments", "positions"))
    cache = Cache(room=limit + config.candidates)
    x_BTD = text(text.token_embedding(tokens), segments, positions, cache)
    real_BT = segments != PADDING
    next_B = real_BT.sum(dim=1)
    each = torch.arange(len(tokens), device=device)
    hidden_BD = x_BTD[each, next_B - 1]
    said_BSD = F.normalize(x_BTD, dim=-1) * real_BT[..., None]
    seen_BS = real_BT
    cache.segments = torch.where(real_BT, SHARED, PADDING)
    new: list[list[int]] = [[] for _ in prompts]
    live = [True] * len(prompts)
    for _ in range(min(limit, text.config.context - int(next_B.max()))):
        chances_BV = head.logits(hidden_BD, text.token_embedding.weight).float().softmax(dim=-1)
        chance_BK, words_BK = chances_BV.topk(min(config.candidates, chances_BV.shape[1]), dim=1)
        x_BKD = try_words(text, words_BK, next_B, cache)
        worn_BK = (F.normalize(x_BKD, dim=-1) @ said_BSD.transpose(1, 2)).masked_fill(~seen_BS[:, None], -torch.inf)
        texts = [[[*said, word] for word in words] for said, words in zip(new, words_BK.tolist(), strict=True)]
        alpha = config.degeneration
        score_BK = (1 - alpha) * chance_BK - alpha * worn_BK.amax(dim=2)
        best_B = (score_BK + config.picture * fit(texts).softmax(dim=1)).argmax(dim=1)
        settle(cache, best_B, words_BK.shape[1])
        hidden_BD = x_BKD[each, best_B]
        for row, word in enumerate(words_BK[each, best_B].tolist()):
            if live[row]:
                new[row].append(word)
                live[row] = word != eos
        if not any(live):
            break
        said_BSD = torch.cat([said_BSD, F.normalize(hidden_BD, dim=-1)[:, None]], dim=1)
        seen_BS = torch.cat([seen_BS, torch.ones_like(best_B, dtype=torch.bool)[:, None]], dim=1)
        next_B = next_B + 1
    return new


def try_words(text: TextModel, words_BK: Tensor, next_B: Tensor, cache: Cache) -> Tensor:
    """[B, K, D]: hidden states of each candidate as the next word. They see what was said and not each other, so that
    the cache need not be copied K times."""
    segments = (torch.arange(words_BK.shape[1], device=words_BK.device) + 1).expand_as(words_BK)
    return text(text.token_embedding(words_BK), segments, next_B[:, None].expand_as(words_BK), cache)


def settle(cache: Cache, best_B: Tensor, count: int) -> None:
    """Of the last `count` positions, the best of each row stays."""
    each = torch.arange(len(best_B), device=best_B.device)
    start = len(cache) - count
    for kept in (cache.keys, cache.values):
        for tensor in kept:
            tensor[:, :, start] = tensor[each, :, start + best_B]
    cache.filled = [start + 1] * len(cache.filled)
    chosen = torch.full_like(cache.segments[:, :1], SHARED)
    cache.segments = torch.cat([cache.segments[:, :start], chosen], dim=1)


def picture_fit(
    scorer: VisionLanguageModel, scorer_processor: Processor, images: Sequence[Image.Image],
    decode: Callable[[list[int]], str],
) -> Fit:
    """How well a dual encoder finds that texts fit `images`: its scaled cosines. `decode`: the language model's."""
    image_BE = scorer.encode_image(scorer_processor.images(images).to(scorer.device))

    def fit(texts: list[list[list[int]]]) -> Tensor:
        encoded = [[scorer_processor.encode(decode(ids))] for row in texts for ids in row]
        text_BKE = scorer.encode_text(**to_device(stack(encoded), scorer)).unflatten(0, (len(texts), -1))
        return scorer.projection.scale() * (text_BKE @ image_BE[:, :, None])[..., 0]

    return torch.inference_mode()(fit)
