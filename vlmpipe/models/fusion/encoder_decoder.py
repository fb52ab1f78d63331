"""An encoder that reads and a decoder that writes: SimVLM (arXiv 2108.10904) from a picture and the beginning of a text
to its rest, Parti (arXiv 2206.10789) from a text to the codes of a picture.

Shapes: B rows, P texts of all rows, L tokens of the longest, K the most pictures of a row, N tokens of a picture,
S tokens that the encoder reads, T tokens of a row, C width of the encoder, D width of the decoder.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vlmpipe.models.fusion.base import Fused, Fusion, Inputs, Widths, see
from vlmpipe.models.fusion.cross import refuse_native, stand, whole
from vlmpipe.models.fusion.rows import rows_of
from vlmpipe.models.layers import Memory
from vlmpipe.models.text import PADDING, SHARED, TextModel, visible
from vlmpipe.models.vision import sine_cosine_2d

WORDS = ("tokens", "segments", "positions", "types", "prefix")


@dataclass(frozen=True)
class Known:
    """What the encoder read; generation keeps it in `Cache.memory`, whose rows beams choose among.

    Attributes:
        tokens: [B, S, C].
        real: [B, S] false for padding.
        words: [B] words among them: the decoder's first word has position 0.
    """

    tokens: Tensor
    real: Tensor
    words: Tensor

    @property
    def memory(self) -> Memory:
        return Memory(self.tokens, self.real[:, None, None])


@dataclass(frozen=True)
class Texts:
    """Where each text stands: in row `row` [P], whose segment `number` [P] it is, in `columns` [P, L]; `real` [P, L] is
    false where a text is shorter than the longest."""

    row: Tensor
    number: Tensor
    columns: Tensor
    real: Tensor

    def take(self, inputs: Inputs) -> Inputs:
        """Each text in a row of its own."""
        own = {name: getattr(inputs, name) for name in WORDS if getattr(inputs, name) is not None}
        own = {name: value[self.row[:, None], self.columns] for name, value in own.items()}
        return replace(inputs, **{**own, "segments": own["segments"] * self.real})

    def put(self, x_PLD: Tensor, shape: tuple[int, int]) -> Tensor:
        """[B, T, D]: each text back in its row; zeros where there is none."""
        row_PL = self.row[:, None].expand_as(self.columns)
        empty = x_PLD.new_zeros(*shape, x_PLD.shape[-1])
        return empty.index_put((row_PL[self.real], self.columns[self.real]), x_PLD[self.real])


def texts_of(segments_BT: Tensor) -> Texts:
    """The texts of all rows, in order."""
    numbers = torch.arange(1, max(1, int(segments_BT.max())) + 1, device=segments_BT.device)
    own_BST = segments_BT[:, None] == numbers[:, None]
    row, which = own_BST.any(dim=-1).nonzero(as_tuple=True)
    own_PT = own_BST[row, which]
    columns = own_PT.int().argsort(dim=1, descending=True, stable=True)[:, : int(own_PT.sum(dim=1).max())]
    return Texts(row, numbers[which], columns, own_PT.gather(1, columns))


class EncoderDecoder(Fusion):
    """The encoder reads the pictures of a row and the words that `prefix` marks, all of which see each other; the
    decoder reads the other words, or the codes of a picture, each of which sees those before it and all of the encoder.

    The encoder has the decoder's word embedding where its `vocab_size` is 0. Pictures look at words, so several texts
    of one row are read one by one, each with the pictures.
    """

    def __init__(self, config):
        super().__init__(config)
        if config.vision is not None:
            refuse_native(config.vision)
        self.shared = config.encoder.vocab_size == 0
        encoder = replace(config.encoder, vocab_size=config.text.vocab_size) if self.shared else config.encoder
        self.encoder = TextModel(encoder, words=not self.shared)
        self.memory_width = config.encoder.transformer.width
        width = config.vision.width if config.vision else self.memory_width
        self.project = nn.Linear(width, self.memory_width) if width != self.memory_width else nn.Identity()
        self.places = None
        if config.vision is not None and config.vision.resnet is not None:  # whose tokens don't know where they are
            self.places = nn.Parameter(sine_cosine_2d(config.vision.side, self.memory_width))
        own = config.text.transformer.width
        self.widths = Widths(own, self.memory_width, own)

    def forward(self, vision: nn.Module | None, text: nn.Module, inputs: Inputs) -> Fused:
        if inputs.codes is not None:
            known = self.known(inputs, lambda: self.read(text, inputs, None, None))
            return Fused(text=self.write_codes(text, known, inputs))
        if inputs.cache is not None:  # one text a row
            known = self.known(inputs, lambda: self.read_row(vision, text, inputs))
            return whole(text, self.write(text, known, inputs), inputs.segments)
        texts = texts_of(inputs.segments)
        own = texts.take(inputs)
        seen, there = self.pictures(vision, inputs, texts.row, texts.number)
        x_PLD = self.write(text, self.read(text, own, seen, there), own)
        return whole(text, texts.put(x_PLD, inputs.tokens.shape), inputs.segments)

    def known(self, inputs: Inputs, read) -> Known:
        """Read, or remember what was read when this text began."""
        if inputs.cache is None:
            return read()
        if inputs.cache.memory is None:
            inputs.cache.memory = read()
        return inputs.cache.memory

    def read_row(self, vision: nn.Module, text: nn.Module, inputs: Inputs) -> Known:
        rows = torch.arange(len(inputs.tokens), device=inputs.tokens.device)
        return self.read(text, inputs, *self.pictures(vision, inputs, rows, torch.ones_like(rows)))

    def read(self, text: nn.Module, inputs: Inputs, seen: Tensor | None, there: Tensor | None) -> Known:
        """Pictures `seen` [P, K * N, C], where they are `there`, and the words that are given, in one row each."""
        given = inputs.segments != PADDING
        if inputs.codes is None:
            given = given & (torch.zeros_like(given) if inputs.prefix is None else inputs.prefix)
        embedding = text.token_embedding if self.shared else self.encoder.token_embedding
        x_PSC, real = self.encoder.embed(embedding(inputs.tokens), inputs.positions, inputs.types), given
        if seen is not None:
            x_PSC, real = torch.cat([seen.to(x_PSC.dtype), x_PSC], dim=1), torch.cat([there, real], dim=1)
        mask = visible(real.long(), real.long(), causal=False)
        x_PSC = self.encoder.norm(self.encoder.transformer(x_PSC, mask=mask))
        return Known(x_PSC, real, given.sum(dim=1))

    def pictures(self, vision: nn.Module, inputs: Inputs, row_P: Tensor, number_P: Tensor):
        """[P, K * N, C] tokens of each text's pictures, and [P, K * N] true where there are any; None without any."""
        if inputs.images is None:
            return None, None
        tokens = self.project(vision.patches(see(vision, inputs)))
        tokens = tokens if self.places is None else tokens + self.places
        rows = rows_of(len(tokens), inputs.image_rows, len(inputs.tokens), tokens.device)
        owner_PK = stand(inputs, len(tokens), rows)[0][row_P]
        there_PK = (owner_PK == SHARED) | (owner_PK == number_P[:, None])
        return rows.gather(tokens)[row_P].flatten(1, 2), there_PK.repeat_interleave(tokens.shape[1], dim=1)

    def write(self, text: nn.Module, known: Known, inputs: Inputs) -> Tensor:
        """[P, L, D] for the words that are not given."""
        segments = inputs.segments
        if inputs.prefix is not None:
            segments = torch.where(inputs.prefix, PADDING, segments)
        positions = (inputs.positions - known.words[:, None]).clamp(min=0)
        return text(
            text.token_embedding(inputs.tokens), segments, positions, cache=inputs.cache, weights=inputs.weights,
            memory=known.memory, looks=inputs.looks,
        )

    def write_codes(self, text: nn.Module, known: Known, inputs: Inputs) -> Tensor:
        """[B, N, D] for the codes that were written before."""
        before = 0 if inputs.cache is None else len(inputs.cache)
        positions = before + torch.arange(inputs.codes.shape[1], device=inputs.codes.device).expand_as(inputs.codes)
        return text(
            text.token_embedding(inputs.codes), torch.ones_like(inputs.codes), positions, cache=inputs.cache,
            weights=inputs.weights, memory=known.memory, looks=inputs.looks,
        )
