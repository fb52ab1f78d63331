"""The model library: configs to models, directories to models and back."""

from vlmpipe.models.directory import build, load, save
from vlmpipe.models.pretrained import from_huggingface, join_huggingface, to_huggingface
from vlmpipe.models.processor import Processor
from vlmpipe.models.read import read_model
from vlmpipe.models.vlm import Outputs, VisionLanguageModel, VLMConfig

__all__ = [
    "Outputs", "Processor", "VLMConfig", "VisionLanguageModel", "build", "from_huggingface", "join_huggingface", "load",
    "read_model", "save", "to_huggingface",
]
