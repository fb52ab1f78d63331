"""ViLBERT's two streams against a plain reference from the paper's equations (arXiv 1908.02265, section 2)."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.models.joined import batch, make
from vlmpipe.errors import UserError
from vlmpipe.models.fusion import Inputs


def attend(block, queries, others, real, heads):
    """softmax(Q K' / sqrt(d_k)) V by heads, with keys and values of `others`, of which `real` [B, S] count."""
    width = block.query.weight.shape[0] // heads
    query = block.query(queries)
    key, value = block.key_value(others).chunk(2, dim=-1)
    mixed = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(width)
        scores = scores.masked_fill(~real[:, None], -1e9)
        mixed.append(scores.softmax(dim=-1) @ value[..., part])
    return block.out(torch.cat(mixed, dim=-1))


def self_attend(attention, x, real):
    """The same within a stream."""
    query, key, value = attention.qkv(x).chunk(3, dim=-1)
    width = attention.config.per_head
    mixed = []
    for head in range(attention.config.heads):
        part = slice(head * width, (head + 1) * width)
        scores = query[..., part] @ key[..., part].transpose(1, 2) / math.sqrt(width)
        scores = scores.masked_fill(~real[:, None], -1e9)
        mixed.append(scores.softmax(dim=-1) @ value[..., part])
    return attention.out(torch.cat(mixed, dim=-1))


def feed(layer, x):
    return layer.feed_forward_norm(x + layer.feed_forward.down(F.gelu(layer.feed_forward.up(x))))


def trm(block, x, real):
    """An encoder block of BERT."""
    return feed(block, block.attention_norm(x + self_attend(block.attention, x, real)))


def co_trm(half, x, other, real, heads):
    """A block with the other stream's keys and values."""
    return feed(half, half.cross.norm(x + attend(half.cross.attention, x, other, real, heads)))


def reference(model, inputs, grids_real):
    """Text TRM, then Co-TRM and TRM by turns in both streams; the product of what stands for the whole of each."""
    text, fusion, vision = model.text, model.fusion, model.vision
    real = inputs["segments"] != 0
    words = text.embedding_norm(
        text.token_embedding(inputs["tokens"])
        + text.position_embedding(inputs["positions"])
        + text.type_embedding.weight[0]
    )
    tokens = vision(inputs["images"])
    regions = fusion.embedding_norm(fusion.projector(tokens))
    first, last = text.transformer.blocks
    words = trm(first, words, real)
    regions = trm(fusion.image.blocks[0], regions, grids_real)
    layer = fusion.layers[0]
    words, regions = (
        co_trm(layer.text, words, regions, grids_real, 2),
        co_trm(layer.image, regions, words, real, 2),
    )
    words, regions = trm(last, words, real), trm(fusion.image.blocks[1], regions, grids_real)
    pooled = fusion.text_pooler(words[:, 0]).relu() * fusion.image_pooler(regions[:, 0]).relu()
    return words, regions[:, 1:], pooled


def test_outputs_and_gradients_equal_the_papers_equations():
    model, processor = make("co_attention")
    inputs = batch(processor)
    real = inputs["segments"] != 0
    results, gradients = [], []
    for run in (
        lambda: reference(model, inputs, torch.ones(4, 17, dtype=torch.bool)),
        lambda: fused_of(model, inputs),
    ):
        model.zero_grad()
        words, regions, pooled = run()
        weight = torch.arange(pooled.numel()).view_as(pooled)
        loss = (words[real] ** 2).sum() + (regions**3).sum() + (pooled * weight).sum()
        loss.backward()
        results.append((words[real], regions, pooled))
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for expected, found in zip(*results, strict=True):
        assert ((found - expected).abs().max() / expected.abs().max()).item() <= 1e-5
    assert gradients[0].keys() == gradients[1].keys()
    assert {name.split(".")[0] for name in gradients[0]} == {"vision", "text", "fusion"}
    largest = max(value.abs().max() for value in gradients[0].values())
    for name, expected in gradients[0].items():
        scale = max(expected.abs().max(), 0.01 * largest)
        assert ((gradients[1][name] - expected).abs().max() / scale).item() <= 1e-5, name


def fused_of(model, inputs):
    fused = model.fusion(model.vision, model.text, Inputs(**inputs))
    return fused.text, fused.image, fused.pooled


def test_padding_changes_nothing_and_looks_are_told():
    model, processor = make("co_attention")
    inputs, looks = batch(processor), []
    together = model(**inputs, looks=looks, heads=("matching",)).matching
    assert [tuple(each.shape) for each in looks] == [(4, 2, inputs["tokens"].shape[1], 17)]
    length = int((inputs["segments"][2] != 0).sum())
    alone = {name: value[[2]] if name == "images" else value[[2], :length] for name, value in inputs.items()}
    torch.testing.assert_close(model(**alone, heads=("matching",)).matching, together[[2]])


@pytest.mark.parametrize("vision", [
    {"regions": 6},
    {"image_size": 32, "patch_size": 8, "transformer": {"width": 20, "depth": 1, "heads": 2}},
])
def test_a_picture_with_less_is_the_same_alone_and_filled_up(vision):
    model, processor = make("co_attention", vision=vision)
    inputs = {name: value[:2] for name, value in batch(processor).items()}
    if "regions" in vision:
        images, grids = torch.randn(2, 5, 6), torch.tensor([[1, 1, 5], [1, 1, 3]])
        small = images[1:, :3]
    else:
        images, grids = torch.randn(2, 3, 32, 32), torch.tensor([[1, 4, 4], [1, 3, 2]])
        small = images[1:, :, :24, :16]
    together = model(**{**inputs, "images": images}, grids=grids, heads=("matching",)).matching
    alone = {**{name: value[1:] for name, value in inputs.items()}, "images": small}
    torch.testing.assert_close(model(**alone, heads=("matching",)).matching, together[1:])


def test_a_text_or_a_picture_alone_is_refused():
    model, processor = make("co_attention")
    inputs = batch(processor)
    with pytest.raises(UserError, match="expected both"):
        model(images=inputs.pop("images"))
    with pytest.raises(UserError, match="expected both"):
        model(**inputs)
    with pytest.raises(UserError, match="found 2 pictures for 4 texts"):
        model(**inputs, images=torch.zeros(2, 3, 32, 32), image_rows=torch.tensor([0, 1]))
