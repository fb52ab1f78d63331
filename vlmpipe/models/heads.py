"""What is read out of the encoders: a shared embedding space, words.

Shapes: B batch, T tokens, D width, E width of the shared space, V vocabulary.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# CLIP keeps the scale at 100 at most, lest training diverge (arXiv 2103.00020, section 2.5).
MAX_LOGIT_SCALE = math.log(100)


@dataclass(frozen=True)
class ProjectionConfig:
    """Both towers into one space of `width`, unit norm; `temperature` is where training starts."""

    width: int = 512
    temperature: float = 0.07


@dataclass(frozen=True)
class LanguageModelConfig:
    """Next-token logits; `tied` reuses the token embedding as the output matrix."""

    tied: bool = True


@dataclass(frozen=True)
class HeadsConfig:
    """A head is there when its config is."""

    projection: ProjectionConfig | None = None
    language_model: LanguageModelConfig | None = None


class Projection(nn.Module):
    """CLIP's two projections and its learned scale."""

    def __init__(self, config: ProjectionConfig, vision_width: int, text_width: int):
        super().__init__()
        self.image = nn.Linear(vision_width, config.width, bias=False)
        self.text = nn.Linear(text_width, config.width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))

    def embed_image(self, pooled_BD: Tensor) -> Tensor:
        return F.normalize(self.image(pooled_BD), dim=-1)

    def embed_text(self, pooled_BD: Tensor) -> Tensor:
        return F.normalize(self.text(pooled_BD), dim=-1)

    def scale(self) -> Tensor:
        return self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()


class LanguageModel(nn.Module):
    """Logits over the vocabulary. The tied matrix belongs to the text model and is passed in, so it is saved once."""

    def __init__(self, config: LanguageModelConfig, text_width: int, vocab_size: int):
        super().__init__()
        self.output = None if config.tied else nn.Linear(text_width, vocab_size, bias=False)

    def forward(self, x_BTD: Tensor, token_embedding_VD: Tensor) -> Tensor:
        return F.linear(x_BTD, token_embedding_VD) if self.output is None else self.output(x_BTD)
