"""A new model of two pretrained parts, as LLaVA is made of CLIP and a language model."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.fusion import FusionConfig
from vlmpipe.models.heads import HeadsConfig
from vlmpipe.models.layers import CrossConfig
from vlmpipe.models.pretrained.load import from_huggingface, locate, read_config
from vlmpipe.models.pretrained.processor import HuggingFaceProcessor
from vlmpipe.models.text import TextModel
from vlmpipe.models.vlm import VisionLanguageModel, VLMConfig

OUTPUT = "lm_head.weight"  # what every causal language model of transformers calls its output matrix


def join_huggingface(
    vision: str | Path,
    text: str | Path,
    fusion: FusionConfig,
    heads: HeadsConfig,
    cross: CrossConfig | None = None,
    layer: int = -1,
    seed: int = 0,
) -> tuple[VisionLanguageModel, HuggingFaceProcessor]:
    """A model whose towers have the weights of two Hugging Face directories, with a new fusion and new heads.

    Save it with `vlmpipe.models.save` and train it from there.

    Args:
        vision: a vision model, or a whole model whose vision tower is taken.
        text: a text model, or a whole model whose text tower is taken.
        heads: of a language model, `tied` is what the text's own is, and its output matrix comes along.
        cross: new cross-attention in the text model, as Flamingo has it.
        layer: whose output the image tokens are: -2 in LLaVA.
        seed: of all weights that are new.

    Raises:
        UserError: as `from_huggingface`, or a part that isn't what it is named.
    """
    tower, seen = tower_of(vision, "vision")
    reader, read = tower_of(text, "text")
    output = None
    if heads.language_model is not None:
        output = None if read_config(locate(text)).get_text_config().tie_word_embeddings else output_of(locate(text))
        heads = replace(heads, language_model=replace(heads.language_model, tied=output is None))
    transformer = replace(reader.config.transformer, cross=cross)
    words = replace(reader.config, transformer=transformer)
    config = VLMConfig(replace(tower.config, layer=layer), words, fusion, heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionLanguageModel(config)
    model.vision.load_state_dict(tower.state_dict())
    fill_text(model.text, reader)
    if output is not None:
        model.language_model.output.load_state_dict({"weight": output})
    return model.eval(), joined_processor(model, seen, read)


def tower_of(source: str | Path, part: str) -> tuple[nn.Module, HuggingFaceProcessor | None]:
    """The part itself, or that of a whole model."""
    model, processor = from_huggingface(source)
    model = getattr(model, part) if isinstance(model, VisionLanguageModel) else model
    if isinstance(model, TextModel) != (part == "text"):
        raise UserError(f"{part}: found {type(model).__name__} in '{source}'; expected a {part} model")
    return model, processor


def fill_text(model: TextModel, pretrained: TextModel) -> None:
    """All that was pretrained; what is new is the cross-attention alone."""
    report = model.load_state_dict(pretrained.state_dict(), strict=False)
    fresh = [name for name in report.missing_keys if ".cross." not in name]
    if fresh or report.unexpected_keys:
        raise UserError(f"text: found no weights for {fresh[:5]}; expected all but those of cross-attention")


def output_of(directory: Path) -> Tensor:
    """[V, D] float32, the output matrix of a language model.

    Raises:
        UserError: the directory has none.
    """
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if OUTPUT in file.keys():  # noqa: SIM118 (no mapping)
                return file.get_tensor(OUTPUT).float()
    raise UserError(
        f"{directory}: found no {OUTPUT}, and its config ties none; expected a language model with its head"
    )


def joined_processor(
    model: VisionLanguageModel, seen: HuggingFaceProcessor | None, read: HuggingFaceProcessor | None
) -> HuggingFaceProcessor:
    """Pictures of one part, words of the other; texts leave room for the picture before them."""
    prefix = getattr(model.fusion, "length", 0)
    limit = min(model.config.text.context, read.text_limit if read is not None else model.config.text.context) - prefix
    if limit < 4:
        raise UserError(
            f"text: found {model.config.text.context} positions with {prefix} image tokens before the words; expected "
            f"at least {prefix + 4}; take a fusion with fewer image tokens, such as merge: 2"
        )
    pictures = seen.pictures if seen is not None else None
    return HuggingFaceProcessor(
        pictures, read.tokenizer if read is not None else None, model.config.vision.image_size, limit
    )
