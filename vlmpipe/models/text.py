"""The text model: BERT, GPT-2 or Llama by config; a decoder when causal, with a key-value cache.

Shapes: B batch, T tokens now, S tokens seen, D width.

Segments say which tokens may see each other, so that several texts can stand in one row: 0 is padding, SHARED is
the prefix that every text of the row sees, 1, 2, ... are texts that never see one another.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.layers import Cache, Transformer, TransformerConfig, build_norm

PADDING = 0
SHARED = -1


@dataclass(frozen=True)
class TextConfig:
    """A text transformer. `vocab_size` 0 takes the size of the tokenizer that is trained with the model."""

    transformer: TransformerConfig
    vocab_size: int = 0
    context: int = 77  # positions, the prefix of an image included
    positions: Literal["learned", "rotary", "none"] = "learned"
    rotary_theta: float = 10000.0
    causal: bool = True
    embedding_norm: bool = False  # BERT's
    pool: Literal["last", "first", "mean"] = "last"

    def __post_init__(self):
        if self.positions == "rotary" and self.transformer.head_width % 2:
            raise UserError(
                f"positions: found 'rotary' with heads of width {self.transformer.head_width}; expected an even width"
            )
        if self.context < 2:
            raise UserError(f"context: found {self.context}; expected at least 2")


def visible(queries_BT: Tensor, keys_BS: Tensor, causal: bool, full_prefix: bool = False) -> Tensor:
    """[B, 1, T, S] true where a query may look, from the segments of both; the queries are the last T of the keys.

    Every row sees at least itself, so that padding gives numbers and not NaN. With `full_prefix` the shared tokens
    see each other in both directions (prefix language modelling, arXiv 2108.10904).
    """
    query, key = queries_BT[:, :, None], keys_BS[:, None, :]
    seen = (query == key) | ((key == SHARED) & (query != PADDING))
    if causal:
        total, new = keys_BS.shape[1], queries_BT.shape[1]
        place = torch.arange(total, device=keys_BS.device)
        backward = place[None, :] <= place[total - new :, None]
        if full_prefix:
            backward = backward | ((query == SHARED) & (key == SHARED))
        seen = seen & backward
    return seen[:, None]


class TextModel(nn.Module):
    """Embeddings, positions, blocks, norm. The output matrix of a language model is a head, not part of this."""

    def __init__(self, config: TextConfig):
        super().__init__()
        if config.vocab_size < 1:
            raise UserError(f"vocab_size: found {config.vocab_size}; expected the tokenizer's size")
        self.config = config
        width = config.transformer.width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.position_embedding = nn.Embedding(config.context, width) if config.positions == "learned" else None
        self.embedding_norm = build_norm(config.transformer) if config.embedding_norm else nn.Identity()
        theta = config.rotary_theta if config.positions == "rotary" else None
        self.transformer = Transformer(config.transformer, theta)
        self.norm = build_norm(config.transformer) if config.transformer.norm_place == "pre" else nn.Identity()

    def forward(
        self,
        embeddings_BTD: Tensor,
        segments_BT: Tensor,
        positions_BT: Tensor,
        cache: Cache | None = None,
        full_prefix: bool = False,
        weights: list | None = None,
    ) -> Tensor:
        """[B, T, D] after the last norm. Embeddings come from `token_embedding`, from a picture, or both in a row."""
        keys_BS = segments_BT
        if cache is not None:
            keys_BS = segments_BT if cache.segments is None else torch.cat([cache.segments, segments_BT], dim=1)
            cache.segments = keys_BS
        mask = visible(segments_BT, keys_BS, self.config.causal, full_prefix)
        if self.position_embedding is not None:
            embeddings_BTD = embeddings_BTD + self.position_embedding(positions_BT)
        x_BTD = self.embedding_norm(embeddings_BTD)
        x_BTD = self.transformer(x_BTD, mask=mask, positions_BT=positions_BT, cache=cache, weights=weights)
        return self.norm(x_BTD)

    def pool(self, x_BTD: Tensor, segments_BT: Tensor) -> Tensor:
        """[B, D] for the whole text of each row."""
        real_BT = segments_BT != PADDING
        if self.config.pool == "mean":
            weight = real_BT.to(x_BTD.dtype)[..., None]
            return (x_BTD * weight).sum(dim=1) / weight.sum(dim=1)
        if self.config.pool == "first":
            return x_BTD[:, 0]
        last_B = real_BT.sum(dim=1) - 1
        return x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), last_B]
