"""The text model: BERT, GPT-2 or Llama by config; a decoder when causal, with a key-value cache.

Shapes: B batch, T tokens now, S tokens seen, D width.

Segments say which tokens may see each other, so that several texts can stand in one row: 0 is padding, SHARED is
the prefix that the texts of the row see, 1, 2, ... are texts that never see one another. Several samples in one row
have a prefix each: texts 1 to TEXTS see SHARED = -1, the next TEXTS see -2, and so on.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.layers import (
    Cache,
    Memory,
    RotaryConfig,
    Transformer,
    TransformerConfig,
    build_norm,
    rotary_table,
    taken,
)

PADDING = 0
SHARED = -1
TEXTS = 4096  # of one sample in its row, at most


@dataclass(frozen=True)
class TextConfig:
    """A text transformer. `vocab_size` 0 takes the size of the tokenizer that is trained with the model."""

    transformer: TransformerConfig
    vocab_size: int = 0
    context: int = 77  # positions, the prefix of an image included
    positions: Literal["learned", "rotary", "none"] = "learned"
    rotary_theta: float = 10000.0
    rotary_sections: tuple[int, ...] = ()  # of time, y and x, in Qwen2-VL; empty: places in the row alone
    causal: bool = True
    embedding_norm: bool = False  # BERT's
    token_types: int = 0  # BERT's embeddings of which sentence a token belongs to
    final_norm: bool | None = None  # null: where norms come first
    pool: Literal["last", "first", "mean"] = "last"
    pooler: bool = False  # BERT's dense layer and tanh over what was pooled

    def __post_init__(self):
        per_head = self.transformer.per_head
        if self.positions == "rotary" and per_head % 2:
            raise UserError(f"positions: found 'rotary' with heads of width {per_head}; expected an even width")
        if self.rotary_sections and 2 * sum(self.rotary_sections) != per_head:
            raise UserError(
                f"rotary_sections: found {list(self.rotary_sections)} for heads of width {per_head}; expected numbers "
                f"that sum to {per_head // 2}"
            )
        if self.context < 2:
            raise UserError(f"context: found {self.context}; expected at least 2")

    @property
    def has_final_norm(self) -> bool:
        return self.transformer.norm_place == "pre" if self.final_norm is None else self.final_norm


def visible(
    queries_BT: Tensor, keys_BS: Tensor, causal: bool, full_prefix: bool = False, given_BS: Tensor | None = None
) -> Tensor:
    """[B, 1, T, S] true where a query may look, from the segments of both; the queries are the last T of the keys.

    Every row sees at least itself, so that padding gives numbers and not NaN. With `full_prefix` the shared tokens
    see each other in both directions (prefix language modelling, arXiv 2108.10904), and so do the tokens of one text
    that are `given_BS`.
    """
    query, key = queries_BT[:, :, None], keys_BS[:, None, :]
    seen = (query == key) | ((query > PADDING) & (key == SHARED - (query - 1) // TEXTS))
    if causal:
        total, new = keys_BS.shape[1], queries_BT.shape[1]
        place = torch.arange(total, device=keys_BS.device)
        backward = place[None, :] <= place[total - new :, None]
        if full_prefix:
            backward = backward | ((query < PADDING) & (query == key))
        if given_BS is not None:
            backward = backward | (given_BS[:, total - new :, None] & given_BS[:, None])
        seen = seen & backward
    return seen[:, None]


class TextModel(nn.Module):
    """Embeddings, positions, blocks, norm. The output matrix of a language model is a head, not part of this."""

    def __init__(self, config: TextConfig, memory_width: int = 0, words: bool = True):
        """`words`: false where embeddings come from elsewhere."""
        super().__init__()
        if config.vocab_size < 1:
            raise UserError(f"vocab_size: found {config.vocab_size}; expected the tokenizer's size")
        self.config = config
        width = config.transformer.width
        self.token_embedding = nn.Embedding(config.vocab_size, width) if words else None
        self.position_embedding = nn.Embedding(config.context, width) if config.positions == "learned" else None
        self.type_embedding = nn.Embedding(config.token_types, width) if config.token_types else None
        self.embedding_norm = build_norm(config.transformer) if config.embedding_norm else nn.Identity()
        self.embedding_dropout = nn.Dropout(config.transformer.dropout)
        self.transformer = Transformer(config.transformer, memory_width)
        self.norm = build_norm(config.transformer) if config.has_final_norm else nn.Identity()
        self.pooler = nn.Linear(width, width) if config.pooler else None

    def embed(self, embeddings_BTD: Tensor, positions: Tensor, types_BT: Tensor | None = None) -> Tensor:
        """[B, T, D]: what the first block gets. Embeddings come from `token_embedding`, from a picture, or both.

        positions: [B, T], or [B, T, sections] for rotary sections. types_BT: null is type 0 everywhere.
        """
        if self.position_embedding is not None:
            embeddings_BTD = embeddings_BTD + self.position_embedding(positions)
        if self.type_embedding is not None:
            types_BT = torch.zeros_like(positions) if types_BT is None else types_BT
            embeddings_BTD = embeddings_BTD + self.type_embedding(types_BT)
        return self.embedding_dropout(self.embedding_norm(embeddings_BTD))

    def forward(
        self,
        embeddings_BTD: Tensor,
        segments_BT: Tensor,
        positions: Tensor,
        cache: Cache | None = None,
        full_prefix: bool = False,
        weights: list | None = None,
        memory: Memory | None = None,
        looks: list | None = None,
        taps: list | None = None,
        types_BT: Tensor | None = None,
        given_BT: Tensor | None = None,
        only_B: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] after the last norm, or [B, 1, D] of the places `only_B`. `weights`, `looks`, `taps`: lists that
        are filled layer by layer with self-attention, cross-attention and hidden states. `given_BT`: tokens that see
        the later ones of their text that are given too; where a cache is, on the first call only."""
        keys_BS = segments_BT
        if cache is not None:
            keys_BS = segments_BT if cache.segments is None else torch.cat([cache.segments, segments_BT], dim=1)
            cache.segments = keys_BS
        mask = visible(segments_BT, keys_BS, self.config.causal, full_prefix, given_BT)
        x_BTD = self.embed(embeddings_BTD, positions, types_BT)
        rotary = None
        if self.config.positions == "rotary":
            turning = RotaryConfig(self.config.rotary_theta, self.config.rotary_sections)
            rotary = rotary_table(positions, self.config.transformer.per_head, turning)
        x_BTD = self.transformer(
            x_BTD, taps, only_B=only_B, mask=mask, rotary=rotary, cache=cache, weights=weights, memory=memory,
            looks=looks,
        )
        return self.norm(x_BTD)

    def encode(
        self, embeddings_BTD: Tensor, segments_BT: Tensor, positions: Tensor, types_BT: Tensor | None = None
    ) -> Tensor:
        """[B, D] for the whole text of each row, as `forward` and `pool` have it, with no more work than that takes."""
        only_B = self.standing(segments_BT)
        x_BTD = self(embeddings_BTD, segments_BT, positions, types_BT=types_BT, only_B=only_B)
        return self.pool(x_BTD, segments_BT if only_B is None else torch.ones_like(segments_BT[:, :1]))

    def pool(self, x_BTD: Tensor, segments_BT: Tensor) -> Tensor:
        """[B, D] for the whole text of each row."""
        only_B = self.standing(segments_BT)
        pooled_BD = self.mean(x_BTD, segments_BT) if only_B is None else taken(x_BTD, only_B)[:, 0]
        return pooled_BD if self.pooler is None else self.pooler(pooled_BD).tanh()

    def standing(self, segments_BT: Tensor) -> Tensor | None:
        """[B]: the place of the token that stands for the row; None: all do."""
        if self.config.pool == "mean":
            return None
        last_B = (segments_BT != PADDING).sum(dim=1) - 1
        return last_B if self.config.pool == "last" else torch.zeros_like(last_B)

    @staticmethod
    def mean(x_BTD: Tensor, segments_BT: Tensor) -> Tensor:
        """[B, D] of what is no padding."""
        weight = (segments_BT != PADDING).to(x_BTD.dtype)[..., None]
        return (x_BTD * weight).sum(dim=1) / weight.sum(dim=1)
