"""Image tokens among the words: LLaVA, and any language model that reads pictures in its row.

Shapes: B rows, n pictures, N image tokens of a picture, P tokens that one takes in the row, T tokens of the row, D
widths of the two sides.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.fusion.base import Fused, Inputs
from vlmpipe.models.places import Grid, row_positions, token_count
from vlmpipe.models.text import SHARED


def linear_projector(vision_width: int, text_width: int) -> nn.Module:
    return nn.Linear(vision_width, text_width)


def mlp_projector(vision_width: int, text_width: int) -> nn.Module:
    """LLaVA 1.5's two layers."""
    return nn.Sequential(nn.Linear(vision_width, text_width), nn.GELU(), nn.Linear(text_width, text_width))


def merger_projector(vision_width: int, text_width: int) -> nn.Module:
    """Qwen2-VL's two layers, the first as wide as the merged patches."""
    return nn.Sequential(nn.Linear(vision_width, vision_width), nn.GELU(), nn.Linear(vision_width, text_width))


PROJECTORS = {"linear": linear_projector, "mlp": mlp_projector, "merger": merger_projector}


class Prefix(nn.Module):
    """Projected image tokens stand in the row where `image_places` says, or before it where it says nothing.

    `length` is P, of pictures of the configured size. With `merge`, neighbours of a token stand in it row by row, as in
    SmolVLM's pixel shuffle (arXiv 2504.05299).
    """

    memory_width = 0
    in_row = True  # image tokens stand among the words

    def __init__(self, config):
        super().__init__()
        merge, side = config.fusion.merge, config.vision.side
        if side % merge:
            raise UserError(f"merge: found {merge}; expected a divisor of the {side} patches of a side")
        if merge > 1 and config.vision.native:
            raise UserError(f"merge: found {merge} with vision.native, which merges by itself; expected 1")
        self.merge, self.side = merge, side // merge
        self.length = self.side**2
        self.vision, self.sections = config.vision, config.text.rotary_sections
        self.full, self.given = config.fusion.attention != "causal", config.fusion.attention == "prefix"
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
            types_BT=inputs.types, given_BT=self.given_words(inputs, segments.shape[1]),
            only_B=None if inputs.only is None else inputs.only + segments.shape[1] - length,
        )
        return Fused(text=x_BTD[:, -length:])

    def given_words(self, inputs: Inputs, length: int) -> Tensor | None:
        """[B, length] true for words that see each other in both directions."""
        read = inputs.cache is not None and inputs.cache.segments is not None
        if not self.given or inputs.prefix is None or read:
            return None
        return F.pad(inputs.prefix, (length - inputs.prefix.shape[1], 0))

    def arrange(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Tokens, segments, positions and image places of the row, with shared places before it if it has none.

        How far the places push the words is kept in the cache, for the words that come later.
        """
        places, cache = inputs.image_places, inputs.cache
        if places is not None or inputs.images is None:
            offset = 0 if cache is None else cache.offset
            positions = inputs.positions if places is not None else inputs.positions + offset
            return inputs.tokens, inputs.segments, positions, places
        before, steps, offset_B = self.places_before(inputs)
        if cache is not None:
            cache.offset = offset_B[:, None]
        positions = inputs.positions + offset_B[:, None]
        if steps.ndim == 3:
            positions = positions[..., None].expand(-1, -1, steps.shape[-1])
        return (
            torch.cat([torch.zeros_like(before, dtype=inputs.tokens.dtype), inputs.tokens], dim=1),
            torch.cat([before.to(inputs.segments.dtype) * SHARED, inputs.segments], dim=1),
            torch.cat([steps, positions], dim=1),
            torch.cat([before, torch.zeros_like(inputs.tokens, dtype=torch.bool)], dim=1),
        )

    def places_before(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Places [B, P] of the pictures before the row, their positions [B, P] or [B, P, 3], and where words start [B].

        A row without pictures has padding there.
        """
        rows, device = len(inputs.tokens), inputs.tokens.device
        if self.vision.native is None and inputs.image_rows is None:
            steps = torch.arange(self.length, device=device).expand(rows, -1)
            lengths_B = torch.full((rows,), self.length, device=device)
            return torch.ones_like(steps, dtype=torch.bool), steps, lengths_B
        grids = self.grids(inputs)
        counts = [self.length if grid is None else token_count(grid, self.vision.native.merge) for grid in grids]
        owners = range(len(grids)) if inputs.image_rows is None else inputs.image_rows.tolist()
        lengths = [0] * rows
        for owner, count in zip(owners, counts, strict=True):
            lengths[owner] += count
        lengths_B = torch.tensor(lengths, device=device)
        steps = torch.arange(max(lengths), device=device).expand(rows, -1)
        before = steps < lengths_B[:, None]
        if not self.sections or not self.vision.native:
            return before, steps, lengths_B
        steps = row_positions(before * SHARED, before, grids, self.vision.native.merge)
        return before, steps, steps.amax(dim=(1, 2)) + before.any(dim=1)

    def grids(self, inputs: Inputs) -> list[Grid] | list[None]:
        """Of each picture; None where all have the configured size."""
        native = self.vision.native
        if native is None:
            return [None] * len(inputs.images)
        if inputs.images.ndim == 4:
            return [(1, *(side // self.vision.patch_size for side in inputs.images.shape[-2:]))] * len(inputs.images)
        return [tuple(grid) for grid in inputs.grids.tolist()]


def put(x_BTD: Tensor, places_BT: Tensor, seen: Tensor) -> Tensor:
    """The row with image tokens `seen` [..., D], in order, where `places_BT` is true.

    Raises:
        UserError: there are not as many places as image tokens; a GPU, which would have to be waited for, ends the
            process instead.
    """
    seen = seen.flatten(0, -2).to(x_BTD.dtype)
    check_count(places_BT, len(seen))
    index = places_BT.flatten().nonzero_static(size=len(seen))[:, 0]
    return x_BTD.flatten(0, 1).index_copy(0, index, seen).view(x_BTD.shape)


def check_count(places_BT: Tensor, tokens: int) -> None:
    if torch.compiler.is_compiling():
        return
    advice = "expected as many; the processor belongs to another model, or a row was cut inside a picture"
    found = places_BT.sum()
    if places_BT.device.type != "cpu":
        torch._assert_async(found == tokens, f"found another number of places than {tokens} image tokens; {advice}")
    elif int(found) != tokens:
        raise UserError(f"found {int(found)} places for {tokens} image tokens; {advice}")
