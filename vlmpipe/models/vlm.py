"""The vision-language model: a vision encoder, a text model, a fusion and heads, each a config.

Shapes: B rows of text, n pictures (one each unless said otherwise), C colours, Y and X pixels, N image tokens, T text
tokens, M scored positions, D width, E width of the shared space, V vocabulary.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.fusion import FUSIONS, FusionConfig, Inputs
from vlmpipe.models.heads import HeadsConfig, LanguageModel, Projection
from vlmpipe.models.layers import Cache, initialize
from vlmpipe.models.processor import ProcessorConfig
from vlmpipe.models.text import TextConfig, TextModel
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
        vision_width, text_width = config.vision.width, config.text.transformer.width
        self.vision = VisionEncoder(config.vision)
        fusion = FUSIONS[config.fusion.kind](config)
        self.text = TextModel(config.text, fusion.memory_width)
        self.fusion = fusion
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
        *,
        types: Tensor | None = None,
        image_places: Tensor | None = None,
        image_rows: Tensor | None = None,
        frames: Tensor | None = None,
        grids: Tensor | None = None,
        patch_mask: Tensor | None = None,
        looks: list | None = None,
        heads: Collection[str] | None = None,
    ) -> Outputs:
        """Run what the inputs allow.

        Args:
            images: [n, C, Y, X] uint8, or float when already normalised.
            tokens: [B, T] int64.
            segments: [B, T] which text of its row a token belongs to, 0 for padding (see `text.visible`).
            positions: [B, T] place inside its own text, counted from 0; a prefix that is not in the row is added here.
            select: [B, T] bool; token logits are computed only there.
            cache: filled and used by generation; images are given on the first call only.
            weights: a list to which each layer of the language model appends its attention.
            types: [B, T] BERT's token types.
            image_places: [B, T] bool, where the pictures stand in the rows, in order; None: each before its row.
            image_rows: [n] the row that each picture belongs to, ascending; None: one picture a row.
            frames: [n] the number of each picture in its clip.
            grids: [n, 3] patches in time, down and across, for encoders of variable-size pictures.
            patch_mask: [n, N] bool, patches that are hidden from the model (masked image modelling).
            looks: a list to which each layer of cross-attention appends its weights.
            heads: names of the heads that are wanted; None: all.
        """
        inputs = Inputs(
            images, tokens, segments, positions, types, image_places, image_rows, frames, grids, patch_mask,
            cache, weights, looks,
        )
        if self.config.fusion.kind == "none":
            return self._embed_apart(images, tokens, segments, positions)
        fused = self.fusion(self.vision, self.text, inputs)
        values = {}
        if self.language_model is not None and (heads is None or "language_model" in heads):
            x = fused.text if select is None else fused.text[select]
            values["logits"] = self.language_model(x, self.text.token_embedding.weight)
        return Outputs(**values)

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
