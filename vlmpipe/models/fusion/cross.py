"""Words that look at pictures through cross-attention: Flamingo (arXiv 2204.14198), VisualGPT (arXiv 2102.10407).

Shapes: B rows, n pictures, m media (a picture, or the frames of a clip), K the most media of a row, R tokens that a
medium becomes, T text tokens, C width of those tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.fusion.base import Fused, Fusion, Inputs, Widths, see
from vlmpipe.models.fusion.resampler import Resampler
from vlmpipe.models.fusion.rows import Rows, rows_of
from vlmpipe.models.layers import Memory
from vlmpipe.models.text import PADDING, SHARED, visible


@dataclass(frozen=True)
class Media:
    """What the rows can look at; generation keeps it in `Cache.memory`, whose rows beams choose among.

    Attributes:
        tokens: [B, K, R, C].
        segments: [B, K] of the text that each medium stands in, SHARED for one before the row, PADDING for none.
        passed: [B] media that stand before the tokens to come.
    """

    tokens: Tensor
    segments: Tensor
    passed: Tensor

    def shared(self) -> "Media":
        """The same for all texts to see that follow."""
        return replace(self, segments=torch.where(self.segments == PADDING, PADDING, SHARED))


class Cross(Fusion):
    """The text model's cross-attention looks at each row's pictures, through a resampler where there is one.

    A token sees the last picture at or before it in its own text, or every one of them with `look: all`; a token
    before the first picture sees none, and gets zeros. `length` is R, of pictures of the configured size.
    """

    def __init__(self, config):
        super().__init__(config)
        refuse_native(config.vision)
        fusion, width = config.fusion, config.vision.width
        self.last = fusion.look == "last"
        self.resampler = Resampler(fusion.resampler, width) if fusion.resampler else None
        self.memory_width = fusion.resampler.transformer.width if fusion.resampler else width
        self.length = fusion.resampler.latents if fusion.resampler else config.vision.side**2
        own = config.text.transformer.width
        self.widths = Widths(own, self.memory_width, own)

    def forward(self, vision: nn.Module, text: nn.Module, inputs: Inputs) -> Fused:
        media = inputs.cache.memory if inputs.cache is not None and inputs.images is None else None
        media = self.media(vision, inputs) if media is None else media
        places_BT = torch.zeros_like(inputs.segments) if inputs.image_places is None else inputs.image_places.long()
        passed_BT = media.passed[:, None] + places_BT.cumsum(dim=1)
        if inputs.cache is not None:
            inputs.cache.memory = replace(media, passed=passed_BT[:, -1])
        memory = Memory(media.tokens.flatten(1, 2), self.mask(media, inputs.segments, passed_BT))
        x_BTD = text(
            text.token_embedding(inputs.tokens), inputs.segments, inputs.positions, cache=inputs.cache,
            weights=inputs.weights, memory=memory, looks=inputs.looks, types_BT=inputs.types,
        )
        return whole(text, x_BTD, inputs.segments)

    def media(self, vision: nn.Module, inputs: Inputs) -> Media:
        """Pictures of each row, as far as there are any."""
        count, device = len(inputs.tokens), inputs.tokens.device
        if inputs.images is None:
            weight = next(vision.parameters())
            nothing = inputs.segments.new_full((count, 1), PADDING)
            return Media(weight.new_zeros(count, 1, 1, self.memory_width), nothing, nothing[:, 0])
        tokens = vision.patches(see(vision, inputs))
        image_rows = inputs.image_rows
        if self.resampler is not None:
            tokens = self.resampler(tokens, inputs.frames)
            if inputs.frames is not None and image_rows is not None:
                image_rows = image_rows[inputs.frames == 0]
        rows = rows_of(len(tokens), image_rows, count, device)
        segments, passed = stand(inputs, len(tokens), rows)
        return Media(rows.gather(tokens), segments, passed)

    def mask(self, media: Media, segments_BT: Tensor, passed_BT: Tensor) -> Tensor:
        """[B, 1, T, K * R] true where a token may look."""
        owner_BK, number_K = media.segments, torch.arange(media.segments.shape[1], device=segments_BT.device)
        own_BTK = visible(segments_BT, owner_BK, causal=False)[:, 0]
        seen = own_BTK & (number_K < passed_BT[..., None]) & (owner_BK != PADDING)[:, None]
        if self.last:
            seen = seen & (seen.flip(-1).cumsum(-1).flip(-1) == 1)
        return seen.repeat_interleave(media.tokens.shape[2], dim=-1)[:, None]


def whole(text: nn.Module, x_BTD: Tensor, segments_BT: Tensor) -> Fused:
    """The words and what stands for all of a row: of a decoder, its last word, which has seen all (SimVLM, section 4.1,
    classifies with it)."""
    pooled_BD = text.pool(x_BTD, segments_BT)
    return Fused(text=x_BTD, first=pooled_BD, pooled=pooled_BD)


def refuse_native(vision) -> None:
    """Raises UserError for an encoder whose pictures have different numbers of tokens."""
    if vision.native is not None:
        raise UserError("vision.native: found one with cross-attention; expected pictures of one size; set it to null")


def stand(inputs: Inputs, count: int, rows: Rows) -> tuple[Tensor, Tensor]:
    """[B, K] the text that each of `count` media stands in, and [B] how many stand before their row.

    Raises:
        UserError: there are not as many places as media.
    """
    places_BT = inputs.image_places
    if places_BT is None:
        before = rows.gather(torch.full((count,), SHARED, device=inputs.segments.device))
        return before, (before == SHARED).sum(dim=1)
    owner_m = inputs.segments[places_BT]
    if len(owner_m) != count:
        raise UserError(
            f"found {len(owner_m)} places for {count} pictures or clips; expected as many; give a clip one place and "
            f"number its frames from 0"
        )
    return rows.gather(owner_m), inputs.segments.new_zeros(len(places_BT))
