"""What is read out of the encoders: one file a head, with its config and its module."""

from vlmpipe.models.heads.base import HeadsConfig
from vlmpipe.models.heads.detection import Detection, DetectionConfig
from vlmpipe.models.heads.grounding import Grounding, pictures_of_rows
from vlmpipe.models.heads.language_model import LanguageModel, LanguageModelConfig
from vlmpipe.models.heads.mask import Mask, MaskConfig
from vlmpipe.models.heads.projection import Projection, ProjectionConfig

__all__ = [
    "Detection",
    "DetectionConfig",
    "Grounding",
    "HeadsConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "Mask",
    "MaskConfig",
    "Projection",
    "ProjectionConfig",
    "pictures_of_rows",
]
