"""Where image meets text. Each fusion is a module, found in FUSIONS by the `kind` of its config.

A fusion is built from the whole config of the model, and called with both encoders and the inputs.
"""

from torch import nn

from vlmpipe.models.fusion.base import Fused, Fusion, FusionConfig, Inputs
from vlmpipe.models.fusion.co_attention import CoAttention
from vlmpipe.models.fusion.cross import Cross
from vlmpipe.models.fusion.encoder_decoder import EncoderDecoder
from vlmpipe.models.fusion.multimodal import Multimodal
from vlmpipe.models.fusion.prefix import Prefix
from vlmpipe.models.fusion.single_stream import SingleStream


class Apart(nn.Module):
    """No fusion: text never sees image tokens."""

    memory_width = 0

    def __init__(self, config):
        super().__init__()

    def forward(self, vision, text, inputs: Inputs) -> Fused:
        return Fused()


FUSIONS = {
    "none": Apart,
    "prefix": Prefix,
    "cross": Cross,
    "encoder_decoder": EncoderDecoder,
    "single_stream": SingleStream,
    "co_attention": CoAttention,
    "multimodal": Multimodal,
}

__all__ = ["FUSIONS", "Apart", "Fused", "Fusion", "FusionConfig", "Inputs", "Prefix"]
