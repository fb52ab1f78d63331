"""Pictures that an image processor leaves at different sizes: each sample is told what it is told alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from tests.models.test_native import make as make_native
from tests.models.tiny import make
from vlmpipe.evaluate.tasks.captions import caption_loss, match
from vlmpipe.evaluate.tasks.statements import judge
from vlmpipe.models import VisionLanguageModel
from vlmpipe.models.heads import HeadsConfig, MatchingConfig
from vlmpipe.models.layers import initialize
from vlmpipe.models.parity import random_module
from vlmpipe.models.pretrained import HuggingFaceProcessor, convert
from vlmpipe.models.pretrained.processor import own_tokenizer


def pictures():
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (y, x, 3), np.uint8)) for x, y in ((61, 40), (40, 64), (50, 50))]


@pytest.fixture(scope="module")
def vilt():
    """(a model that judges statements, what feeds it)."""
    torch.set_num_threads(1)
    _, own = make("prefix")
    config, theirs = random_module("vilt.statement", vocab_size=own.vocab_size, max_position_embeddings=40)
    prepare = transformers.ViltImageProcessorPil(size={"shortest_edge": 20}, size_divisor=5)
    processor = HuggingFaceProcessor(prepare, own_tokenizer(own), 20, 40)
    return convert(config.to_dict(), theirs.state_dict(), processor), processor


def test_captions_of_pictures_at_their_own_sizes():
    model, processor = make_native()
    texts = ["a red circle above a blue square", "two", "a blue square"]
    together = caption_loss(model, processor, pictures(), texts)
    for image, text, (loss, tokens) in zip(pictures(), texts, together, strict=True):
        ((alone, count),) = caption_loss(model, processor, [image], [text])
        assert loss == pytest.approx(alone, rel=1e-4) and tokens == count


def test_statements_about_pictures_filled_up_to_a_common_size(vilt):
    model, processor = vilt
    first, second, third = pictures()
    rows, said = [(first, second), (second, third), (third, first)], ["a red circle", "how many", "blue square two"]
    assert judge(model, processor, rows, said) == [
        judge(model, processor, [row], [text])[0] for row, text in zip(rows, said, strict=True)
    ]


def test_matches_of_pictures_filled_up_to_a_common_size(vilt):
    whole, processor = vilt
    torch.manual_seed(0)
    model = VisionLanguageModel(replace(whole.config, heads=HeadsConfig(matching=MatchingConfig()))).eval()
    initialize(model)
    texts = ["a red circle", "how many shapes", "blue square two"]
    alone = [match(model, processor, [image], [text])[0] for image, text in zip(pictures(), texts, strict=True)]
    assert match(model, processor, pictures(), texts) == pytest.approx(alone, rel=1e-4)
