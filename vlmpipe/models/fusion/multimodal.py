"""Both encoders, and a third transformer over what they gave: FLAVA (arXiv 2112.04482).

Shapes: n pictures, one a row of text, N tokens of a picture, T words, S tokens of both and the class token, D width of
the transformer over both.
"""

import torch
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.fusion.base import Fused, Fusion, Inputs, Pooler, Widths, owners, real_tokens, see
from vlmpipe.models.fusion.rows import rows_of
from vlmpipe.models.layers import Transformer, build_norm
from vlmpipe.models.text import PADDING, visible


class Multimodal(Fusion):
    """What the encoders' last blocks gave, before their last norm, goes projected through `transformer`: a class token,
    the picture's tokens, the words. A text or a picture alone stays in its own encoder."""

    def __init__(self, config):
        super().__init__(config)
        own = config.fusion.multimodal
        text, width = config.text.transformer.width, own.transformer.width
        if config.text.causal:
            raise UserError("text.causal: found true with fusion 'multimodal'; expected false")
        self.image_projector, self.text_projector = nn.Linear(config.vision.width, width), nn.Linear(text, width)
        self.class_embedding = nn.Parameter(torch.randn(width) * 0.02)
        self.transformer = Transformer(own.transformer)
        self.norm = build_norm(own.transformer) if own.transformer.norm_place == "pre" else nn.Identity()
        self.pooler, self.text_pooler, self.image_pooler = Pooler(width), Pooler(text), Pooler(config.vision.width)
        self.widths = Widths(width, width, width)

    def forward(self, vision: nn.Module, text: nn.Module, inputs: Inputs) -> Fused:
        image_taps: list[Tensor] = []
        text_taps: list[Tensor] = []
        if inputs.images is not None:
            image_nND = see(vision, inputs, image_taps)
            if inputs.tokens is None:
                first = image_nND[:, 0]
                image = vision.patches(image_nND)
                return Fused(image=image, first=first, pooled=self.image_pooler(first), met=False)
        text_BTD = text(
            text.token_embedding(inputs.tokens), inputs.segments, inputs.positions, taps=text_taps,
            types_BT=inputs.types, weights=inputs.weights if inputs.images is None else None,
        )
        if inputs.images is None:
            first = text_BTD[:, 0]
            return Fused(text=text_BTD, first=first, pooled=self.text_pooler(first), met=False)
        return self.both(vision, image_taps[-1], text_taps[-1], inputs)

    def both(self, vision: nn.Module, image_nND: Tensor, text_BTD: Tensor, inputs: Inputs) -> Fused:
        rows = rows_of(len(image_nND), inputs.image_rows, len(text_BTD), image_nND.device)
        image_BPND = rows.gather(self.image_projector(image_nND))
        real_BPN = rows.gather(real_tokens(vision, inputs, image_nND))
        owners_B1 = owners(inputs)
        image_BPN = torch.where(real_BPN, owners_B1[:, :, None], PADDING)
        segments_BS = torch.cat([owners_B1, image_BPN.flatten(1), inputs.segments], dim=1)
        class_B1D = self.class_embedding.expand(len(text_BTD), 1, -1)
        x_BSD = torch.cat([class_B1D, image_BPND.flatten(1, 2), self.text_projector(text_BTD)], dim=1)
        mask = visible(segments_BS, segments_BS, causal=False)
        x_BSD = self.norm(self.transformer(x_BSD, mask=mask, weights=inputs.weights))
        length = text_BTD.shape[1]
        image = rows.spread(x_BSD[:, 1:-length].unflatten(1, image_BPND.shape[1:3]))
        first = x_BSD[:, 0]
        return Fused(text=x_BSD[:, -length:], image=vision.patches(image), first=first, pooled=self.pooler(first))
