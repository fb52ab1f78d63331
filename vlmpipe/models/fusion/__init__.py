"""Where image meets text. Each fusion is a module, found in FUSIONS by the `kind` of its config.

A fusion is built from the whole config of the model, and called with both encoders and the inputs.
"""

from torch import nn

from vlmpipe.models.fusion.base import Fused, FusionConfig, Inputs
from vlmpipe.models.fusion.prefix import Prefix


class Apart(nn.Module):
    """No fusion: text never sees image tokens."""

    memory_width = 0

    def __init__(self, config):
        super().__init__()

    def forward(self, vision, text, inputs: Inputs) -> Fused:
        return Fused()


FUSIONS = {"none": Apart, "prefix": Prefix}

__all__ = ["FUSIONS", "Apart", "Fused", "FusionConfig", "Inputs", "Prefix"]
