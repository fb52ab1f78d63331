"""What is read out of the encoders: one file a head, with its config and its module."""

from functools import partial

from vlmpipe.models.heads.base import HeadsConfig
from vlmpipe.models.heads.classify import Classifier, ClassifierConfig, Matching, MatchingConfig
from vlmpipe.models.heads.detection import Detection, DetectionConfig
from vlmpipe.models.heads.grounding import Grounding, pictures_of_rows
from vlmpipe.models.heads.image_tokens import ImageTokens, ImageTokensConfig
from vlmpipe.models.heads.language_model import LanguageModel, LanguageModelConfig
from vlmpipe.models.heads.mask import Mask, MaskConfig
from vlmpipe.models.heads.masked_image import MaskedImage, MaskedImageConfig
from vlmpipe.models.heads.masked_text import MaskedText, MaskedTextConfig
from vlmpipe.models.heads.projection import Projection, ProjectionConfig
from vlmpipe.models.heads.reading import Reading

# Heads over what a fusion gave: built from the model's config and the fusion's widths, called with a Reading.
READERS = {
    "matching": Matching,
    "masked_text": MaskedText,
    "masked_image": MaskedImage,
    "answers": partial(Classifier, "answers"),
    "statement": partial(Classifier, "statement"),
}

__all__ = [
    "READERS",
    "Classifier",
    "ClassifierConfig",
    "Detection",
    "DetectionConfig",
    "Grounding",
    "HeadsConfig",
    "ImageTokens",
    "ImageTokensConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "Mask",
    "MaskConfig",
    "MaskedImage",
    "MaskedImageConfig",
    "MaskedText",
    "MaskedTextConfig",
    "Matching",
    "MatchingConfig",
    "Projection",
    "ProjectionConfig",
    "Reading",
    "pictures_of_rows",
]
