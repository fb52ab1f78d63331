"""Where one token stands for a row, the last block computes no other: the same numbers and gradients."""

import pytest
import torch

from vlmpipe.models.layers import TransformerConfig
from vlmpipe.models.text import TextConfig, TextModel
from vlmpipe.models.vision import VisionConfig, VisionEncoder

SEGMENTS = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
STACKS = [("pre", "learned", 2), ("post", "rotary", 1), ("pre", "none", 0)]
POSITIONS = torch.arange(5).expand(3, -1)


def gradients(model, pooled):
    model.zero_grad()
    (pooled * torch.linspace(-1, 1, pooled.numel()).view_as(pooled)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def same(model, found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    ours, theirs = gradients(model, found), gradients(model, expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", ["last", "first", "mean"])
@pytest.mark.parametrize(("place", "positions", "depth"), STACKS)
def test_a_text(pool, place, positions, depth):
    torch.manual_seed(0)
    transformer = TransformerConfig(16, depth, 4, kv_heads=2, norm_place=place)
    model = TextModel(TextConfig(transformer, vocab_size=9, context=5, positions=positions, pool=pool, pooler=True))
    embeddings = model.token_embedding(torch.arange(15).view(3, 5) % 9).detach()
    same(model, model.encode(embeddings, SEGMENTS, POSITIONS),
         model.pool(model(embeddings, SEGMENTS, POSITIONS), SEGMENTS))


@pytest.mark.parametrize("pool", ["class", "mean"])
@pytest.mark.parametrize("grids", [None, torch.tensor([[1, 2, 2], [1, 1, 2]])])
def test_a_picture(pool, grids):
    torch.manual_seed(0)
    config = VisionConfig(TransformerConfig(16, 2, 4), image_size=16, patch_size=8, class_token=True, pool=pool)
    model = VisionEncoder(config)
    images = torch.randn(2, 3, 16, 16)
    same(model, model.pool(model(images, grids=grids, pooled=True)), model.pool(model(images, grids=grids)))
    taps: list = []
    assert model(images, taps=taps, pooled=True).shape[1] == (1 if pool == "class" else 5)
    assert taps[0].shape[1] == 5
