"""The vision-language model: a vision encoder, a text model, a fusion and heads, each a config.

Shapes: B batch, C colours, Y and X pixels, N image tokens, P prefix tokens, T text tokens, M scored positions,
D width, E width of the shared space, V vocabulary.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.fusion import FUSIONS, FusionConfig
from vlmpipe.models.heads import HeadsConfig, LanguageModel, Projection
from vlmpipe.models.layers import Cache, initialize
from vlmpipe.models.processor import ProcessorConfig
from vlmpipe.models.text import SHARED, TextConfig, TextModel
from vlmpipe.models.vision import VisionConfig, VisionEncoder


@dataclass(frozen=True)
class VLMConfig:
    """One architecture; see configs/model/ for the presets."""

    vision: VisionConfig
    text: TextConfig
    fusion: FusionConfig
    heads: HeadsConfig
    processor: ProcessorConfig = field(default_factory=ProcessorConfig)

    def __post_init__(self):
        if self.fusion.kind == "none" and self.heads.projection is None:
            raise UserError("heads: found no projection with fusion 'none'; expected heads.projection")
        if self.fusion.kind == "prefix" and self.heads.language_model is None:
            raise UserError("heads: found no language_model with fusion 'prefix'; expected heads.language_model")
        if self.heads.language_model is not None and not self.text.causal:
            raise UserError("text.causal: found false with a language_model head; expected true")

    def with_vocab(self, size: int) -> "VLMConfig":
        """The same architecture for a tokenizer of `size` tokens."""
        return replace(self, text=replace(self.text, vocab_size=size))


@dataclass(frozen=True)
class Outputs:
    """What a forward pass gave; None where the model has no such head or got no such input."""

    image_embedding: Tensor | None = None  # [B, E], unit norm
    text_embedding: Tensor | None = None  # [B, E], unit norm
    scale: Tensor | None = None  # scalar: exp of the learned logit scale
    logits: Tensor | None = None  # [B, T, V], or [M, V] for the selected positions


class VisionLanguageModel(nn.Module):
    """Built from a VLMConfig whose vocabulary size is known."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.config = config
        vision_width, text_width = config.vision.transformer.width, config.text.transformer.width
        self.vision = VisionEncoder(config.vision)
        self.text = TextModel(config.text)
        self.fusion = FUSIONS[config.fusion.kind](config.fusion, config.vision.side, vision_width, text_width)
        heads = config.heads
        self.projection = Projection(heads.projection, vision_width, text_width) if heads.projection else None
        self.language_model = (
            LanguageModel(heads.language_model, text_width, config.text.vocab_size) if heads.language_model else None
        )
        initialize(self)

    @property
    def device(self) -> torch.device:
        return self.vision.mean.device

    def forward(
        self,
        images: Tensor | None = None,
        tokens: Tensor | None = None,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
        select: Tensor | None = None,
        cache: Cache | None = None,
        weights: list | None = None,
    ) -> Outputs:
        """Run what the inputs allow.

        Args:
            images: [B, C, Y, X] uint8, or float when already normalised.
            tokens: [B, T] int64.
            segments: [B, T] which text of its row a token belongs to, 0 for padding (see `text.visible`).
            positions: [B, T] place inside its own text, counted from 0; the prefix is added here.
            select: [B, T] bool; logits are computed only there.
            cache: filled and used by generation; images are given on the first call only.
            weights: a list to which each layer of the language model appends its attention.
        """
        if self.config.fusion.kind == "none":
            return self._embed_apart(images, tokens, segments, positions)
        x_BTD = self._decode(images, tokens, segments, positions, cache, weights)
        x = x_BTD if select is None else x_BTD[select]
        return Outputs(logits=self.language_model(x, self.text.token_embedding.weight))

    def encode_image(self, images_BCYX: Tensor) -> Tensor:
        """[B, E] unit norm, in the space shared with text."""
        return self.projection.embed_image(self.vision.pool(self.vision(images_BCYX)))

    def encode_text(self, tokens: Tensor, segments: Tensor, positions: Tensor) -> Tensor:
        """[B, E] unit norm, in the space shared with images."""
        x_BTD = self.text(self.text.token_embedding(tokens), segments, positions)
        return self.projection.embed_text(self.text.pool(x_BTD, segments))

    def _embed_apart(self, images, tokens, segments, positions) -> Outputs:
        return Outputs(
            image_embedding=None if images is None else self.encode_image(images),
            text_embedding=None if tokens is None else self.encode_text(tokens, segments, positions),
            scale=self.projection.scale(),
        )

    def _decode(self, images, tokens, segments, positions, cache, weights) -> Tensor:
        """[B, T, D] of the text tokens, after the image before them."""
        length = self.fusion.length
        x_BTD = self.text.token_embedding(tokens)
        positions = positions + length
        if images is not None:
            prefix_BPD = self.fusion(self.vision.patches(self.vision(images)))
            x_BTD = torch.cat([prefix_BPD, x_BTD], dim=1)
            segments = torch.cat([segments.new_full((len(segments), length), SHARED), segments], dim=1)
            places = torch.arange(length, device=positions.device).expand(len(positions), -1)
            positions = torch.cat([places, positions], dim=1)
        full_prefix = self.config.fusion.attention == "full"
        x_BTD = self.text(x_BTD, segments, positions, cache, full_prefix, weights)
        return x_BTD[:, -tokens.shape[1] :]
