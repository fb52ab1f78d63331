"""Words and image tokens through one stack: VisualBERT, ViLT.

Shapes: n pictures, N tokens of a picture, B rows of text, P the most pictures of a row, T words of a row, S = T + P * N
tokens of a row in all, D width.
"""

import torch
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.fusion.base import Fused, Fusion, Inputs, Widths, owners, real_tokens, see
from vlmpipe.models.fusion.rows import Rows, rows_of
from vlmpipe.models.text import PADDING, visible


class SingleStream(Fusion):
    """The text model's blocks run over a row's words and then its pictures' tokens; every token sees all others.

    The vision encoder may be a patch stem alone (`depth: 0`). Pooled is the text, as the text model pools it.
    """

    def __init__(self, config):
        super().__init__(config)
        self.config = config.fusion.single_stream
        width = config.text.transformer.width
        if config.text.causal or config.text.positions == "rotary":
            raise UserError(
                f"text: found causal {config.text.causal} and positions '{config.text.positions}' with fusion "
                f"'single_stream'; expected causal: false and learned positions or none"
            )
        projected = self.config.projector or config.vision.width != width
        self.projector = nn.Linear(config.vision.width, width) if projected else nn.Identity()
        self.type_embedding = nn.Embedding(self.config.types, width)
        places = self.config.image_positions
        self.position_embedding = nn.Embedding(places, width) if places else None
        self.widths = Widths(width, width, width)

    def forward(self, vision: nn.Module, text: nn.Module, inputs: Inputs) -> Fused:
        if inputs.tokens is None:
            raise UserError("found a picture without a text with fusion 'single_stream'; expected a text a row")
        x_BSD, segments_BS, rows = self.words(text, inputs), inputs.segments, None
        if inputs.images is not None:
            tokens_nND = see(vision, inputs)
            rows = rows_of(len(tokens_nND), inputs.image_rows, len(inputs.tokens), tokens_nND.device)
            image_BPND = rows.gather(self.image(text, tokens_nND, rows, inputs))
            real_BPN = rows.gather(real_tokens(vision, inputs, tokens_nND))
            image_BPN = torch.where(real_BPN, owners(inputs)[:, :, None], PADDING)
            x_BSD = torch.cat([x_BSD, image_BPND.flatten(1, 2)], dim=1)
            segments_BS = torch.cat([segments_BS, image_BPN.flatten(1)], dim=1)
        mask = visible(segments_BS, segments_BS, causal=False)
        x_BSD = text.norm(text.transformer(x_BSD, mask=mask, weights=inputs.weights))
        return self.read(x_BSD, rows, vision, text, inputs)

    def words(self, text: nn.Module, inputs: Inputs) -> Tensor:
        """[B, T, D] embeddings as the text model makes them, marked as words where pictures share the types' table."""
        x_BTD = text.embed(text.token_embedding(inputs.tokens), inputs.positions, inputs.types)
        return x_BTD + self.type_embedding.weight[0] if self.config.words_typed else x_BTD

    def image(self, text: nn.Module, tokens_nND: Tensor, rows: Rows, inputs: Inputs) -> Tensor:
        """[n, N, D] embeddings: which picture of its row a token belongs to, and through the words' norm if asked."""
        number_n = rows.place if inputs.frames is None else inputs.frames
        kind_n = (number_n + 1).clamp(max=self.config.types - 1)  # further pictures share the last type
        x_nND = self.projector(tokens_nND) + self.type_embedding(kind_n)[:, None]
        if self.position_embedding is not None:
            x_nND = x_nND + self.position_embedding.weight[0]
        return text.embedding_dropout(text.embedding_norm(x_nND)) if self.config.image_norm else x_nND

    def read(self, x_BSD: Tensor, rows: Rows | None, vision: nn.Module, text: nn.Module, inputs: Inputs) -> Fused:
        words_BTD, image = x_BSD[:, : inputs.tokens.shape[1]], None
        if rows is not None:
            image_BPND = x_BSD[:, inputs.tokens.shape[1] :].unflatten(1, (rows.shape[1], -1))
            image = vision.patches(rows.spread(image_BPND))
        pooled = text.pool(words_BTD, inputs.segments)
        return Fused(text=words_BTD, image=image, first=x_BSD[:, 0], pooled=pooled, met=rows is not None)
