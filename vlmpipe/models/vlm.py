"""The vision-language model: a vision encoder, a text model, a fusion and heads, each a config.

Shapes: B rows of text, n pictures (one each unless said otherwise), C colours, Y and X pixels, N image tokens, T text
tokens, M scored positions, D width, E width of the shared space, V vocabulary.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.checks import check_crossing, check_pictures, check_pointing, check_size
from vlmpipe.models.codes import ImageCodes, ImageCodesConfig
from vlmpipe.models.fusion import FUSIONS, Fusion, FusionConfig, Inputs
from vlmpipe.models.heads import (
    READERS,
    Detection,
    Grounding,
    HeadsConfig,
    ImageTokens,
    LanguageModel,
    Mask,
    Projection,
    Reading,
    pictures_of_rows,
)
from vlmpipe.models.layers import initialize
from vlmpipe.models.processor import ProcessorConfig
from vlmpipe.models.text import TextConfig, TextModel
from vlmpipe.models.vision import VisionConfig, VisionEncoder, build_vision


@dataclass(frozen=True)
class VLMConfig:
    """One architecture; see configs/model/ for the presets.

    A model that writes pictures has `codes` and no `vision`. `encoder` is what reads in an encoder-decoder, where
    `text` writes; with a `vocab_size` of 0 it has the word embedding of `text`.
    """

    vision: VisionConfig | None
    text: TextConfig
    fusion: FusionConfig
    heads: HeadsConfig
    processor: ProcessorConfig = field(default_factory=ProcessorConfig)
    encoder: TextConfig | None = None
    codes: ImageCodesConfig | None = None

    def __post_init__(self):
        if self.fusion.kind == "none" and self.heads.projection is None:
            raise UserError("heads: found no projection with fusion 'none'; expected heads.projection")
        if self.fusion.kind == "prefix" and self.heads.language_model is None:
            raise UserError("heads: found no language_model with fusion 'prefix'; expected heads.language_model")
        if self.heads.language_model is not None and not self.text.causal:
            raise UserError("text.causal: found false with a language_model head; expected true")
        check_crossing(self)
        check_pictures(self)
        check_size(self)
        check_pointing(self)
        readers = [name for name in READERS if getattr(self.heads, name) is not None]
        if readers and not issubclass(FUSIONS[self.fusion.kind], Fusion):
            joining = [kind for kind, fusion in FUSIONS.items() if issubclass(fusion, Fusion)]
            raise UserError(
                f"heads: found {', '.join(readers)} with fusion '{self.fusion.kind}'; expected a fusion whose tokens "
                f"they can read: {', '.join(joining)}"
            )

    def with_vocab(self, size: int) -> "VLMConfig":
        """The same architecture for a tokenizer of `size` tokens."""
        if self.heads.image_tokens is not None:  # words are read, codes are written
            writes = replace(self.text, vocab_size=self.codes.size + 1)
            return replace(self, encoder=replace(self.encoder, vocab_size=size), text=writes)
        return replace(self, text=replace(self.text, vocab_size=size))


@dataclass(frozen=True)
class Outputs:
    """What a forward pass gave; None where the model has no such head or got no such input."""

    image_embedding: Tensor | None = None  # [B, E], unit norm
    text_embedding: Tensor | None = None  # [B, E], unit norm
    scale: Tensor | None = None  # scalar: exp of the learned logit scale
    bias: Tensor | None = None  # scalar: the learned bias of the logits, where there is one
    logits: Tensor | None = None  # [B, T, V], or [M, V] for the selected positions
    matching: Tensor | None = None  # [B, 2] logits: no pair, a pair
    text_logits: Tensor | None = None  # [B, T, V] of hidden words, or [M, V] for the selected positions
    patch_logits: Tensor | None = None  # [n, N, K] of each patch's code or class
    patch_values: Tensor | None = None  # [n, N, K]: each patch's pixels or features
    answers: Tensor | None = None  # [B, A] logits
    statement: Tensor | None = None  # [B, A] logits, of rows with several pictures
    masks: Tensor | None = None  # [B, Y, X] logits, what each row's text means in its picture
    boxes: Tensor | None = None  # [n, N, 4], centre x and y, width and height in shares of the picture
    classes: Tensor | None = None  # [n, N, Q] logits of each of a picture's texts for each box
    image_logits: Tensor | None = None  # [B, N, K] of each code of the picture that is being written
    image_codes: Tensor | None = None  # [B, N] the codes of the pictures that were given


class VisionLanguageModel(nn.Module):
    """Built from a VLMConfig whose vocabulary size is known."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.config = config
        vision_width, text_width = config.vision.width if config.vision else 0, config.text.transformer.width
        self.vision = build_vision(config.vision) if config.vision else None
        self.codes = ImageCodes(config.codes) if config.codes else None
        fusion = FUSIONS[config.fusion.kind](config)
        self.text = TextModel(config.text, fusion.memory_width)
        self.fusion = fusion
        heads = config.heads
        self.projection = Projection(heads.projection, vision_width, text_width) if heads.projection else None
        self.language_model = (
            LanguageModel(heads.language_model, text_width, config.text.vocab_size) if heads.language_model else None
        )
        self.image_tokens = ImageTokens(heads.image_tokens, text_width, config.codes.size) if config.codes else None
        width = heads.projection.width if heads.projection else 0
        self.mask = Mask(heads.mask, config.vision, width) if heads.mask else None
        self.detection = Detection(heads.detection, config.vision, width) if heads.detection else None
        for name, build in READERS.items():
            wanted = getattr(heads, name) is not None
            self.add_module(name, build(config, fusion.widths) if wanted else None)
        initialize(self)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(
        self,
        images: Tensor | None = None,
        tokens: Tensor | None = None,
        segments: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        select: Tensor | None = None,
        condition: Tensor | None = None,
        heads: Collection[str] | None = None,
        **others: Any,
    ) -> Outputs:
        """Run what the inputs allow.

        Args:
            images, tokens, segments, positions, others: of `Inputs`, which says what each is.
            select: [B, T] bool; token logits are computed only there.
            condition: [B, E] what masks and boxes look for instead of the texts: an embedding of `embed_prompt`.
            heads: names of the heads that are wanted; None: all.
        """
        inputs, values = self._coded(Inputs(images, tokens, segments, positions, **others))
        if self.config.fusion.kind == "none" or (heads is not None and set(heads) == {"projection"}):
            return Outputs(**self._embed_apart(inputs, condition, heads))
        fused = self.fusion(self.vision, self.text, inputs)
        reading = Reading(fused, inputs.segments, select, inputs.only, self.text.token_embedding.weight)
        for head in self._wanted(("image_tokens", "language_model", *READERS), heads).values():
            values |= head(reading)
        return Outputs(**values)

    def _coded(self, inputs: Inputs) -> tuple[Inputs, dict[str, Tensor]]:
        """Where the model writes pictures, their codes in place of them, as inputs and as outputs."""
        if self.codes is None or inputs.images is None:
            return inputs, {}
        codes = self.codes.encode(inputs.images)
        return replace(inputs, images=None, codes=self.codes.opening(codes)), {"image_codes": codes}

    def _wanted(self, names: Iterable[str], heads: Collection[str] | None) -> dict[str, nn.Module]:
        """The heads of these names that are there and wanted."""
        named = {name: getattr(self, name) for name in names if heads is None or name in heads}
        return {name: head for name, head in named.items() if head is not None}

    def encode_image(self, images_BCYX: Tensor) -> Tensor:
        """[B, E] unit norm, in the space shared with text."""
        return self.projection.embed_image(self.vision.pool(self.vision(images_BCYX, **self._summary())))

    def encode_text(self, tokens: Tensor, segments: Tensor, positions: Tensor) -> Tensor:
        """[B, E] unit norm, in the space shared with images."""
        return self.projection.embed_text(self.text.encode(self.text.token_embedding(tokens), segments, positions))

    def embed_prompt(self, images_BCYX: Tensor) -> Tensor:
        """[B, E] of any length: what to look for, shown by a picture of it (CLIPSeg, arXiv 2112.10003, section 3)."""
        return self.projection.image(self.vision.pool(self.vision(images_BCYX)))

    def _embed_apart(self, inputs: Inputs, condition: Tensor | None, heads: Collection[str] | None) -> dict:
        values = {"scale": self.projection.scale(), "bias": self.projection.logit_bias}
        pointers = self._wanted(("mask", "detection"), heads) if inputs.images is not None else {}
        if inputs.tokens is not None:
            features_BE = self.projection.text(self._read_alone(inputs, whole=bool(pointers)))
            values["text_embedding"] = F.normalize(features_BE, dim=-1)
            condition = features_BE if condition is None else condition
        if inputs.images is not None:
            taps: list[Tensor] = []
            pointers = {} if condition is None else pointers
            summary = {} if pointers else self._summary()
            tokens_nND = self.vision(inputs.images, taps=taps, grids=inputs.grids, frames=inputs.frames, **summary)
            values["image_embedding"] = self.projection.embed_image(self.vision.pool(tokens_nND))
            if pointers:
                values |= self._point(inputs, tokens_nND, taps, condition, pointers)
        return values

    def _read_alone(self, inputs: Inputs, whole: bool) -> Tensor:
        """[B, D] of the texts. `whole`: every token goes through every block, as in the references whose masks and
        boxes make much of how a text's numbers were rounded."""
        embeddings_BTD = self.text.token_embedding(inputs.tokens)
        if not whole:
            return self.text.encode(embeddings_BTD, inputs.segments, inputs.positions, inputs.types)
        x_BTD = self.text(embeddings_BTD, inputs.segments, inputs.positions, types_BT=inputs.types)
        return self.text.pool(x_BTD, inputs.segments)

    def _summary(self) -> dict[str, bool]:
        """What tells the vision encoder that only `pool` will be asked for."""
        return {"pooled": True} if isinstance(self.vision, VisionEncoder) else {}

    def _point(self, inputs: Inputs, tokens_nND, taps, condition_BE, pointers: Collection[str]) -> dict:
        """Masks and boxes, as far as they are wanted."""
        values, patch = {}, self.config.vision.patch_size
        seen = Grounding(
            tokens_nND, taps, (inputs.images.shape[-2] // patch, inputs.images.shape[-1] // patch), condition_BE,
            pictures_of_rows(inputs.image_rows, len(tokens_nND), condition_BE),
        )
        if "mask" in pointers:
            values["masks"] = self.mask(seen, self.vision.patches)
        if "detection" in pointers:
            values["boxes"], values["classes"] = self.detection(seen, self.vision.patches, self.vision.pool)
        return values
