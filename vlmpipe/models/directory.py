"""A model on disk: config.json, model.safetensors, tokenizer.json. Nothing is ever unpickled.

A model that came from Hugging Face keeps the files of its image processor and tokenizer beside them.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from vlmpipe.config import parse, to_dict
from vlmpipe.errors import UserError
from vlmpipe.models.pretrained.processor import HuggingFaceProcessor, restore
from vlmpipe.models.processor import MASK, Processor, train_tokenizer
from vlmpipe.models.vlm import VisionLanguageModel, VLMConfig

FORMAT = "vlmpipe-1"
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


def build(config: VLMConfig, texts: Iterable[str], seed: int = 0) -> tuple[VisionLanguageModel, Processor]:
    """A new model with random weights, and its processor with a tokenizer trained on `texts`."""
    special = () if config.heads.masked_text is None else (MASK,)
    tokenizer = train_tokenizer(texts, config.processor, special)
    config = config.with_vocab(tokenizer.get_vocab_size())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionLanguageModel(config)
    return model, make_processor(config, tokenizer)


def make_processor(config: VLMConfig, tokenizer: Tokenizer, answers=()) -> Processor:
    """The processor that feeds a model of this config."""
    prefix = (config.vision.side // config.fusion.merge) ** 2 if config.fusion.kind == "prefix" else 0
    reader = config.text if config.encoder is None else config.encoder
    limit = min(reader.context, reader.context if config.codes else config.text.context) - prefix
    if limit < 4:
        raise UserError(
            f"text.context: found {config.text.context} with a prefix of {prefix} image tokens; "
            f"expected at least {prefix + 4}"
        )
    size = config.processor.image_size or (config.vision or config.codes).image_size
    return Processor(config.processor, tokenizer, size, limit, answers)


def save(model: VisionLanguageModel, processor: Processor | HuggingFaceProcessor, directory: Path) -> None:
    """Write the model directory; the same model gives the same bytes."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, directory / WEIGHTS)
    facts = {"format": FORMAT, "model": to_dict(model.config), "answers": list(processor.answers)}
    if isinstance(processor, Processor):
        processor.tokenizer.save(str(directory / TOKENIZER))
    else:
        processor.save(directory)
        facts["processor"] = processor.facts()
    if hasattr(model, "huggingface"):
        facts["huggingface"] = model.huggingface
    # The config goes last: a directory with a config is complete.
    (directory / CONFIG).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def load(
    directory: Path, device: str | torch.device = "cpu"
) -> tuple[VisionLanguageModel, Processor | HuggingFaceProcessor]:
    """Read what `save` wrote; the model comes in eval mode.

    Raises:
        UserError: a file is missing or unreadable, or weights and config don't belong together.
    """
    directory = Path(directory)
    facts = read_config(directory)
    config = parse(VLMConfig, facts.get("model"), f"{directory / CONFIG}: model")
    with torch.random.fork_rng(devices=[]):
        model = VisionLanguageModel(config)
    load_weights(model, directory / WEIGHTS)
    answers = facts.get("answers", ())
    if "huggingface" in facts:
        model.huggingface = facts["huggingface"]
    if "processor" in facts:
        processor = restore(directory, facts["processor"], answers)
    else:
        processor = make_processor(config, read_tokenizer(directory / TOKENIZER), answers)
    return model.to(device).eval(), processor


def is_model(directory: Path) -> bool:
    """Whether `save` wrote this directory; a Hugging Face directory has a config.json too, of another format."""
    return (directory / CONFIG).is_file() and f'"{FORMAT}"' in (directory / CONFIG).read_text()


def read_config(directory: Path) -> dict:
    path = directory / CONFIG
    if not path.is_file():
        raise UserError(f"found no {CONFIG} in {directory}; expected a model directory; train one or check the path")
    try:
        facts = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: found broken JSON ({error}); expected a saved model; copy it again") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        found = facts.get("format") if isinstance(facts, dict) else type(facts).__name__
        raise UserError(f"{path}: found format {found!r}; expected {FORMAT!r}; use a directory that this program wrote")
    return facts


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Every weight from the file, no more and no less."""
    if not path.is_file():
        raise UserError(f"found no {path.name} in {path.parent}; expected the weights; copy the directory again")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: found a corrupt file ({error}); expected safetensors; copy or train again") from None
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    missing, extra = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    wrong = sorted(name for name in wanted.keys() & weights.keys() if wanted[name] != weights[name].shape)
    if missing or extra or wrong:
        raise UserError(
            f"{path}: found weights that do not fit {CONFIG}: missing {missing[:3]}, unexpected {extra[:3]}, "
            f"wrong shape {wrong[:3]}; expected both files from one save"
        )
    model.load_state_dict(weights)


def read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise UserError(f"found no {path.name} in {path.parent}; expected the tokenizer; copy the directory again")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every fault of the file
        raise UserError(f"{path}: found an unreadable tokenizer ({error}); copy the directory again") from None
