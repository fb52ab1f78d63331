"""Models that look at a memory go through the training stage as any other, and one that writes pictures learns its
codes there."""

import dataclasses

import pytest
import torch

from tests.models.fusion.small import SMALL
from tests.train.test_stages import CONFIG, INLINE, contents, losses, packed  # noqa: F401 (a fixture)
from vlmpipe.config import parse
from vlmpipe.models import VLMConfig, load
from vlmpipe.train.stages import pretrain


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def run(packed, root, name, objective=None):  # noqa: F811
    config = dataclasses.replace(CONFIG, objective=objective)
    pretrain(packed, root / "scorer", root / "out", root / "state", parse(VLMConfig, SMALL[name], name), config, INLINE)
    return root / "out"


@pytest.mark.parametrize(
    ("name", "objective"),
    [("flamingo", None), ("visualgpt", None), ("simvlm", "prefix_lm"), ("text-to-image", None)],
)
def test_training_lowers_the_loss_and_leaves_a_model(packed, tmp_path, name, objective):  # noqa: F811
    out = run(packed, tmp_path, name, objective)
    assert losses(out)[-1] < 0.9 * losses(out)[0]
    model, processor = load(out)
    assert model.config.with_vocab(processor.vocab_size) == model.config


def test_the_same_data_give_the_same_codebook_and_weights(packed, tmp_path):  # noqa: F811
    first, second = run(packed, tmp_path / "1", "text-to-image"), run(packed, tmp_path / "2", "text-to-image")
    assert contents(first) == contents(second)
    assert load(first)[0].codes.codebook.any()
