"""Which heads a model has."""

from dataclasses import dataclass

from vlmpipe.models.heads.classify import ClassifierConfig, MatchingConfig
from vlmpipe.models.heads.detection import DetectionConfig
from vlmpipe.models.heads.image_tokens import ImageTokensConfig
from vlmpipe.models.heads.language_model import LanguageModelConfig
from vlmpipe.models.heads.mask import MaskConfig
from vlmpipe.models.heads.masked_image import MaskedImageConfig
from vlmpipe.models.heads.masked_text import MaskedTextConfig
from vlmpipe.models.heads.projection import ProjectionConfig


@dataclass(frozen=True)
class HeadsConfig:
    """A head is there when its config is."""

    projection: ProjectionConfig | None = None
    language_model: LanguageModelConfig | None = None
    detection: DetectionConfig | None = None
    mask: MaskConfig | None = None
    image_tokens: ImageTokensConfig | None = None
    matching: MatchingConfig | None = None
    masked_text: MaskedTextConfig | None = None
    masked_image: MaskedImageConfig | None = None
    answers: ClassifierConfig | None = None
    statement: ClassifierConfig | None = None
