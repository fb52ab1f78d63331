"""Words and pictures to tensors and back."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models.tiny import TEXTS, make
from vlmpipe.models.processor import SPECIAL_TOKENS, EncodedText, ProcessorConfig, stack, train_tokenizer


def test_training_a_tokenizer_twice_gives_the_same_file():
    config = ProcessorConfig(vocab_size=400)
    first, second = (train_tokenizer(TEXTS * 5, config).to_str() for _ in range(2))
    assert first == second


def test_no_text_is_unknown_and_words_are_one_token_wherever_they_stand():
    tokenizer = train_tokenizer(["red circle", "a red square"] * 5, ProcessorConfig())
    assert tokenizer.decode(tokenizer.encode("Ünïcode 写真 <3").ids).strip() == "ünïcode 写真 <3"
    assert tokenizer.encode("red").ids == tokenizer.encode("a Red square").ids[1:2]
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3]


def test_given_words_are_tokens_though_no_text_has_them():
    texts, words = ["a red circle on the left of a blue square"] * 20, ("how", "many", "presence")
    with_words = train_tokenizer(texts, ProcessorConfig(vocab_size=330, words=words))
    without = train_tokenizer(texts, ProcessorConfig(vocab_size=330))
    assert len(with_words.encode("how many presence").ids) == 3 < len(without.encode("how many presence").ids)


def test_an_answer_is_a_question_and_what_follows(prefix):
    _, processor = prefix
    question = processor.encode_question("what color is the circle?")
    whole = processor.encode_answer("what color is the circle?", "red")
    assert whole.ids[: whole.start] == question.ids
    assert processor.decode(whole.ids[whole.start :]) == "red"
    assert whole.ids[-1] == processor.eos
    assert processor.encode_question("").ids == (processor.bos, processor.answer)


def test_long_texts_lose_their_end_and_never_the_marks(prefix):
    _, processor = prefix
    words = "red circle " * 100
    for encoded in (processor.encode(words), processor.encode_answer(words, words), processor.encode_answer("", words)):
        assert len(encoded.ids) <= processor.text_limit
        assert (encoded.ids[0], encoded.ids[-1]) == (processor.bos, processor.eos)
    assert processor.encode_question(words).ids[-1] == processor.answer


def test_stack_spelled_out():
    batch = stack([[EncodedText((1, 7, 3, 8, 2), 3), EncodedText((1, 9, 2), 0)], [EncodedText((1, 3, 2), 2)]])
    ignore = -100
    assert batch["tokens"].tolist() == [[1, 7, 3, 8, 2, 1, 9, 2], [1, 3, 2, 0, 0, 0, 0, 0]]
    assert batch["segments"].tolist() == [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 0, 0, 0, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 0, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [
        [ignore, ignore, 8, 2, ignore, 9, 2, ignore],
        [ignore, 2, ignore, ignore, ignore, ignore, ignore, ignore],
    ]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "1"])
def test_any_mode_becomes_bytes_of_the_right_shape(mode, prefix):
    _, processor = prefix
    images = processor.images([Image.new("RGB", (50, 30), "white").convert(mode)])
    assert images.dtype == torch.uint8 and images.shape == (1, 3, 32, 32)
    assert images.min() >= 250


def test_squash_keeps_the_edges_and_crop_the_middle():
    picture = np.zeros((20, 60, 3), np.uint8)
    picture[:, 20:40] = 255
    _, processor = make("prefix")
    squashed = processor.image(Image.fromarray(picture))
    assert squashed[:, :, 0].max() == 0 and squashed[:, :, 16].min() == 255
    processor.config = ProcessorConfig(resize="crop")
    assert processor.image(Image.fromarray(picture)).min() == 255
