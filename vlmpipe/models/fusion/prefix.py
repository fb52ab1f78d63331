"""Image tokens among the words: LLaVA, and any language model that reads pictures in its row.

Shapes: B rows, n pictures, N image tokens of a picture, P tokens that one takes in the row, T tokens of the row, D
widths of the two sides.
"""

import torch
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.fusion.base import Fused, Inputs
from vlmpipe.models.text import SHARED


def linear_projector(vision_width: int, text_width: int) -> nn.Module:
    return nn.Linear(vision_width, text_width)


def mlp_projector(vision_width: int, text_width: int) -> nn.Module:
    """LLaVA 1.5's two layers."""
    return nn.Sequential(nn.Linear(vision_width, text_width), nn.GELU(), nn.Linear(text_width, text_width))


PROJECTORS = {"linear": linear_projector, "mlp": mlp_projector}


class Prefix(nn.Module):
    """Projected image tokens stand in the row where `image_places` says, or before it where it says nothing.

    `length` is P, of pictures of the configured size.
    """

    memory_width = 0

    def __init__(self, config):
        super().__init__()
        merge, side = config.fusion.merge, config.vision.side
        if side % merge:
            raise UserError(f"merge: found {merge}; expected a divisor of the {side} patches of a side")
        self.merge, self.side = merge, side // merge
        self.length = self.side**2
        self.full = config.fusion.attention == "full"
        width = config.text.transformer.width
        self.projector = PROJECTORS[config.fusion.projector](config.vision.width * merge**2, width)

    def project(self, tokens_nND: Tensor) -> Tensor:
        """[n, P, D] text embeddings."""
        if self.merge > 1:
            grid = tokens_nND.unflatten(1, (self.side, self.merge, self.side, self.merge))
            tokens_nND = grid.transpose(2, 3).flatten(3).flatten(1, 2)
        return self.projector(tokens_nND)

    def forward(self, vision: nn.Module, text: nn.Module, inputs: Inputs) -> Fused:
        length = inputs.tokens.shape[1]
        tokens, segments, positions, places = self.arrange(inputs)
        x_BTD = text.token_embedding(tokens)
        if inputs.images is not None:
            seen = self.project(vision.patches(vision(inputs.images, grids=inputs.grids, frames=inputs.frames)))
            x_BTD = put(x_BTD, places, seen)
        x_BTD = text(
            x_BTD, segments, positions, cache=inputs.cache, full_prefix=self.full, weights=inputs.weights,
            types_BT=inputs.types,
        )
        return Fused(text=x_BTD[:, -length:])

    def arrange(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Tokens, segments, positions and image places of the row, with P shared places before it if it has none."""
        tokens, segments, positions, places = inputs.tokens, inputs.segments, inputs.positions, inputs.image_places
        if places is not None:
            return tokens, segments, positions, places
        positions = positions + self.length
        if inputs.images is None:  # a word after what the cache holds
            return tokens, segments, positions, None
        before = tokens.new_zeros(len(tokens), self.length)
        places = torch.cat([torch.ones_like(before), torch.zeros_like(tokens)], dim=1).bool()
        steps = torch.arange(self.length, device=tokens.device).expand(len(tokens), -1)
        return (
            torch.cat([before, tokens], dim=1),
            torch.cat([torch.full_like(before, SHARED), segments], dim=1),
            torch.cat([steps, positions], dim=1),
            places,
        )


def put(x_BTD: Tensor, places_BT: Tensor, seen: Tensor) -> Tensor:
    """The row with image tokens `seen` [..., D], in order, where `places_BT` is true.

    Raises:
        UserError: there are not as many places as image tokens.
    """
    seen = seen.flatten(0, -2).to(x_BTD.dtype)
    if not torch.compiler.is_compiling() and int(places_BT.sum()) != len(seen):
        raise UserError(
            f"found {int(places_BT.sum())} places for {len(seen)} image tokens; expected as many; "
            f"the processor belongs to another model, or a row was cut inside a picture"
        )
    return x_BTD.masked_scatter(places_BT[..., None].expand_as(x_BTD), seen)
