"""One transformer for pictures and words: CLIP, GPT-2, Llama, Qwen and BERT differ in its config only.

Shapes: B batch, T tokens (queries), S tokens seen (keys, cache included), H heads, K width of a head, D width,
M tokens of a memory that is looked at (of pictures, or of an encoder), C its width.
"""

import math
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmpipe.errors import UserError


class QuickGELU(nn.Module):
    """The sigmoid approximation that OpenAI's CLIP was trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SquaredReLU(nn.Module):
    """Primer's (arXiv 2109.08668), which Flamingo's new layers have."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "quick_gelu": QuickGELU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "squared_relu": SquaredReLU,
}
Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "squared_relu"]
NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


@dataclass(frozen=True)
class CrossConfig:
    """Attention to a memory in every `every`-th block, from block `first` on.

    plain: after the self-attention, as in an encoder-decoder (arXiv 1706.03762). tanh: before the block, with a
    feed-forward of its own, both behind gates that start closed (Flamingo, arXiv 2204.14198). complementary: what is
    seen and what was said are weighed against each other, and gates under `threshold` shut (VisualGPT's
    self-resurrecting units, arXiv 2102.10407).

    Its layers are built as the stack's own, but for what the other fields say: 0 and null are the stack's.
    """

    kind: Literal["plain", "tanh", "complementary"] = "plain"
    every: int = 1
    first: int = 0
    threshold: float = 0.2  # of complementary gates
    heads: int = 0
    head_width: int = 0
    hidden: int = 0
    activation: Activation | None = None
    gated: bool | None = None
    bias: bool | None = None

    def __post_init__(self):
        if self.every < 1 or self.first < 0:
            raise UserError(f"cross: found every {self.every}, first {self.first}; expected at least 1 and 0")
        if not 0 <= self.threshold < 0.5:
            raise UserError(f"cross.threshold: found {self.threshold}; expected at least 0 and under 0.5")

    def at(self, layer: int) -> bool:
        return layer >= self.first and (layer - self.first) % self.every == 0


@dataclass(frozen=True)
class TransformerConfig:
    """A stack of blocks. 0 for `kv_heads` means as many as `heads`, for `head_width` width / heads, for `hidden` (the
    width inside the feed-forward layer) four times `width`; null for `qkv_bias` the same as `bias`."""

    width: int
    depth: int
    heads: int
    kv_heads: int = 0
    head_width: int = 0
    hidden: int = 0
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    norm_place: Literal["pre", "post"] = "pre"
    activation: Activation = "gelu"
    gated: bool = False
    bias: bool = True
    qkv_bias: bool | None = None  # Qwen2 has it without any other
    head_norm: bool = False  # RMS norm of each query and key, as in Qwen3
    unturned: int = 0  # every n-th layer goes without rotary positions, as in SmolLM3; 0: none does
    dropout: float = 0.0  # of what attention and feed-forward add
    cross: CrossConfig | None = None

    def __post_init__(self):
        for name, least in (("width", 1), ("depth", 0), ("heads", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: found {getattr(self, name)}; expected at least {least}")
        if self.width % self.heads and not self.head_width:
            raise UserError(f"heads: found {self.heads} for width {self.width}; expected a divisor of the width")
        if self.heads % (self.kv_heads or self.heads):
            raise UserError(f"kv_heads: found {self.kv_heads}; expected a divisor of heads ({self.heads})")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout: found {self.dropout}; expected at least 0 and under 1")

    @property
    def per_head(self) -> int:
        """Width of one head."""
        return self.head_width or self.width // self.heads


def cross_config(config: TransformerConfig) -> TransformerConfig:
    """The stack's config as its cross-attention layers take it."""
    cross = config.cross
    changes = {name: getattr(cross, name) for name in ("activation", "gated", "bias")}
    changes = {name: value for name, value in changes.items() if value is not None}
    if cross.heads or cross.head_width:
        changes |= {"heads": cross.heads or config.heads, "kv_heads": 0, "head_width": cross.head_width}
    return replace(config, hidden=cross.hidden or config.hidden, **changes)


def build_norm(config: TransformerConfig) -> nn.Module:
    return NORMS[config.norm](config.width, eps=config.norm_eps)


@dataclass
class Cache:
    """Keys and values of every layer so far, and the segment of each position (see `visible`).

    With `room`, each layer gets that many positions more than its first call fills, and what comes is written in
    place: nothing is copied from word to word. No gradient flows then.
    """

    room: int = 0
    keys: list[Tensor] = field(default_factory=list)  # each [B, H, S, K], with `room` longer than what is filled
    values: list[Tensor] = field(default_factory=list)
    filled: list[int] = field(default_factory=list)  # S of each layer
    segments: Tensor | None = None  # [B, S]
    memory: Any = None  # what cross-attention looks at, made by the first call (see `fusion`)
    offset: Any = 0  # [B, 1] or 0: how far what stands before the words pushes their positions

    def __len__(self) -> int:
        return 0 if self.segments is None else self.segments.shape[1]

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append one layer's keys and values; returns all that the layer has now."""
        if layer == len(self.keys):
            self.keys.append(with_room(key, self.room))
            self.values.append(with_room(value, self.room))
            self.filled.append(key.shape[2])
            return key, value
        start, self.filled[layer] = self.filled[layer], self.filled[layer] + key.shape[2]
        for kept, new in ((self.keys, key), (self.values, value)):
            if kept[layer].shape[2] < self.filled[layer]:
                kept[layer] = torch.cat([kept[layer][:, :, :start], new], dim=2)
            else:
                kept[layer][:, :, start : self.filled[layer]] = new
        return self.keys[layer][:, :, : self.filled[layer]], self.values[layer][:, :, : self.filled[layer]]

    def select(self, rows: Tensor) -> None:
        """Keep these rows [B'] in this order; a row may come several times."""
        for kept in (self.keys, self.values):
            kept[:] = [tensor.index_select(0, rows) for tensor in kept]
        self.segments = self.segments.index_select(0, rows)
        self.offset, self.memory = rows_of(self.offset, rows), rows_of(self.memory, rows)


def with_room(tensor_BHSK: Tensor, room: int) -> Tensor:
    return F.pad(tensor_BHSK, (0, 0, 0, room)) if room else tensor_BHSK


def rows_of(value: Any, rows: Tensor) -> Any:
    """The chosen rows of every tensor in what a fusion keeps for later words."""
    if isinstance(value, Tensor):
        return value.index_select(0, rows)
    if isinstance(value, (list, tuple)):
        return type(value)(rows_of(part, rows) for part in value)
    if is_dataclass(value):
        return replace(value, **{part.name: rows_of(getattr(value, part.name), rows) for part in fields(value)})
    return value


@dataclass(frozen=True)
class RotaryConfig:
    """Rotary positions (arXiv 2104.09864). `sections`: how many of the K / 2 frequencies turn with each of several
    position numbers (time, y, x in Qwen2-VL, arXiv 2409.12191); empty: one number turns all."""

    theta: float = 10000.0
    sections: tuple[int, ...] = ()


def rotary_table(positions: Tensor, per_head: int, config: RotaryConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, T, K / 2] for positions [B, T], or [B, T, sections] where there are several; one number
    where several are expected stands for all of them."""
    half = per_head // 2
    rates = config.theta ** -(torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    if config.sections and positions.ndim == 3:
        which = torch.arange(len(config.sections), device=positions.device)
        which = which.repeat_interleave(torch.tensor(config.sections, device=positions.device))
        turns = positions.float()[..., which]
    else:
        turns = positions.float()[..., None]
    angles = (turns * rates)[:, None]
    return angles.cos(), angles.sin()


def rotate(x_BHTK: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn queries or keys, in the half-split layout that Llama checkpoints use."""
    cos, sin = (part.to(x_BHTK.dtype) for part in table)
    first, second = x_BHTK.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def taken(x_BTD: Tensor, only_B: Tensor | None) -> Tensor:
    """[B, 1, ...]: the one place of each row that is wanted; None: all of them."""
    return x_BTD if only_B is None else x_BTD[torch.arange(len(x_BTD), device=x_BTD.device), only_B][:, None]


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values."""

    def __init__(self, config: TransformerConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        self.turned = not config.unturned or (layer + 1) % config.unturned != 0
        self.kv_heads = config.kv_heads or config.heads
        self.sizes = [heads * config.per_head for heads in (config.heads, self.kv_heads, self.kv_heads)]
        bias = config.bias if config.qkv_bias is None else config.qkv_bias
        self.qkv = nn.Linear(config.width, sum(self.sizes), bias=bias)
        self.query_norm = nn.RMSNorm(config.per_head, eps=config.norm_eps) if config.head_norm else None
        self.key_norm = nn.RMSNorm(config.per_head, eps=config.norm_eps) if config.head_norm else None
        self.out = nn.Linear(self.sizes[0], config.width, bias=config.bias)

    def forward(
        self, x_BTD, mask=None, rotary=None, cache: Cache | None = None, weights: list | None = None, spans=None,
        only_B: Tensor | None = None,
    ):
        """`spans`: who sees whom instead of a mask, see `attend_within`. `only_B`: the one place of each row that
        looks; all are seen."""
        query, key, value = (
            part.unflatten(-1, (-1, self.config.per_head)).transpose(1, 2)
            for part in self.qkv(x_BTD).split(self.sizes, dim=-1)
        )
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotary is not None and self.turned:
            query, key = rotate(query, rotary), rotate(key, rotary)
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
        if spans is not None:
            return self.out(attend_within(query, key, value, spans).transpose(1, 2).flatten(2))
        if only_B is not None:
            query = taken(query.transpose(1, 2), only_B).transpose(1, 2)
            mask = mask if mask is None or mask.shape[2] == 1 else taken(mask[:, 0], only_B)[:, None]
        return self.out(attend(query, key, value, mask, weights).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention from tokens [B, T, D] to a memory [B, M, C]."""

    def __init__(self, config: TransformerConfig, memory_width: int):
        super().__init__()
        self.config = config
        inner = config.heads * config.per_head
        self.query = nn.Linear(config.width, inner, bias=config.bias)
        self.key_value = nn.Linear(memory_width, 2 * inner, bias=config.bias)
        self.out = nn.Linear(inner, config.width, bias=config.bias)

    def forward(self, x_BTD: Tensor, memory_BMC: Tensor, mask: Tensor | None = None, weights: list | None = None):
        """`mask` [B, 1, T, M] true where a token may look; a token that may look nowhere gets zeros."""
        key, value = self.key_value(memory_BMC).chunk(2, dim=-1)
        query, key, value = (
            part.unflatten(-1, (-1, self.config.per_head)).transpose(1, 2) for part in (self.query(x_BTD), key, value)
        )
        nowhere = None
        if mask is not None:
            # A softmax over nothing is NaN: such a token looks everywhere and what it saw is taken away again.
            nowhere = ~mask.any(dim=-1, keepdim=True)
            mask = mask | nowhere
        mixed = attend(query, key, value, mask, weights)
        if nowhere is not None:
            mixed = mixed.masked_fill(nowhere, 0.0)
        return self.out(mixed.transpose(1, 2).flatten(2))


def attend(query_BHTK, key_BHSK, value_BHSK, mask, weights: list | None) -> Tensor:
    """[B, H, T, K]; where `weights` is a list, the attention is spelled out and appended to it."""
    if weights is not None:
        return attend_and_keep(query_BHTK, key_BHSK, value_BHSK, mask, weights)
    grouped = key_BHSK.shape[1] != query_BHTK.shape[1]
    return F.scaled_dot_product_attention(query_BHTK, key_BHSK, value_BHSK, attn_mask=mask, enable_gqa=grouped)


def attend_within(query_BHTK, key_BHTK, value_BHTK, spans: tuple[tuple[int, int], ...]) -> Tensor:
    """[B, H, T, K] where the row is cut into spans that see nothing but themselves: `spans` are (how many, how long),
    one after another. Spans of a length are one batch without a mask."""
    sizes = [count * length for count, length in spans]
    parts = []
    for (count, length), *pieces in zip(
        spans, *(x.split(sizes, dim=2) for x in (query_BHTK, key_BHTK, value_BHTK)), strict=True
    ):
        folded = (x.unflatten(2, (count, length)).transpose(1, 2).flatten(0, 1) for x in pieces)
        mixed = attend(*folded, None, None).unflatten(0, (-1, count)).transpose(1, 2)
        parts.append(mixed.flatten(2, 3))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


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


@dataclass(frozen=True)
class Memory:
    """What cross-attention looks at: tokens [B, M, C], and who may see which, [B, 1, T, M] or None for all."""

    tokens: Tensor
    mask: Tensor | None = None


class Block(nn.Module):
    """Attention then feed-forward, each with a residual; norms before (GPT-2) or after (BERT)."""

    def __init__(self, config: TransformerConfig, layer: int, memory_width: int):
        super().__init__()
        self.pre = config.norm_place == "pre"
        self.attention_norm = build_norm(config)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = build_norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        crossed = config.cross is not None and config.cross.at(layer)
        self.cross = CROSSES[config.cross.kind](cross_config(config), memory_width) if crossed else None

    def forward(
        self, x_BTD: Tensor, memory: Memory | None = None, looks: list | None = None, only_B: Tensor | None = None,
        **context,
    ) -> Tensor:
        """`looks`: a list to which cross-attention appends its weights [B, H, T, M]. `only_B`: see `Transformer`."""
        if self.cross is not None and self.cross.before:
            x_BTD = self.cross(x_BTD, memory, looks)
        if self.pre:
            mixed = self.attention(self.attention_norm(x_BTD), only_B=only_B, **context)
            x_BTD = taken(x_BTD, only_B) + self.dropout(mixed)
        else:
            mixed = self.attention(x_BTD, only_B=only_B, **context)
            x_BTD = self.attention_norm(taken(x_BTD, only_B) + self.dropout(mixed))
        if self.cross is not None and not self.cross.before:
            x_BTD = self.cross(x_BTD, memory, looks)
        if self.pre:
            return x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))
        return self.feed_forward_norm(x_BTD + self.dropout(self.feed_forward(x_BTD)))


class Plain(nn.Module):
    """Cross-attention with a residual, as in an encoder-decoder."""

    before = False  # the self-attention

    def __init__(self, config: TransformerConfig, memory_width: int):
        super().__init__()
        self.pre = config.norm_place == "pre"
        self.norm, self.attention = build_norm(config), CrossAttention(config, memory_width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, memory: Memory, looks: list | None) -> Tensor:
        if self.pre:
            return x_BTD + self.dropout(self.attention(self.norm(x_BTD), memory.tokens, memory.mask, looks))
        return self.norm(x_BTD + self.dropout(self.attention(x_BTD, memory.tokens, memory.mask, looks)))


class TanhGated(nn.Module):
    """Flamingo's layer (arXiv 2204.14198, figure 4): at gates of zero the language model is unchanged to the bit."""

    before = True  # the self-attention

    def __init__(self, config: TransformerConfig, memory_width: int):
        super().__init__()
        self.attention_norm, self.attention = build_norm(config), CrossAttention(config, memory_width)
        self.feed_forward_norm, self.feed_forward = build_norm(config), FeedForward(config)
        self.attention_gate, self.feed_forward_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x_BTD: Tensor, memory: Memory, looks: list | None) -> Tensor:
        seen = self.attention(self.attention_norm(x_BTD), memory.tokens, memory.mask, looks)
        x_BTD = x_BTD + self.attention_gate.tanh() * seen
        return x_BTD + self.feed_forward_gate.tanh() * self.feed_forward(self.feed_forward_norm(x_BTD))


class Complementary(nn.Module):
    """VisualGPT's self-resurrecting activation unit (arXiv 2102.10407, equations 3 to 6).

    With g = sigmoid(x), visual gate g where g > threshold, else 0; language gate 1 - g where that is over the
    threshold, else 0. A gate that shut opens again, for the other one still carries x and its gradient.

    That is the paper. The authors' code (Vision-CAIR/VisualGPT) computes g from a linear layer over x and what was
    seen, gives it to the language side and 1 - g to the visual one, does so for the outputs of three encoder layers
    and adds them up over the root of three; it also shares this norm with the self-attention's.
    """

    before = False  # the self-attention

    def __init__(self, config: TransformerConfig, memory_width: int):
        super().__init__()
        self.threshold = config.cross.threshold
        self.norm, self.attention = build_norm(config), CrossAttention(config, memory_width)

    def forward(self, x_BTD: Tensor, memory: Memory, looks: list | None) -> Tensor:
        seen = self.attention(self.norm(x_BTD), memory.tokens, memory.mask, looks)
        gate = x_BTD.sigmoid()
        visual = gate * (gate > self.threshold)
        language = (1 - gate) * (1 - gate > self.threshold)
        return visual * seen + language * x_BTD


CROSSES = {"plain": Plain, "tanh": TanhGated, "complementary": Complementary}


class Transformer(nn.Module):
    """The stack. `memory_width`: width of what cross-attention looks at; 0: the stack's own."""

    def __init__(self, config: TransformerConfig, memory_width: int = 0):
        super().__init__()
        self.config = config
        memory_width = memory_width or config.width
        self.blocks = nn.ModuleList(Block(config, layer, memory_width) for layer in range(config.depth))

    def forward(
        self, x_BTD: Tensor, taps: list | None = None, until: int | None = None, only_B: Tensor | None = None, **context
    ) -> Tensor:
        """`taps`: a list to which the output of each block is appended. `until`: the first block that does not run,
        counted from the end if below 0. `only_B`: the one place of each row that is wanted, [B, 1, D]; the last block
        computes no other, which saves three quarters of it. The rest goes to every block."""
        blocks = self.blocks[:until]
        for number, block in enumerate(blocks, start=1):
            x_BTD = block(x_BTD, only_B=only_B if number == len(blocks) else None, **context)
            if taps is not None:
                taps.append(x_BTD)
        return x_BTD if len(blocks) else taken(x_BTD, only_B)


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
            outputs = [part.out for part in block.modules() if isinstance(part, (Attention, CrossAttention))]
            outputs += [part.down for part in block.modules() if isinstance(part, FeedForward)]
            for output in outputs:
                output.weight.data /= math.sqrt(2 * stack.config.depth)
