"""What was in hidden patches: pixels, codes of a codebook, features or classes of regions.

Shapes: n pictures, N patches, D width, K codes or numbers of a patch.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.codebook import CODEBOOKS, CodebookConfig
from vlmpipe.models.heads.reading import Reading, Transform


@dataclass(frozen=True)
class MaskedImageConfig:
    """What is predicted of each patch. `pixels`: its colours; `features`: what the encoder got, for pictures that come
    as features of regions; `codes`: one of `codes` classes, which `codebook` or the data tells.

    `alone`: a picture without a text has a head of its own (FLAVA).
    """

    predicts: Literal["pixels", "features", "codes"] = "pixels"
    codes: int = 0
    codebook: CodebookConfig | None = None
    alone: bool = False

    def __post_init__(self):
        if (self.predicts == "codes") != (self.codes > 0):
            raise UserError(f"codes: found {self.codes} with predicts '{self.predicts}'; expected them for 'codes'")
        if self.codebook is not None and self.predicts != "codes":
            raise UserError(f"codebook: found one with predicts '{self.predicts}'; expected predicts: codes")


class MaskedImage(nn.Module):
    """`patch_logits` [n, N, K] of codes, or `patch_values` [n, N, K]; the colours of a patch come by row, column,
    colour."""

    def __init__(self, config, widths):
        super().__init__()
        self.config = own = config.heads.masked_image
        sizes = {"codes": own.codes, "features": config.vision.width}
        size = sizes.get(own.predicts) or 3 * config.vision.patch_size**2
        like = config.text.transformer
        self.met = nn.Sequential(Transform(widths.image, like), nn.Linear(widths.image, size))
        width = config.vision.width
        self.alone = nn.Sequential(Transform(width, like), nn.Linear(width, size)) if own.alone else None
        self.codebook = None
        if own.codebook is not None:
            self.codebook = CODEBOOKS[own.codebook.kind](own.codebook, own.codes, config.vision.patch_size)
            self.codebook.requires_grad_(False)

    def forward(self, reading: Reading) -> dict[str, Tensor]:
        x_nND = reading.fused.image
        if x_nND is None:
            return {}
        predictor = self.met if self.alone is None or reading.fused.met else self.alone
        name = "patch_logits" if self.config.predicts == "codes" else "patch_values"
        return {name: predictor(x_nND)}
