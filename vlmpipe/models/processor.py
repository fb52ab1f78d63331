"""Pictures and words to tensors and back: PIL and `tokenizers` only.

Shapes: B batch, C colours, Y and X pixels, T tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from vlmpipe.images import to_rgb
from vlmpipe.models.text import PADDING

PAD, BOS, EOS, ANSWER = "<pad>", "<bos>", "<eos>", "<answer>"
MASK = "<mask>"  # after the others, in the tokenizers of models that are trained on hidden words
SPECIAL_TOKENS = (PAD, BOS, EOS, ANSWER)


@dataclass(frozen=True)
class ProcessorConfig:
    """How pictures get to the model's size, and the tokenizer that is trained when none is given.

    `resize`: the whole picture, its middle square, or each picture at its own size, which models with `vision.native`
    take; for others `native` is `squash`.
    """

    resize: Literal["squash", "crop", "native"] = "squash"
    image_size: int = 0  # side in pixels of what the model gets; 0: the size that its picture tower was made for
    vocab_size: int = 4096  # at most
    lowercase: bool = True
    words: tuple[str, ...] = ()  # known from the start, as a pool of plain captions holds few question words


@dataclass(frozen=True)
class EncodedText:
    """Token ids of one text. Those from `start` on are to be predicted: the answer or the caption and its end."""

    ids: tuple[int, ...]
    start: int


def train_tokenizer(texts: Iterable[str], config: ProcessorConfig, special: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens: no text is unknown to it, and equal texts give equal tokens."""
    tokenizer = Tokenizer(models.BPE())
    steps = [normalizers.NFKC()] + ([normalizers.Lowercase()] if config.lowercase else [])
    tokenizer.normalizer = normalizers.Sequence(steps)
    # The leading space makes a word one token wherever it stands.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # What is frequent becomes a token: these are as frequent as a word in every text, up to what costs no time.
    texts = list(texts)
    tokenizer.train_from_iterator([*texts, *config.words * min(max(len(texts), 2), 10_000)], trainer)
    return tokenizer


def stack(encoded: Sequence[Sequence[EncodedText]]) -> dict[str, Tensor]:
    """Rows of one or more texts each, padded on the right.

    Returns [B, T] tensors: tokens, segments (1, 2, ... by text; 0 padding), positions inside each text, labels: the
    token to predict at each place, -100 where there is nothing to learn; and prefix, bool: the tokens before the one
    that the first label stands at.
    """
    length = max(sum(len(text.ids) for text in row) for row in encoded)
    rows = {name: np.zeros((len(encoded), length), np.int64) for name in ("tokens", "segments", "positions")}
    rows["segments"][:] = PADDING
    rows["labels"] = np.full((len(encoded), length), -100, np.int64)
    rows["prefix"] = np.zeros((len(encoded), length), np.bool_)
    for index, row in enumerate(encoded):
        at = 0
        for segment, text in enumerate(row, start=1):
            end = at + len(text.ids)
            rows["tokens"][index, at:end] = text.ids
            rows["segments"][index, at:end] = segment
            rows["positions"][index, at:end] = np.arange(len(text.ids))
            first = max(text.start, 1)
            rows["labels"][index, at + first - 1 : end - 1] = text.ids[first:]
            rows["prefix"][index, at : at + first - 1] = True
            at = end
    return {name: torch.from_numpy(value) for name, value in rows.items()}


class Processor:
    """Everything between files and the model's tensors.

    Args:
        image_size: side in pixels of the square that the model sees.
        text_limit: most tokens of one text; longer ones lose their end.
        answers: candidates that a dual encoder chooses among; empty until it was tuned on questions.
    """

    def __init__(self, config: ProcessorConfig, tokenizer: Tokenizer, image_size: int, text_limit: int, answers=()):
        self.config, self.tokenizer = config, tokenizer
        self.image_size, self.text_limit = image_size, text_limit
        self.answers: tuple[str, ...] = tuple(answers)
        self.picture: int | None = None  # the token that marks a picture's place in a text; ours stand before it
        self.pad, self.bos, self.eos, self.answer = (tokenizer.token_to_id(token) for token in SPECIAL_TOKENS)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.get_vocab_size()

    def image(self, image: Image.Image) -> np.ndarray:
        """uint8 [C, Y, X]."""
        image = to_rgb(image)
        if self.config.resize == "crop":
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        return np.asarray(image).transpose(2, 0, 1)

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """uint8 [B, C, Y, X]."""
        return torch.from_numpy(np.stack([self.image(image) for image in images]))

    def encode(self, text: str) -> EncodedText:
        """A text for the dual encoder."""
        ids = self.tokenizer.encode(text).ids[: self.text_limit - 2]
        return EncodedText((self.bos, *ids, self.eos), 0)

    def encode_question(self, question: str) -> EncodedText:
        """The start of an answer; the empty question asks for a caption."""
        ids = self.tokenizer.encode(question).ids if question else []
        ids = ids[: self.text_limit - 3]
        return EncodedText((self.bos, *ids, self.answer), len(ids) + 2)

    def statement(self, sentence: str) -> str:
        """How it is asked whether a sentence is true, of a model of words: our models learn it from the sentence."""
        return sentence

    def encode_answer(self, question: str, answer: str) -> EncodedText:
        """Question and answer in one text, of which the answer is learned."""
        prompt = self.encode_question(question)
        room = self.text_limit - len(prompt.ids) - 1
        ids = self.tokenizer.encode(answer).ids[:room]
        return EncodedText((*prompt.ids, *ids, self.eos), prompt.start)

    def decode(self, ids: Sequence[int]) -> str:
        """The text up to the first end."""
        ids = list(ids)
        ids = ids[: ids.index(self.eos)] if self.eos in ids else ids
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
