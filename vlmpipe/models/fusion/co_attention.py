"""Two streams that look at each other: ViLBERT (arXiv 1908.02265).

Shapes: B rows of text with a picture each, N image tokens (the whole picture's first), T words, D and C the widths of
the text and the image stream, E the width of what is pooled.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.fusion.base import Fused, Fusion, Inputs, Widths, owners, real_tokens, see
from vlmpipe.models.fusion.rows import rows_of
from vlmpipe.models.layers import CROSSES, FeedForward, Memory, Transformer, TransformerConfig, build_norm
from vlmpipe.models.text import PADDING, visible


class Crossing(nn.Module):
    """One stream's half of a co-attentional layer: a block whose keys and values come from the other stream."""

    def __init__(self, config: TransformerConfig, memory_width: int):
        super().__init__()
        self.pre = config.norm_place == "pre"
        self.cross = CROSSES["plain"](config, memory_width)
        self.feed_forward_norm = build_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, memory: Memory, looks: list | None) -> Tensor:
        x_BTD = self.cross(x_BTD, memory, looks)
        if self.pre:
            return x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))
        return self.feed_forward_norm(x_BTD + self.dropout(self.feed_forward(x_BTD)))


class CoLayer(nn.Module):
    """Both streams exchange keys and values (figure 2b): each looks at what the other was before this layer."""

    def __init__(self, text: TransformerConfig, image: TransformerConfig):
        super().__init__()
        self.text, self.image = Crossing(text, image.width), Crossing(image, text.width)

    def forward(self, text_BTD, image_BNC, seen_by_text, seen_by_image, looks: list | None) -> tuple[Tensor, Tensor]:
        return (
            self.text(text_BTD, Memory(image_BNC, seen_by_text), looks),
            self.image(image_BNC, Memory(text_BTD, seen_by_image), None),
        )


class CoAttention(Fusion):
    """The last `depth` blocks of both streams stand each behind a co-attentional layer (figure 1).

    The image stream begins with a token for the whole picture: the class token, or the mean of the patches. Pooled is
    the product of both streams' first tokens, projected to one width and rectified as in the authors' release.
    """

    def __init__(self, config):
        super().__init__(config)
        own = config.fusion.co_attention
        text, image = config.text.transformer, own.image
        if config.text.causal or config.text.positions == "rotary":
            raise UserError(
                f"text: found causal {config.text.causal} and positions '{config.text.positions}' with fusion "
                f"'co_attention'; expected causal: false and learned positions or none"
            )
        if own.depth > min(text.depth, image.depth):
            raise UserError(
                f"co_attention.depth: found {own.depth} for streams of {text.depth} and {image.depth} blocks; "
                f"expected no more than either has"
            )
        self.depth, width = own.depth, own.width or image.width
        self.projector = nn.Linear(config.vision.width, image.width)
        self.embedding_norm, self.embedding_dropout = build_norm(image), nn.Dropout(image.dropout)
        self.image = Transformer(image)
        self.image_norm = build_norm(image) if image.norm_place == "pre" else nn.Identity()
        shared = {"heads": own.heads, "kv_heads": 0, "head_width": width // own.heads, "cross": None}
        halves = [replace(stream, **shared) for stream in (text, image)]
        self.layers = nn.ModuleList(CoLayer(*halves) for _ in range(own.depth))
        self.text_pooler, self.image_pooler = nn.Linear(text.width, width), nn.Linear(image.width, width)
        self.widths = Widths(text.width, image.width, width)

    def forward(self, vision: nn.Module, text: nn.Module, inputs: Inputs) -> Fused:
        if inputs.images is None or inputs.tokens is None:
            raise UserError("found a text or a picture alone with fusion 'co_attention'; expected both")
        image_BNC, image_BN = self.regions(vision, inputs)
        text_BTD = text.embed(text.token_embedding(inputs.tokens), inputs.positions, inputs.types)
        text_BTD, image_BNC = self.streams(text, text_BTD, image_BNC, inputs, image_BN)
        pooled_BE = self.text_pooler(text_BTD[:, 0]).relu() * self.image_pooler(image_BNC[:, 0]).relu()
        return Fused(text=text_BTD, image=image_BNC[:, 1:], first=pooled_BE, pooled=pooled_BE)

    def regions(self, vision: nn.Module, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """[B, N, C] what the image stream begins with, and [B, N] the segment of each of its tokens."""
        tokens = see(vision, inputs)
        rows = rows_of(len(tokens), inputs.image_rows, len(inputs.tokens), tokens.device)
        if rows.shape[1] > 1 or len(tokens) != len(inputs.tokens):
            raise UserError(f"found {len(tokens)} pictures for {len(inputs.tokens)} texts; expected one a text")
        real_BN = real_tokens(vision, inputs, tokens)
        patches, real_BN1 = vision.patches(tokens), vision.patches(real_BN[..., None])
        filled = inputs.grids is not None and not vision.config.class_token
        whole_BD = (patches * real_BN1).sum(dim=1) / real_BN1.sum(dim=1) if filled else vision.pool(tokens)
        image_BND = torch.cat([whole_BD[:, None], patches], dim=1)
        real_BN = torch.cat([torch.ones_like(real_BN[:, :1]), real_BN1[..., 0]], dim=1)
        segments_BN = torch.where(real_BN, owners(inputs), PADDING)
        return self.embedding_dropout(self.embedding_norm(self.projector(image_BND))), segments_BN

    def streams(self, text, text_BTD, image_BNC, inputs: Inputs, image_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Each stream alone as far as it is longer, then the layers and the last blocks by turns."""
        text_BT = inputs.segments
        own_text, own_image = visible(text_BT, text_BT, causal=False), visible(image_BN, image_BN, causal=False)
        at_image, at_text = visible(text_BT, image_BN, causal=False), visible(image_BN, text_BT, causal=False)
        words, places = list(text.transformer.blocks), list(self.image.blocks)
        for block in words[: -self.depth]:
            text_BTD = block(text_BTD, mask=own_text, weights=inputs.weights)
        for block in places[: -self.depth]:
            image_BNC = block(image_BNC, mask=own_image)
        for layer, word, place in zip(self.layers, words[-self.depth :], places[-self.depth :], strict=True):
            text_BTD, image_BNC = layer(text_BTD, image_BNC, at_image, at_text, inputs.looks)
            text_BTD = word(text_BTD, mask=own_text, weights=inputs.weights)
            image_BNC = place(image_BNC, mask=own_image)
        return text.norm(text_BTD), self.image_norm(image_BNC)
