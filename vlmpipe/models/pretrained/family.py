"""What a Hugging Face family is to us, and what families share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmpipe.errors import UserError
from vlmpipe.models.pretrained.keys import KeyMap, pair
from vlmpipe.models.text import TextConfig, TextModel
from vlmpipe.models.vision import VisionConfig, build_vision
from vlmpipe.models.vlm import VisionLanguageModel, VLMConfig

Theirs = Mapping[str, Any]  # their whole config as a mapping, defaults filled in
Names = frozenset[str]  # of the weights that a checkpoint has, as their module calls them
Inputs = dict[str, Tensor]  # what their forward takes, by its argument names


@dataclass(frozen=True)
class Family:
    """How the models of one `model_type` become ours and go back.

    architecture: the class of transformers that holds these weights and no others.
    config: the class of our config: VLMConfig, VisionConfig or TextConfig.
    read: our config from theirs; refuses by UserError what our parts can't do.
    write: the content of their config.json that our config decides, without model_type and architectures.
    keys: the key map of a config (see `keys`), from our state to that of `architecture`.
    inputs: what parity feeds both sides, from their config and the directory's processor (None where it has none).
    found, expected: outputs by the same names, of our model and of theirs, for those inputs.
    tiny: their config of a model of odd sizes that is made in no time, for tests and tables.
    ignored: patterns of names in their state that repeat others (tied weights) or are constants.
    heads: patterns of weights that a directory of a larger model has beyond this part.
    optional: modules of theirs that a directory may lack, such as poolers; `read` sees in its names which are there.
    reserved: token ids that their text model gives another meaning; a tokenizer of ours gets others on its way out.
    image_processor: the class of transformers that describes our preprocessing for such a model.
    fills_text: every text is padded to the limit, and the model sees the padding.
    """

    architecture: str
    config: type
    read: Callable[[Theirs, Names], Any]
    write: Callable[[Any], dict[str, Any]]
    keys: Callable[[Any], KeyMap]
    inputs: Callable[[Theirs, Any], Inputs]
    found: Callable[[Any, Inputs], dict[str, Tensor]]
    expected: Callable[[Any, Inputs], dict[str, Tensor]]
    tiny: Mapping[str, Any]
    ignored: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    reserved: tuple[int, ...] = ()
    image_processor: str = "ViTImageProcessorPil"
    fills_text: bool = False

    def build(self, config: Any) -> nn.Module:
        """Our module of this config."""
        return BUILDERS[self.config](config)


BUILDERS = {VLMConfig: VisionLanguageModel, VisionConfig: build_vision, TextConfig: TextModel}

# --- configs ---------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "relu": "relu",
}


def activation(name: str) -> str:
    """Our name of their activation."""
    if name not in ACTIVATIONS:
        raise UserError(f"activation: found {name!r}; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def activation_name(ours: str) -> str:
    """Their name of our activation."""
    return "gelu_pytorch_tanh" if ours == "gelu_tanh" else ours


def require(config: Theirs, **expected: Any) -> None:
    """Refuse a checkpoint that was made with a setting that our parts don't have.

    Raises:
        UserError: `config` has another value for one of these keys; absent keys pass.
    """
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise UserError(f"{key}: found {config[key]!r}; expected {value!r}; other values are not supported")


def square(size: int | list[int] | tuple[int, int], name: str) -> int:
    """A side in pixels, which some configs give twice."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UserError(f"{name}: found {size}; expected a square")
    return sides.pop()


def qkv(transformer: Any, ours: str, theirs: tuple[str, str, str], bias: bool = True) -> KeyMap:
    """Our one matrix for queries, keys and values from their three."""
    heads = (transformer.heads, transformer.kv_heads or transformer.heads, transformer.kv_heads or transformer.heads)
    return pair(ours, theirs, bias=bias, sizes=[count * transformer.per_head for count in heads])


# --- inputs and outputs for parity -----------------------------------------------------------------------

SENTENCES = (
    "A red circle lies above a blue square.",
    "two dogs",
    "What colour has the small triangle that stands to the left of the house? It is green.",
)


def random_pixels(side: int, count: int = 3) -> Tensor:
    """[n, 3, side, side] as after normalisation."""
    return torch.randn(count, 3, side, side)


def pixels(theirs: Theirs, processor: Any) -> Inputs:
    """Noise as the directory's image processor makes it of pictures, or normalised noise of the config's size."""
    side = square(theirs["image_size"], "image_size")
    if processor is None or processor.pictures is None:
        return {"pixel_values": random_pixels(side)}
    from PIL import Image

    noise = torch.randint(0, 256, (3, side + 7, side + 20, 3), dtype=torch.uint8).numpy()
    return {"pixel_values": processor.images([Image.fromarray(each) for each in noise]).float()}


def words(theirs: Theirs, processor: Any, end: int | None = None, length: int = 13) -> Inputs:
    """Rows of several lengths, padded on the right: sentences where there is a tokenizer, random tokens otherwise.

    end: the token that a text ends with, where the model looks for it.
    """
    context = theirs.get("max_position_embeddings") or theirs.get("n_positions")
    if processor is not None and processor.tokenizer is not None:
        return tokenized(processor.tokenizer, context)
    length = min(length, context)
    lengths = torch.tensor([length * 2 // 3, length, max(3, length // 3)])
    real = torch.arange(length) < lengths[:, None]
    tokens = torch.randint(3, theirs["vocab_size"] - 2, real.shape)
    if end is not None:
        tokens = torch.where(tokens == end, 3, tokens)
        tokens[torch.arange(3), lengths - 1] = end
    return {"input_ids": tokens * real, "attention_mask": real.long()}


def tokenized(tokenizer: Any, context: int) -> Inputs:
    """SENTENCES as the tokenizer makes them; one without a padding token pads with its end."""
    encoded = [tokenizer(sentence, truncation=True, max_length=context)["input_ids"] for sentence in SENTENCES]
    length = max(map(len, encoded))
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    tokens = torch.tensor([[*ids, *[fill] * (length - len(ids))] for ids in encoded])
    real = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in encoded])
    return {"input_ids": tokens, "attention_mask": real}


def run_text(model: Any, inputs: Inputs) -> Tensor:
    """[B, T, D] of our text model for their inputs; without an attention mask every token is real."""
    tokens = inputs["input_ids"]
    segments = inputs.get("attention_mask", torch.ones_like(tokens))
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return model(model.token_embedding(tokens), segments, positions, types_BT=inputs.get("token_type_ids"))


def real(x_BTD: Tensor, inputs: Inputs) -> Tensor:
    """[tokens, D] without padding, where the two sides may differ."""
    return x_BTD[inputs["attention_mask"].bool()]


def found_text(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    """A text model's tokens."""
    return {"tokens": real(run_text(model, inputs), inputs)}


def expected_text(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    return {"tokens": real(model(**inputs).last_hidden_state, inputs)}
