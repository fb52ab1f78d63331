"""Models that look at a memory, of odd sizes, and plain formulas to compare them with."""

import math

import torch
import torch.nn.functional as F

from tests.models.tiny import TEXTS
from vlmpipe.config import parse
from vlmpipe.models import VLMConfig, build

TRANSFORMER = {"width": 24, "depth": 3, "heads": 3, "hidden": 40}
VISION = {"image_size": 16, "patch_size": 8, "transformer": {"width": 20, "depth": 1, "heads": 2, "hidden": 24}}
GATED = {
    "kind": "tanh", "every": 2, "first": 1, "heads": 2, "head_width": 6, "activation": "squared_relu", "bias": False,
}
RESAMPLER = {
    "latents": 3, "frames": 2,
    "transformer": {"width": 22, "depth": 2, "heads": 2, "hidden": 30, "bias": False, "activation": "squared_relu"},
}
HEADS = {"language_model": {}}
SMALL = {
    "flamingo": {
        "vision": VISION,
        "text": {"context": 32, "transformer": {**TRANSFORMER, "cross": GATED}},
        "fusion": {"kind": "cross", "resampler": RESAMPLER},
        "heads": HEADS,
    },
    "visualgpt": {
        "vision": VISION,
        "text": {"context": 32, "transformer": {**TRANSFORMER, "cross": {"kind": "complementary", "threshold": 0.3}}},
        "fusion": {"kind": "cross"},
        "heads": HEADS,
    },
    "simvlm": {
        "vision": {**VISION, "transformer": {"width": 20, "depth": 0, "heads": 2, "norm_place": "post"}},
        "encoder": {"context": 32, "causal": False, "transformer": {**TRANSFORMER, "depth": 2}},
        "text": {"context": 32, "transformer": {**TRANSFORMER, "depth": 2, "cross": {"kind": "plain"}}},
        "fusion": {"kind": "encoder_decoder"},
        "heads": HEADS,
    },
    "text-to-image": {
        "vision": None,
        "codes": {"size": 12, "image_size": 16, "patch_size": 8, "patches": 40},
        "encoder": {"context": 32, "causal": False, "transformer": {**TRANSFORMER, "width": 18, "depth": 1}},
        "text": {"context": 4, "transformer": {**TRANSFORMER, "depth": 2, "cross": {"kind": "plain"}}},
        "fusion": {"kind": "encoder_decoder"},
        "heads": {"image_tokens": {}},
    },
}


def make_small(name: str, seed: int = 0, **changes):
    """(model in eval mode, processor), whose gates are open and whose norms are not the identity."""
    model, processor = build(parse(VLMConfig, {**SMALL[name], **changes}, name), TEXTS, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    if model.codes is not None:
        model.codes.fit(torch.randint(0, 256, (12, 3, 16, 16), generator=generator, dtype=torch.uint8))
    return model.eval(), processor


def images(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)


def compare_gradients(found: torch.Tensor, expected: torch.Tensor, model) -> None:
    """Two ways to the same numbers give every parameter the same gradient, to 1e-5 of the largest."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = torch.autograd.grad((found * weight).sum(), parameters)
    theirs = torch.autograd.grad((expected * weight).sum(), parameters)
    for name, one, other in zip(names, ours, theirs, strict=True):
        assert other.abs().max() > 0, name
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item(), msg=name)


# --- formulas, for one row without a batch -----------------------------------------------------------------


def norm(x, part):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + part.eps).sqrt() * part.weight + part.bias


def attention(query, key, value, heads, seen=None):
    """[t, d] from [t, d], [s, d], [s, d]; `seen` [t, s]: a token that sees nothing gets zeros."""
    outputs = []
    for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
        scores = (q @ k.T / math.sqrt(q.shape[-1])).exp()
        scores = scores if seen is None else scores * seen
        outputs.append(scores @ v / scores.sum(-1, keepdim=True).clamp(min=1e-30))
    return torch.cat(outputs, -1)


def cross_attention(x, memory, part, heads, seen=None):
    key, value = F.linear(memory, part.key_value.weight, part.key_value.bias).chunk(2, -1)
    query = F.linear(x, part.query.weight, part.query.bias)
    return F.linear(attention(query, key, value, heads, seen), part.out.weight, part.out.bias)


def self_attention(x, part, heads, seen):
    query, key, value = F.linear(x, part.qkv.weight, part.qkv.bias).chunk(3, -1)
    return F.linear(attention(query, key, value, heads, seen), part.out.weight, part.out.bias)


def feed_forward(x, part, activation):
    hidden = activation(F.linear(x, part.up.weight, part.up.bias))
    return F.linear(hidden, part.down.weight, part.down.bias)


def squared_relu(x):
    return x.clamp(min=0) ** 2


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
