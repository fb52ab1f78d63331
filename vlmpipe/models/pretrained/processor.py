"""What feeds a model from Hugging Face: transformers' own image processors and tokenizers behind our surface.

Shapes: B pictures, C colours, Y and X pixels.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.processor import BOS, EOS, PAD, EncodedText, Processor, ProcessorConfig

# What a language model without a chat template is asked with.
QUESTION = "Question: {} Answer:"
# What any is asked about a sentence.
STATEMENT = "{} Is this true? Answer with yes or no."
PICTURE_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model",
)


class HuggingFaceProcessor:
    """The surface of `Processor` over a Hugging Face image processor and tokenizer, either of which may be None.

    Pictures come out as the image processor makes them, to the bit where it normalises; `images` gives uint8, which
    the model normalises on its device, where the processor's last steps are x / 255, minus mean, over deviation.

    Args:
        pictures: a PIL image processor of transformers.
        tokenizer: a tokenizer of transformers.
        image_size: side in pixels of the square that the model sees.
        text_limit: most tokens of one text; longer ones lose their end.
        fill: a text for the dual encoder is padded to the limit, and the model sees the padding (SigLIP).
        answers: candidates that a dual encoder chooses among.
        picture: the token that a chat template puts where a picture stands.
    """

    def __init__(
        self, pictures: Any, tokenizer: Any, image_size: int, text_limit: int, fill: bool = False, answers=(),
        picture: int | None = None,
    ):
        self.pictures, self.tokenizer = pictures, tokenizer
        self.image_size, self.text_limit, self.fill = image_size, text_limit, fill
        self.answers: tuple[str, ...] = tuple(answers)
        self.picture = picture
        self.config = ProcessorConfig(resize="native")  # pictures come as `pictures` makes them
        names = ("pad", "bos", "eos") if tokenizer is not None else ()
        ids = {name: getattr(tokenizer, f"{name}_token_id") for name in names}
        # BERT's tokenizers call the ends of a text otherwise.
        self.bos = ids.get("bos") if ids.get("bos") is not None else getattr(tokenizer, "cls_token_id", None)
        self.eos = ids.get("eos") if ids.get("eos") is not None else getattr(tokenizer, "sep_token_id", None)
        self.pad = ids.get("pad") if ids.get("pad") is not None else self.eos

    @property
    def vocab_size(self) -> int:
        return len(self._words())

    def _words(self) -> Any:
        if self.tokenizer is None:
            raise UserError("found no tokenizer files beside the model; expected tokenizer.json; copy it there")
        return self.tokenizer

    # --- pictures ----------------------------------------------------------------------------------------

    @property
    def plain(self) -> bool:
        """Whether the model's own normalisation of uint8 is the processor's."""
        return bool(self.pictures.do_rescale) and abs(self.pictures.rescale_factor * 255 - 1) < 1e-9

    def image(self, image: Image.Image) -> np.ndarray:
        """[C, Y, X] uint8, or float where the model can't normalise it itself."""
        if self.pictures is None:
            raise UserError("found no preprocessor_config.json beside the model; expected one; copy it there")
        if not getattr(self.pictures, "do_convert_rgb", None) and image.mode != "RGB":
            image = image.convert("RGB")  # transformers would hand on other channels than the model has
        raw = {"do_rescale": False, "do_normalize": False} if self.plain else {}
        pixels = np.asarray(self.pictures(images=image, **raw)["pixel_values"][0])
        return pixels.astype(np.uint8) if self.plain else pixels.astype(np.float32)

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """[B, C, Y, X], as `image` says."""
        return torch.from_numpy(np.stack([self.image(image) for image in images]))

    # --- words -------------------------------------------------------------------------------------------

    def encode(self, text: str) -> EncodedText:
        """A text for the dual encoder, with the tokens that its tokenizer puts around it."""
        padding = {"padding": "max_length"} if self.fill else {}
        ids = self._words()(text, truncation=True, max_length=self.text_limit, **padding)["input_ids"]
        return EncodedText(tuple(ids), 0)

    def encode_question(self, question: str) -> EncodedText:
        """The start of an answer, by the tokenizer's chat template where it has one; an empty question asks for a
        caption."""
        ids = self._prompt(question)[: self.text_limit - 1]
        return EncodedText(tuple(ids), len(ids))

    def _prompt(self, question: str) -> list[int]:
        tokenizer = self._words()
        if question and getattr(tokenizer, "chat_template", None):
            shown = [{"type": "image"}, {"type": "text", "text": question}]
            said = [{"role": "user", "content": question if self.picture is None else shown}]
            return tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        start = self.bos if self.bos is not None else self.eos
        asked = tokenizer(QUESTION.format(question), add_special_tokens=False)["input_ids"] if question else []
        return [*([] if start is None else [start]), *asked]

    def statement(self, sentence: str) -> str:
        """How it is asked whether a sentence is true, in training too."""
        return STATEMENT.format(sentence)

    def encode_answer(self, question: str, answer: str) -> EncodedText:
        """Question and answer in one text, of which the answer is learned."""
        prompt = self.encode_question(question)
        room = self.text_limit - len(prompt.ids) - 1
        spaced = f" {answer}" if question else answer
        ids = self._words()(spaced, add_special_tokens=False)["input_ids"][:room]
        return EncodedText((*prompt.ids, *ids, *([] if self.eos is None else [self.eos])), prompt.start)

    def decode(self, ids: Sequence[int]) -> str:
        """The text up to the first end."""
        ids = list(ids)
        ids = ids[: ids.index(self.eos)] if self.eos in ids else ids
        return self._words().decode(ids, skip_special_tokens=True).strip()

    # --- files -------------------------------------------------------------------------------------------

    def save(self, directory: Path) -> None:
        for part in (self.pictures, self.tokenizer):
            if part is not None:
                part.save_pretrained(directory)

    def facts(self) -> dict[str, Any]:
        """What `restore` needs beside the files."""
        return {
            "image_size": self.image_size, "text_limit": self.text_limit, "fill": self.fill, "picture": self.picture,
        }


def restore(directory: Path, facts: Mapping[str, Any], answers: Sequence[str]) -> HuggingFaceProcessor:
    """The processor that `save` wrote."""
    return HuggingFaceProcessor(read_pictures(directory), read_tokenizer(directory), **facts, answers=answers)


def read_processor(directory: Path, theirs: Mapping[str, Any], fill: bool) -> HuggingFaceProcessor | None:
    """The processor of a Hugging Face directory; None where there are no files of one.

    Args:
        theirs: the model's config, which says what the files don't.
        fill: as the processor takes it; the family says it.
    """
    pictures, tokenizer = read_pictures(directory), read_tokenizer(directory)
    if pictures is None and tokenizer is None:
        return None
    text = theirs.get("text_config") or theirs
    context = text.get("max_position_embeddings") or text.get("n_positions") or 0
    said = getattr(tokenizer, "model_max_length", context) or context
    limit = int(min(context or said, said))
    return HuggingFaceProcessor(
        pictures, tokenizer, side(pictures, theirs), limit, fill,
        picture=theirs.get("image_token_id", theirs.get("image_token_index")),
    )


def side(pictures: Any, theirs: Mapping[str, Any]) -> int:
    """Of the square that the image processor makes, or else of what the model expects; 0 for a text model."""
    for name in ("crop_size", "size") if getattr(pictures, "do_center_crop", False) else ("size",):
        height = getattr(getattr(pictures, name, None), "height", None)
        if height:
            return int(height)
    size = (theirs.get("vision_config") or theirs).get("image_size") or 0
    return int(size if isinstance(size, int) else size[0])


def read_pictures(directory: Path) -> Any:
    """transformers' image processor, without torchvision; None where its file is missing."""
    if not any((directory / name).is_file() for name in PICTURE_FILES):
        return None
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(directory, backend="pil", trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory}: found an unreadable image processor ({_line(error)}); copy it again") from None


def read_tokenizer(directory: Path) -> Any:
    """transformers' tokenizer; None where its files are missing."""
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{directory}: found an unreadable tokenizer ({_line(error)}); copy it again") from None


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200]


# --- our processor as Hugging Face files -------------------------------------------------------------------


def write_processor(
    processor: Any, directory: Path, kind: str, model: Any, exchanged: tuple[int, int] | None = None
) -> None:
    """Image processor and tokenizer as transformers reads them.

    Args:
        kind: the class of transformers for the image processor.
        model: its mean and deviation are written.
        exchanged: two tokens of our tokenizer that change places.
    """
    if not isinstance(processor, Processor):
        return processor.save(directory)
    own_tokenizer(processor, exchanged).save_pretrained(directory)
    vision = getattr(model.config, "vision", None)
    if vision is not None:
        own_pictures(processor, vision, kind).save_pretrained(directory)


def exchange_tokens(tokenizer: Tokenizer, exchanged: tuple[int, int] | None) -> Tokenizer:
    """A copy in which two tokens have each other's ids."""
    content = json.loads(tokenizer.to_str())
    if exchanged is not None:
        ids = dict([exchanged, exchanged[::-1]])
        vocabulary = content["model"]["vocab"]
        content["model"]["vocab"] = {token: ids.get(id, id) for token, id in vocabulary.items()}
        for token in content["added_tokens"]:
            token["id"] = ids.get(token["id"], token["id"])
    return Tokenizer.from_str(json.dumps(content))


def own_tokenizer(processor: Processor, exchanged: tuple[int, int] | None = None) -> Any:
    """Our tokenizer with the tokens that `encode` puts around a text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    copy = exchange_tokens(processor.tokenizer, exchanged)
    ends = [(token, copy.token_to_id(token)) for token in (BOS, EOS)]
    copy.post_processor = TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=copy, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=processor.text_limit
    )


def own_pictures(processor: Processor, vision: Any, kind: str) -> Any:
    """Our resizing in their words. Their crop comes after the resizing and ours before it: what is cut from a picture
    that isn't square differs by less than a pixel."""
    import transformers

    size = processor.image_size
    square = {"height": size, "width": size}
    crop = processor.config.resize == "crop"
    return getattr(transformers, kind)(
        size={"shortest_edge": size} if crop else square,
        do_center_crop=crop,
        crop_size=square,
        resample=Image.Resampling.BICUBIC,
        do_convert_rgb=True,
        image_mean=list(vision.mean),
        image_std=list(vision.std),
    )
