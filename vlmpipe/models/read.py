"""Any model directory to a model that can be asked: one of ours, or a Hugging Face one."""

from pathlib import Path

import torch

from vlmpipe.errors import UserError
from vlmpipe.models.directory import is_model, load
from vlmpipe.models.pretrained import HuggingFaceProcessor, from_huggingface
from vlmpipe.models.processor import Processor
from vlmpipe.models.vlm import VisionLanguageModel


def read_model(
    directory: Path, device: str | torch.device = "cpu"
) -> tuple[VisionLanguageModel, Processor | HuggingFaceProcessor]:
    """A model of words and pictures, and what feeds it both.

    Raises:
        UserError: neither kind of directory, a part of a model alone, or no tokenizer or image processor beside it.
    """
    directory = Path(directory)
    if is_model(directory) or not (directory / "config.json").is_file():
        return load(directory, device)
    model, processor = from_huggingface(directory, device)
    if not isinstance(model, VisionLanguageModel):
        raise UserError(f"{directory}: found a {type(model).__name__} alone; expected a model of pictures and "
                        f"words; make one of two parts with `vlmpipe.models.join_huggingface` and save it")
    parts = {"tokenizer": "tokenizer.json", "pictures": "preprocessor_config.json"}
    missing = [file for part, file in parts.items() if getattr(processor, part, None) is None]
    if missing:
        raise UserError(f"{directory}: found no {' and no '.join(missing)} beside the model; expected what feeds it; "
                        f"copy the whole directory")
    return model, processor
