"""What is read out of the encoders: one file a head, with its config and its module."""

from vlmpipe.models.heads.base import HeadsConfig
from vlmpipe.models.heads.language_model import LanguageModel, LanguageModelConfig
from vlmpipe.models.heads.projection import MAX_LOGIT_SCALE, Projection, ProjectionConfig

__all__ = [
    "MAX_LOGIT_SCALE",
    "HeadsConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "Projection",
    "ProjectionConfig",
]
