"""From a Hugging Face directory to our model. transformers reads the files; nothing is ever unpickled."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.pretrained.families import FAMILIES, kind_of
from vlmpipe.models.pretrained.family import Family
from vlmpipe.models.pretrained.keys import matches, to_ours
from vlmpipe.models.pretrained.processor import HuggingFaceProcessor, read_processor
from vlmpipe.models.vision import VisionConfig
from vlmpipe.models.vlm import VisionLanguageModel, VLMConfig

PARTS = ("vision", "text")
# What transformers reads; pickled weights and other frameworks' files stay behind.
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def from_huggingface(
    source: str | Path, device: str | torch.device = "cpu", part: str | None = None
) -> tuple[nn.Module, HuggingFaceProcessor | None]:
    """Our model with the weights of a Hugging Face one, float32 and in eval mode, and what feeds it.

    A directory of a whole model gives a VisionLanguageModel; one of a vision or text model gives a VisionEncoder or a
    TextModel, without the task head it may have (a line in the log names what is left out).

    Args:
        source: a directory, or an id on the hub; weights in safetensors, also sharded.
        part: "vision" or "text": only this part of a whole model.

    Returns: the model, and the processor: its `tokenizer` or `pictures` is None where the directory has no such files,
    and it is None where it has neither.

    Raises:
        UserError: an unknown family, a setting that our parts don't have, or keys that don't map, named.
    """
    if part is not None and part not in PARTS:
        raise UserError(f"part: found {part!r}; expected one of {', '.join(PARTS)}")
    directory = locate(source)
    config = read_config(directory)
    family = family_of(config.to_dict())
    theirs = load_theirs(directory, family)
    processor = read_processor(directory, config.to_dict(), family.fills_text)
    model = convert(config.to_dict(), theirs.state_dict(), processor)
    if part is not None:
        model = take(model, part)
    return model.to(device).eval(), processor


def family_of(theirs: Mapping[str, Any]) -> Family:
    return FAMILIES[kind_of(theirs)]


def convert(theirs: Mapping[str, Any], weights: Mapping[str, Tensor], processor: Any = None) -> nn.Module:
    """Our model from their config as a mapping and their state.

    Args:
        weights: the state of the family's `architecture`.
        processor: gives the model the mean and the deviation that its pictures are normalised with.
    """
    family = family_of(theirs)
    config = normalised_as(family.read(theirs, frozenset(weights)), processor)
    state = to_ours({name: weight.float() for name, weight in weights.items()}, family.keys(config), family.ignored)
    with torch.random.fork_rng(devices=[]):
        model = family.build(config)
    model.load_state_dict(state)
    model.huggingface = dict(theirs)  # what `to_huggingface` keeps of settings that our config has no word for
    return model.eval()


def take(model: nn.Module, part: str) -> nn.Module:
    if not isinstance(model, VisionLanguageModel):
        raise UserError(f"part: found {part!r} of a model that is a part; expected a whole model; leave `part` out")
    return getattr(model, part)


def normalised_as(config: Any, processor: Any) -> Any:
    """The config with the mean, deviation and bounds of size that the directory's image processor has."""
    pictures = getattr(processor, "pictures", None)
    if isinstance(config, VLMConfig):
        return replace(config, vision=normalised_as(config.vision, processor))
    if not isinstance(config, VisionConfig) or pictures is None:
        return config
    if config.native is not None and getattr(pictures.size, "longest_edge", None):
        bounds = {"min_pixels": pictures.size.shortest_edge, "max_pixels": pictures.size.longest_edge}
        config = replace(config, native=replace(config.native, **bounds))
    if not pictures.do_normalize:
        return replace(config, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return replace(config, mean=tuple(map(float, pictures.image_mean)), std=tuple(map(float, pictures.image_std)))


def locate(source: str | Path) -> Path:
    """The directory, or what the hub has under this id: weights in safetensors and small files, never pickles.

    Raises:
        UserError: neither a directory nor an id that the hub can give.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=WANTED))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"found no directory '{source}', and the hub gives none ({first_line(error)}); expected a directory with "
            f"config.json and safetensors, or a hub id; check the path or the network"
        ) from None


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def read_config(directory: Path) -> Any:
    """Their config object.

    Raises:
        UserError: there is none, or transformers doesn't know it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{directory}: found no Hugging Face model ({first_line(error)}); expected its config.json, of a "
            f"type that transformers knows, as code in a directory is never run; check the path"
        ) from None


def load_theirs(source: Path, family: Family) -> Any:
    """Their module in float32, without optional modules that the directory has no weights of.

    Raises:
        UserError: no safetensors, or weights that are missing, unknown or of another shape, named.
    """
    import transformers

    try:
        model, report = getattr(transformers, family.architecture).from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{source}: found no readable weights ({first_line(error)}); expected safetensors, which hold no code"
        ) from None
    missing = {name for name in report["missing_keys"] if not matches(name, family.ignored)}
    absent = [module for module in family.optional if all_missing(model, module, missing)]
    missing = {name for name in missing if not name.startswith(tuple(f"{module}." for module in absent))}
    left = {name for name in report["unexpected_keys"] if matches(name, family.heads)}
    unknown = set(report["unexpected_keys"]) - left
    shapes = {entry[0] for entry in report["mismatched_keys"]}
    if missing or unknown or shapes:
        raise UserError(
            f"{source}: found weights that do not fit {family.architecture}: missing {some(missing)}, "
            f"unexpected {some(unknown)}, of another shape {some(shapes)}; expected every weight to have its place"
        )
    if left:
        logging.getLogger(__name__).warning("%s: left out, as no part of it: %s", family.architecture, some(left))
    return without(model, absent).eval()


def all_missing(model: nn.Module, module: str, missing: Collection[str]) -> bool:
    """Whether the model has such a module and none of its weights was found."""
    names = [name for name in model.state_dict() if name.startswith(f"{module}.")]
    return bool(names) and all(name in missing for name in names)


def without(model: nn.Module, modules: Collection[str]) -> nn.Module:
    """The model after these were taken out of it; transformers' own code expects None in their place."""
    for module in modules:
        parent, _, name = module.rpartition(".")
        setattr(model.get_submodule(parent), name, None)
    return model


def some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") or "none"
