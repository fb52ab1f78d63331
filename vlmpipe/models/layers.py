"""One transformer for pictures and words: CLIP, GPT-2, Llama and BERT differ in its config only.

Shapes: B batch, T tokens (queries), S tokens seen (keys, cache included), H heads, K width of a head, D width.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpipe.errors import UserError


class QuickGELU(nn.Module):
    """The sigmoid approximation that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
}
NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


@dataclass(frozen=True)
class TransformerConfig:
    """A stack of blocks. `hidden` is the width inside the feed-forward layer; 0 means four times `width`."""

    width: int
    depth: int
    heads: int
    kv_heads: int = 0  # 0: as many as heads
    hidden: int = 0
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    norm_place: Literal["pre", "post"] = "pre"
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu"] = "gelu"
    gated: bool = False
    bias: bool = True

    def __post_init__(self):
        for name in ("width", "depth", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: found {getattr(self, name)}; expected at least 1")
        if self.width % self.heads:
            raise UserError(f"heads: found {self.heads} for width {self.width}; expected a divisor of the width")
        if self.heads % (self.kv_heads or self.heads):
            raise UserError(f"kv_heads: found {self.kv_heads}; expected a divisor of heads ({self.heads})")

    @property
    def head_width(self) -> int:
        return self.width // self.heads


def build_norm(config: TransformerConfig) -> nn.Module:
    return NORMS[config.norm](config.width, eps=config.norm_eps)


@dataclass
class Cache:
    """Keys and values of every layer so far, and the segment of each position (see `visible`)."""

    keys: list[Tensor] = field(default_factory=list)  # each [B, H, S, K]
    values: list[Tensor] = field(default_factory=list)
    segments: Tensor | None = None  # [B, S]

    def __len__(self) -> int:
        return 0 if self.segments is None else self.segments.shape[1]

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append one layer's keys and values; returns all that the layer has now."""
        if layer == len(self.keys):
            self.keys.append(key)
            self.values.append(value)
        else:
            self.keys[layer] = torch.cat([self.keys[layer], key], dim=2)
            self.values[layer] = torch.cat([self.values[layer], value], dim=2)
        return self.keys[layer], self.values[layer]


def rotate(x_BHTK: Tensor, positions_BT: Tensor, theta: float) -> Tensor:
    """Rotary positions (arXiv 2104.09864) in the half-split layout that Llama checkpoints use."""
    half = x_BHTK.shape[-1] // 2
    frequencies = theta ** -(torch.arange(half, device=x_BHTK.device, dtype=torch.float32) / half)
    angles = positions_BT[:, None, :, None].float() * frequencies
    cos, sin = angles.cos().to(x_BHTK.dtype), angles.sin().to(x_BHTK.dtype)
    first, second = x_BHTK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Multi-head attention with one matrix for queries, keys and values."""

    def __init__(self, config: TransformerConfig, layer: int, rotary_theta: float | None):
        super().__init__()
        self.config, self.layer, self.rotary_theta = config, layer, rotary_theta
        self.kv_heads = config.kv_heads or config.heads
        self.sizes = [heads * config.head_width for heads in (config.heads, self.kv_heads, self.kv_heads)]
        self.qkv = nn.Linear(config.width, sum(self.sizes), bias=config.bias)
        self.out = nn.Linear(config.width, config.width, bias=config.bias)

    def forward(self, x_BTD, mask=None, positions_BT=None, cache: Cache | None = None, weights: list | None = None):
        query, key, value = (
            part.unflatten(-1, (-1, self.config.head_width)).transpose(1, 2)
            for part in self.qkv(x_BTD).split(self.sizes, dim=-1)
        )
        if self.rotary_theta is not None:
            query, key = (rotate(x, positions_BT, self.rotary_theta) for x in (query, key))
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
        grouped = self.kv_heads != self.config.heads
        if weights is None:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=grouped)
        else:
            mixed = attend_and_keep(query, key, value, mask, weights)
        return self.out(mixed.transpose(1, 2).flatten(2))


def attend_and_keep(query_BHTK, key_BHSK, value_BHSK, mask, weights: list) -> Tensor:
    """The same attention spelled out, for pictures of it: the [B, H, T, S] weights are appended to `weights`."""
    repeats = query_BHTK.shape[1] // key_BHSK.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key_BHSK, value_BHSK))
    scores = query_BHTK @ key.transpose(-1, -2) / math.sqrt(query_BHTK.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights.append(scores.softmax(dim=-1))
    return weights[-1] @ value


class FeedForward(nn.Module):
    """Two layers, or the gated three of Llama (arXiv 2002.05202)."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        hidden = config.hidden or 4 * config.width
        self.up = nn.Linear(config.width, hidden, bias=config.bias)
        self.gate = nn.Linear(config.width, hidden, bias=config.bias) if config.gated else None
        self.activation = ACTIVATIONS[config.activation]()
        self.down = nn.Linear(hidden, config.width, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention then feed-forward, each with a residual; norms before (GPT-2) or after (BERT)."""

    def __init__(self, config: TransformerConfig, layer: int, rotary_theta: float | None):
        super().__init__()
        self.pre = config.norm_place == "pre"
        self.attention_norm = build_norm(config)
        self.attention = Attention(config, layer, rotary_theta)
        self.feed_forward_norm = build_norm(config)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BTD: Tensor, **context) -> Tensor:
        if self.pre:
            x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), **context)
            return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))
        x_BTD = self.attention_norm(x_BTD + self.attention(x_BTD, **context))
        return self.feed_forward_norm(x_BTD + self.feed_forward(x_BTD))


class Transformer(nn.Module):
    """The stack. `rotary_theta` None leaves positions to whoever made the embeddings."""

    def __init__(self, config: TransformerConfig, rotary_theta: float | None = None):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config, layer, rotary_theta) for layer in range(config.depth))

    def forward(self, x_BTD: Tensor, **context) -> Tensor:
        for block in self.blocks:
            x_BTD = block(x_BTD, **context)
        return x_BTD


def initialize(module: nn.Module) -> None:
    """Weights that keep the size of what passes: std fan_in**-0.5, residual outputs scaled down by the depth of their
    stack (GPT-2), embeddings so that tied logits start at size one.

    A fixed 0.02, which is right for GPT-2's width, starves a narrow model of signal: at width 128 captioning takes
    twice the steps to the same loss.
    """
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            nn.init.normal_(part.weight, std=part.weight.shape[1] ** -0.5)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
    for stack in (part for part in module.modules() if isinstance(part, Transformer)):
        for block in stack.blocks:
            for output in (block.attention.out, block.feed_forward.down):
                output.weight.data /= math.sqrt(2 * stack.config.depth)
