"""From our model to a directory that transformers loads with `from_pretrained`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmpipe.errors import UserError
from vlmpipe.models.heads import ProjectionConfig
from vlmpipe.models.layers import TransformerConfig
from vlmpipe.models.pretrained.families import FAMILIES, kind_of, model_type
from vlmpipe.models.pretrained.family import Family
from vlmpipe.models.pretrained.keys import matches, to_theirs
from vlmpipe.models.pretrained.load import without
from vlmpipe.models.pretrained.processor import write_processor
from vlmpipe.models.processor import Processor
from vlmpipe.models.text import TextConfig
from vlmpipe.models.vision import VisionConfig

# Of their configs, what they write themselves.
SAVED_ANEW = {"model_type", "architectures", "dtype", "transformers_version", "_name_or_path"}

# Of our configs, what has no place in theirs and changes no output of a trained model.
OURS_ALONE = {
    "processor", "mean", "std", "dropout", "patch_dropout", "temperature", "max_scale", "min_pixels", "max_pixels",
}


def to_huggingface(
    model: nn.Module,
    processor: Any,
    directory: str | Path,
    kind: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json, model.safetensors and what feeds the model, for transformers' `from_pretrained`.

    Args:
        model: a VisionLanguageModel, VisionEncoder or TextModel.
        processor: ours or one from Hugging Face; None writes neither tokenizer nor image processor.
        kind: the family's name in FAMILIES; None: what the model came from, or the first family that says all that its
            config says.
        dtype: of the weights in the file; None: as they are.

    Raises:
        UserError: no family can say what the model is.
    """
    kind = kind or fitting(model)
    if kind not in FAMILIES:
        raise UserError(f"kind: found {kind!r}; expected one of {', '.join(FAMILIES)}")
    family, directory = FAMILIES[kind], Path(directory)
    exchanged = exchange(processor, family)
    theirs = their_module(family, theirs_of(kind, model, special_tokens(processor, exchanged)), model.config)
    state = {name: weight.detach().cpu() for name, weight in model.state_dict().items()}
    state = {name: exchange_rows(name, weight, exchanged) for name, weight in state.items()}
    fill(theirs, to_theirs(state, family.keys(model.config)), family)
    if dtype is not None:
        theirs = theirs.to(dtype)
    theirs.save_pretrained(directory)
    if processor is not None:
        write_processor(processor, directory, family.image_processor, model, exchanged)


def exchange(processor: Any, family: Family) -> tuple[int, int] | None:
    """Two tokens of ours that change places, since the family has another use for the end's."""
    moved = isinstance(processor, Processor) and processor.eos in family.reserved
    return (processor.eos, processor.answer) if moved else None


def exchange_rows(name: str, weight: torch.Tensor, exchanged: tuple[int, int] | None) -> torch.Tensor:
    """The token embedding after two tokens changed places; other weights as they are."""
    if exchanged is None or not name.endswith("token_embedding.weight"):
        return weight
    order = list(range(len(weight)))
    order[exchanged[0]], order[exchanged[1]] = exchanged[1], exchanged[0]
    return weight[order]


def theirs_of(kind: str, model: nn.Module, ids: dict[str, Any]) -> Any:
    """Their config object: what our config decides, over what the model came with."""
    import transformers

    family, origin = FAMILIES[kind], getattr(model, "huggingface", {})
    written = family.write(model.config)
    if origin and kind_of(origin) == kind:
        known = same(family.read(origin, frozenset(theirs_names(family, model))), model.config)
        merged = origin if known else merge(origin, written)
    else:
        merged = with_tokens(written, ids)
    content = {name: value for name, value in merged.items() if name not in SAVED_ANEW}
    return transformers.AutoConfig.for_model(model_type(kind), **content)


def special_tokens(processor: Any, exchanged: tuple[int, int] | None) -> dict[str, Any]:
    """Ids of the tokens that their text models look for, as far as a processor says them: their defaults are those of
    the published vocabulary."""
    ids = {f"{name}_token_id": getattr(processor, name, None) for name in ("bos", "eos", "pad")}
    return ids if exchanged is None else {**ids, "eos_token_id": exchanged[1]}


def with_tokens(written: dict[str, Any], ids: dict[str, Any]) -> dict[str, Any]:
    """Put beside the vocabulary that they are of, but for what the family says itself."""
    if "text_config" in written:
        return {**written, "text_config": with_tokens(written["text_config"], ids)}
    return {**ids, **written} if "vocab_size" in written else written


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, also inside mappings."""
    nested = {
        name: merge(base[name], value)
        for name, value in over.items()
        if isinstance(value, Mapping) and isinstance(base.get(name), Mapping)
    }
    return {**base, **over, **nested}


def fitting(model: nn.Module) -> str:
    """The family of a model that came from Hugging Face, or the first whose config says all that ours does."""
    origin = getattr(model, "huggingface", None)
    if origin:
        return kind_of(origin)
    for kind in FAMILIES:
        if says_all(kind, model):
            return kind
    raise UserError(
        "model: found an architecture that no Hugging Face family has; expected one of "
        f"{', '.join(FAMILIES)}; such a model stays in the format of `vlmpipe.models.save`"
    )


def says_all(kind: str, model: nn.Module) -> bool:
    """Whether our config is the same after a trip through theirs."""
    import transformers

    family = FAMILIES[kind]
    if type(model.config) is not family.config:
        return False
    try:
        written = transformers.AutoConfig.for_model(model_type(kind), **family.write(model.config)).to_dict()
        names = frozenset(theirs_names(family, model))
        return set(family.keys(model.config)) == set(model.state_dict()) and same(
            family.read(written, names), model.config
        )
    except UserError:
        return False


def theirs_names(family: Family, model: nn.Module) -> set[str]:
    return {name for rows in family.keys(model.config).values() for name in rows.names}


def same(one: Any, other: Any) -> bool:
    """Whether two of our configs describe the same function."""
    return type(one) is type(other) and comparable(one) == comparable(other)


def comparable(config: Any) -> Any:
    """A config as plain values: what is ours alone left out, what stands for another value written out."""
    if dataclasses.is_dataclass(config):
        values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        values |= SPELLED_OUT[type(config)](config) if type(config) in SPELLED_OUT else {}
        return {name: comparable(value) for name, value in values.items() if name not in OURS_ALONE}
    return config


def transformer_values(config: TransformerConfig) -> dict[str, Any]:
    return {
        "kv_heads": config.kv_heads or config.heads,
        "head_width": config.per_head,
        "hidden": config.hidden or 4 * config.width,
        "qkv_bias": config.bias if config.qkv_bias is None else config.qkv_bias,
    }


SPELLED_OUT = {
    TransformerConfig: transformer_values,
    TextConfig: lambda config: {"final_norm": config.has_final_norm},
    # Pictures of any size are read alike.
    VisionConfig: lambda config: {"image_size": None} if config.native or config.resnet else {},
    ProjectionConfig: lambda config: {"bias": config.bias is not None},  # its value is where training starts
}


def their_module(family: Family, config: Any, ours: Any) -> nn.Module:
    """Their module without weights."""
    import transformers
    from transformers.initialization import no_init_weights

    with torch.random.fork_rng(devices=[]), no_init_weights():
        theirs = getattr(transformers, family.architecture)(config)
    wanted = {name for rows in family.keys(ours).values() for name in rows.names}
    unused = [module for module in family.optional if not any(name.startswith(f"{module}.") for name in wanted)]
    return without(theirs, unused)


def fill(theirs: nn.Module, weights: Mapping[str, torch.Tensor], family: Family) -> None:
    """Put every weight in its place; what is tied follows."""
    report = theirs.load_state_dict(weights, strict=False)
    missing = [name for name in report.missing_keys if not matches(name, family.ignored)]
    if missing or report.unexpected_keys:
        raise UserError(
            f"{family.architecture}: found no weights for {missing[:5]} and no place for {report.unexpected_keys[:5]}; "
            f"expected a key map that covers both"
        )
    theirs.tie_weights()
