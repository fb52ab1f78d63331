"""Qwen2.5-VL (arXiv 2502.13923): pictures and videos at their own sizes, Qwen2 with positions in three axes."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.fusion import FusionConfig
from vlmpipe.models.heads import HeadsConfig, LanguageModelConfig
from vlmpipe.models.layers import TransformerConfig
from vlmpipe.models.native import NativeConfig
from vlmpipe.models.places import row_positions, token_count
from vlmpipe.models.pretrained import llama
from vlmpipe.models.pretrained.family import Family, Inputs, Names, Theirs, activation, activation_name, require, square
from vlmpipe.models.pretrained.keys import KeyMap, Reshape, one, pair, prefixed, repeat
from vlmpipe.models.vision import VisionConfig
from vlmpipe.models.vlm import VLMConfig

EPS = 1e-6  # of all norms of the tower; no config says it
# Of its image processor, in tokens of a picture: a directory's own processor may say otherwise.
LEAST, MOST, SIDE = 4, 1280, 36


# --- configs ---------------------------------------------------------------------------------------------


def read_tower(theirs: Theirs) -> VisionConfig:
    require(theirs, in_channels=3)
    rope = theirs.get("rope_parameters") or {}
    require(rope, rope_type="axial")
    patch, merge = square(theirs["patch_size"], "patch_size"), theirs["spatial_merge_size"]
    transformer = TransformerConfig(
        width=theirs["hidden_size"],
        depth=theirs["depth"],
        heads=theirs["num_heads"],
        hidden=theirs["intermediate_size"],
        norm="rms",
        norm_eps=EPS,
        activation=activation(theirs["hidden_act"]),
        gated=True,
    )
    token = patch * merge
    native = NativeConfig(
        merge=merge,
        frames=square(theirs["temporal_patch_size"], "temporal_patch_size"),
        window=theirs["window_size"],
        full_layers=tuple(theirs["fullatt_block_indexes"]),
        theta=float(rope.get("rope_theta", 10000.0)),
        min_pixels=LEAST * token**2,
        max_pixels=MOST * token**2,
        tokens_per_second=float(theirs["tokens_per_second"]),
    )
    return VisionConfig(
        transformer, native=native, image_size=SIDE * token, patch_size=patch, stem_bias=False, positions="none"
    )


def read(theirs: Theirs, names: Names = frozenset()) -> VLMConfig:
    text = theirs["text_config"]
    require(theirs["vision_config"], out_hidden_size=text["hidden_size"])
    sections = tuple(text["rope_parameters"].get("mrope_section", (16, 24, 24)))
    return VLMConfig(
        vision=read_tower(theirs["vision_config"]),
        text=replace(llama.read_qwen2(text), rotary_sections=sections),
        fusion=FusionConfig("prefix", projector="merger"),
        heads=HeadsConfig(language_model=LanguageModelConfig(tied=theirs["tie_word_embeddings"])),
    )


def write_tower(config: VisionConfig, text_width: int) -> dict[str, Any]:
    transformer, native = config.transformer, config.native
    return {
        "hidden_size": transformer.width,
        "depth": transformer.depth,
        "num_heads": transformer.heads,
        "intermediate_size": transformer.hidden or 4 * transformer.width,
        "hidden_act": activation_name(transformer.activation),
        "patch_size": config.patch_size,
        "spatial_merge_size": native.merge,
        "temporal_patch_size": native.frames,
        "window_size": native.window,
        "fullatt_block_indexes": list(native.full_layers),
        "tokens_per_second": int(native.tokens_per_second),
        "out_hidden_size": text_width,
        "rope_parameters": {"rope_type": "axial", "rope_theta": native.theta},
    }


def write(config: VLMConfig) -> dict[str, Any]:
    if config.fusion.kind != "prefix" or config.vision.native is None or config.heads.language_model is None:
        raise UserError("model: found no vision.native before a language model; expected fusion 'prefix'")
    text = llama.write_llama(config.text)
    del text["head_dim"], text["attention_bias"], text["mlp_bias"]
    text["rope_parameters"] |= {"mrope_section": list(config.text.rotary_sections)}
    return {
        "vision_config": write_tower(config.vision, config.text.transformer.width),
        "text_config": text,
        "tie_word_embeddings": config.heads.language_model.tied,
    }


# --- keys ------------------------------------------------------------------------------------------------


def tower_keys(config: VisionConfig) -> KeyMap:
    ours, theirs = "transformer.blocks.{i}", "blocks.{i}"
    width, frames, size = config.transformer.width, config.native.frames, config.patch_size
    blocks = {
        **pair(f"{ours}.attention_norm", f"{theirs}.norm1", bias=False),
        **pair(f"{ours}.attention.qkv", f"{theirs}.attn.qkv"),
        **pair(f"{ours}.attention.out", f"{theirs}.attn.proj"),
        **pair(f"{ours}.feed_forward_norm", f"{theirs}.norm2", bias=False),
        **pair(f"{ours}.feed_forward.gate", f"{theirs}.mlp.gate_proj"),
        **pair(f"{ours}.feed_forward.up", f"{theirs}.mlp.up_proj"),
        **pair(f"{ours}.feed_forward.down", f"{theirs}.mlp.down_proj"),
    }
    shapes = (width, 3 * frames * size**2), (width, 3, frames, size, size)
    return {
        "stem.weight": one("patch_embed.proj.weight", Reshape(*shapes)),
        **repeat(blocks, config.transformer.depth),
        **pair("norm", "merger.ln_q", bias=False),
    }


def keys(config: VLMConfig) -> KeyMap:
    found = {
        **prefixed(tower_keys(config.vision), "vision.", "model.visual."),
        **prefixed(llama.keys(config.text), "text.", "model.language_model."),
        **pair("fusion.projector.0", "model.visual.merger.mlp.0"),
        **pair("fusion.projector.2", "model.visual.merger.mlp.2"),
    }
    if not config.heads.language_model.tied:
        found["language_model.output.weight"] = one("lm_head.weight")
    return found


# --- parity ----------------------------------------------------------------------------------------------

PICTURES = ((1, 4, 6), (1, 2, 2), (1, 10, 8))
VIDEOS = ((2, 6, 4),)
SECONDS = 0.5  # between two patches of the video


def inputs(theirs: Theirs, processor: Any) -> Inputs:
    """Rows with two pictures, with a picture and a video, and with neither, padded on the right; noise of odd sizes."""
    vision, text = theirs["vision_config"], theirs["text_config"]
    merge, marks = vision["spatial_merge_size"], (theirs["image_token_id"], theirs["video_token_id"])
    values = 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2

    def said(length: int) -> Tensor:
        tokens = torch.randint(9, text["vocab_size"] - 2, (length,))
        return torch.where((tokens == marks[0]) | (tokens == marks[1]), 9, tokens)

    images = [torch.full((token_count(grid, merge),), marks[0]) for grid in PICTURES]
    video = torch.full((token_count(VIDEOS[0], merge),), marks[1])
    rows = [
        torch.cat([said(2), images[0], said(1), images[1], said(3)]),
        said(7),
        torch.cat([said(1), video, said(2), images[2], said(2)]),
    ]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    real = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    return {
        "input_ids": tokens,
        "attention_mask": real.long(),
        "mm_token_type_ids": (tokens == marks[0]).int() + 2 * (tokens == marks[1]).int(),
        "pixel_values": torch.randn(patches(PICTURES), values),
        "pixel_values_videos": torch.randn(patches(VIDEOS), values),
        "image_grid_thw": torch.tensor(PICTURES),
        "video_grid_thw": torch.tensor(VIDEOS),
        "second_per_grid_ts": torch.tensor([SECONDS] * len(VIDEOS)),
    }


def patches(grids: tuple[tuple[int, int, int], ...]) -> int:
    return sum(t * y * x for t, y, x in grids)


def in_order(given: Inputs, merge: int) -> Iterator[tuple[int, int]]:
    """(kind, number) of each picture (1) and video (2) as they stand in the rows."""
    grids = {1: given["image_grid_thw"].tolist(), 2: given["video_grid_thw"].tolist()}
    used = {1: 0, 2: 0}
    for row in given["mm_token_type_ids"].tolist():
        at = 0
        while at < len(row):
            if kind := row[at]:
                yield kind, used[kind]
                at += token_count(grids[kind][used[kind]], merge)
                used[kind] += 1
            else:
                at += 1


def found(model: Any, given: Inputs) -> dict[str, Tensor]:
    """Pictures and videos are one list for us, in the order of the rows."""
    native = model.config.vision.native
    pixels = {1: given["pixel_values"], 2: given["pixel_values_videos"]}
    shapes = {1: given["image_grid_thw"], 2: given["video_grid_thw"]}
    parts = {kind: pixels[kind].split(shapes[kind].prod(dim=1).tolist()) for kind in pixels}
    order = list(in_order(given, native.merge))
    grids = [tuple(shapes[kind][number].tolist()) for kind, number in order]
    seconds = given["second_per_grid_ts"].tolist()
    steps = [native.tokens_per_second * seconds[number] if kind == 2 else 1.0 for kind, number in order]
    real, places = given["attention_mask"], given["mm_token_type_ids"] > 0
    outputs = model(
        torch.cat([parts[kind][number] for kind, number in order]), given["input_ids"], real,
        row_positions(real, places, grids, native.merge, steps), image_places=places, grids=torch.tensor(grids),
    )
    return {"logits": outputs.logits[real.bool()]}


def expected(model: Any, given: Inputs) -> dict[str, Tensor]:
    return {"logits": model(**given).logits[given["attention_mask"].bool()]}


TINY = {
    "image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8,
    "vision_config": {
        "hidden_size": 24, "depth": 4, "num_heads": 3, "intermediate_size": 40, "patch_size": 5, "window_size": 20,
        "fullatt_block_indexes": [1, 3], "out_hidden_size": 24,
    },
    "text_config": {
        **llama.TINY, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 99,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 3]},
    },
}

QWEN25_VL = Family(
    "Qwen2_5_VLForConditionalGeneration", VLMConfig, read, write, keys, inputs, found, expected, TINY,
    ignored=(r"lm_head\.weight",), image_processor="Qwen2VLImageProcessorPil",
)
