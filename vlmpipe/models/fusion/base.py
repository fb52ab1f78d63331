"""What every fusion gets and gives.

Shapes: B rows of text, n pictures (several may belong to one row), N tokens of a picture, T text tokens, D widths.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.fusion.resampler import ResamplerConfig
from vlmpipe.models.layers import Cache, TransformerConfig


@dataclass(frozen=True)
class SingleStreamConfig:
    """How image tokens join the words of one stack.

    `types`: kinds of tokens with an embedding each: 0 words, 1 the first picture of a row, 2 the second.
    `words_typed`: words get theirs too (ViLT), or have only the text model's own types (VisualBERT). `projector`: a
    linear layer on image tokens even where widths are equal. `image_norm`: image tokens go through the words' embedding
    norm. `image_positions`: size of a table of positions for image tokens, which all stand at the first of them:
    VisualBERT's have a place only where words are aligned to them.
    """

    types: int = 2
    words_typed: bool = True
    projector: bool = False
    image_norm: bool = False
    image_positions: int = 0

    def __post_init__(self):
        if self.types < 2 or self.image_positions < 0:
            raise UserError(
                f"found types {self.types}, image_positions {self.image_positions}; expected at least 2 and 0"
            )


@dataclass(frozen=True)
class CoAttentionConfig:
    """`image`: the blocks of the image stream. `depth` co-attentional layers of `heads` heads, whose queries, keys and
    values are `width` wide together (0: as the image stream); one stands before each of the last blocks."""

    image: TransformerConfig
    depth: int = 6
    heads: int = 8
    width: int = 0

    def __post_init__(self):
        if self.depth < 1 or self.heads < 1 or (self.width or self.image.width) % self.heads:
            raise UserError(
                f"found depth {self.depth}, heads {self.heads}, width {self.width or self.image.width}; expected at "
                f"least one layer and a divisor of the width"
            )


@dataclass(frozen=True)
class MultimodalConfig:
    """`transformer`: the blocks over both encoders' tokens."""

    transformer: TransformerConfig


@dataclass(frozen=True)
class FusionConfig:
    """Where image meets text.

    `none` keeps the encoders apart (CLIP). `prefix` puts projected image tokens among the words (LLaVA).

    `merge` folds merge x merge neighbouring image tokens into one wider one before the projector, which makes the
    prefix merge² times shorter; `attention: full` lets the prefix tokens see each other in both directions, and
    `attention: prefix` the given words of a text, too (prefix language modelling; pictures, which several texts may
    share, still look at no words).

    `cross` lets words look at pictures from outside (Flamingo, VisualGPT), `encoder_decoder` reads pictures and words
    with an encoder (SimVLM, Parti).
    """

    kind: Literal["none", "prefix", "single_stream", "co_attention", "multimodal", "cross", "encoder_decoder"] = "none"
    projector: Literal["linear", "mlp", "merger"] = "mlp"
    merge: int = 1
    attention: Literal["causal", "full", "prefix"] = "causal"
    single_stream: SingleStreamConfig | None = None
    co_attention: CoAttentionConfig | None = None
    multimodal: MultimodalConfig | None = None
    resampler: ResamplerConfig | None = None  # of `cross`
    look: Literal["last", "all"] = "last"  # of `cross`: at which of the pictures before a word

    def __post_init__(self):
        if self.merge < 1:
            raise UserError(f"merge: found {self.merge}; expected at least 1")
        for name in ("single_stream", "co_attention", "multimodal"):
            if (self.kind == name) != (getattr(self, name) is not None):
                raise UserError(f"kind: found '{self.kind}' and {name} {getattr(self, name)}; expected both or neither")


@dataclass(frozen=True)
class Inputs:
    """What a pass of the model is about.

    Attributes:
        images: [n, C, Y, X] uint8, or float when already normalised; patches [P, …] of variable-size pictures.
        tokens: [B, T] int64.
        segments: [B, T] which text of its row a token belongs to, 0 for padding (see `text.visible`).
        positions: [B, T] place inside its own text, counted from 0; a prefix that is not in the row is added.
        types: [B, T] BERT's token types.
        image_places: [B, T] bool, where the pictures stand in the rows, in order; None: each before its row.
        image_rows: [n] the row that each picture belongs to, ascending; None: one picture a row. What is looked for by
            masks and boxes: rows between two pictures' rows are about the first of them, too.
        frames: [n] the number of each picture in its clip, or among those that a text is about.
        grids: [n, 3] patches in time, down and across, for encoders of variable-size pictures.
        patch_mask: [n, N] bool, patches that are hidden from the model (masked image modelling).
        cache: filled and used by generation; images are given on the first call only.
        weights: a list to which each layer of the language model appends its attention.
        looks: a list to which each layer of cross-attention appends its weights.
        prefix: [B, T] bool, words that are given and never predicted: an encoder reads them, and see
            `FusionConfig.attention`.
        codes: [B, N] of a picture that is being written: what stands before each code; None: those of `images`.
        only: [B] the one place of each row whose token logits [B, 1, V] are wanted. The last block of a language model
            that reads pictures in its row computes no other, so that no other head may read it.
    """

    images: Tensor | None = None
    tokens: Tensor | None = None
    segments: Tensor | None = None
    positions: Tensor | None = None
    types: Tensor | None = None
    image_places: Tensor | None = None
    image_rows: Tensor | None = None
    frames: Tensor | None = None
    grids: Tensor | None = None
    patch_mask: Tensor | None = None
    cache: Cache | None = None
    weights: list | None = None
    looks: list | None = None
    prefix: Tensor | None = None
    codes: Tensor | None = None
    only: Tensor | None = None


@dataclass(frozen=True)
class Fused:
    """What heads read; None where the fusion has no such thing or got no such input."""

    text: Tensor | None = None  # [B, T, D], a token each
    image: Tensor | None = None  # [n, N, D], a token for each patch, after the fusion
    first: Tensor | None = None  # [B, D], the token that is pooled
    pooled: Tensor | None = None  # [B, D], picture and text together
    met: bool = True  # whether there were both a text and a picture


@dataclass(frozen=True)
class Widths:
    """Of the text, image and pooled tokens that a fusion gives."""

    text: int
    image: int
    pooled: int


class Fusion(nn.Module):
    """What heads and the text model have to know of a fusion.

    Attributes:
        memory_width: of what the text model's cross-attention looks at; 0 where it has none.
        widths: of what is given, where heads over the fusion can read it.
    """

    memory_width = 0
    widths: Widths

    def __init__(self, config):
        super().__init__()


class Pooler(nn.Module):
    """BERT's dense layer and tanh over a first token [B, D]."""

    def __init__(self, width: int):
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, first_BD: Tensor) -> Tensor:
        return self.dense(first_BD).tanh()


def see(vision: nn.Module, inputs: Inputs, taps: list | None = None) -> Tensor:
    """[n, N, D] image tokens, with the patches of `inputs.patch_mask` hidden.

    Raises:
        UserError: the encoder can't hide patches.
    """
    hiding = {}
    if inputs.patch_mask is not None:
        hide = ability(vision, "hide", "hidden patches")
        hiding["embedded"] = lambda x_nND: hide(x_nND, inputs.patch_mask)
    return vision(inputs.images, taps=taps, grids=inputs.grids, frames=inputs.frames, **hiding)


def ability(vision: nn.Module, name: str, found: str) -> Callable:
    if not hasattr(vision, name):
        raise UserError(f"found {found} with a {type(vision).__name__}; expected a vision transformer or regions")
    return getattr(vision, name)


def real_tokens(vision: nn.Module, inputs: Inputs, tokens_nND: Tensor) -> Tensor:
    """[n, N] bool: which image tokens are of the picture and not of what it was filled up with to a common size."""
    if inputs.grids is None:
        return torch.ones(tokens_nND.shape[:2], dtype=torch.bool, device=tokens_nND.device)
    real = ability(vision, "real", "grids of filled up pictures")
    return real(inputs.grids, tuple(inputs.images.shape[-2:]))


def owners(inputs: Inputs) -> Tensor:
    """[B, 1] the segment of each row's text, which its pictures' tokens share.

    Raises:
        UserError: a row holds several texts, which would see each other through the pictures.
    """
    segments_BT = inputs.segments
    owner_B1 = segments_BT[:, :1]
    if not torch.compiler.is_compiling() and bool(((segments_BT != owner_B1) & (segments_BT != 0)).any()):
        raise UserError("found several texts in a row whose pictures look at the text; expected one; set per_row to 1")
    return owner_B1
