"""CLIPSeg (arXiv 2112.10003): CLIP and a decoder that marks what a phrase means."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.heads import MaskConfig
from vlmpipe.models.pretrained import clip
from vlmpipe.models.pretrained.family import Family, Inputs, Names, Theirs, qkv
from vlmpipe.models.pretrained.keys import KeyMap, pair, prefixed, repeat
from vlmpipe.models.vlm import VLMConfig

# As its preprocessing has them: ImageNet's, not CLIP's.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH = 16  # whose pixels their refined transposed convolution gives; with any other, masks are of another size


def read(theirs: Theirs, names: Names = frozenset()) -> VLMConfig:
    refined = theirs["use_complex_transposed_convolution"]
    mask = MaskConfig(
        taps=tuple(theirs["extract_layers"]),
        width=theirs["reduce_dim"],
        heads=theirs["decoder_num_attention_heads"],
        hidden=theirs["decoder_intermediate_size"],
        film=theirs["conditional_layer"],
        upsample="refined" if refined else "simple",
    )
    base = clip.read_whole(theirs)
    config = replace(
        base, vision=replace(base.vision, mean=MEAN, std=STD), heads=replace(base.heads, mask=mask)
    )
    check(config)
    return config


def check(config: VLMConfig) -> None:
    """Raise `UserError` where theirs has no such decoder."""
    if config.heads.mask is None:
        raise UserError("heads: found no mask; expected heads.mask, as CLIPSeg has")
    if config.heads.mask.upsample == "refined" and config.vision.patch_size != PATCH:
        raise UserError(
            f"patch_size: found {config.vision.patch_size} with the refined decoder; expected {PATCH}; elsewhere "
            f"CLIPSeg's masks are not as large as the picture"
        )


def write(config: VLMConfig) -> dict[str, Any]:
    check(config)
    mask = config.heads.mask
    return {
        **clip.write_whole(config),
        "extract_layers": list(mask.taps),
        "reduce_dim": mask.width,
        "decoder_num_attention_heads": mask.heads,
        "decoder_intermediate_size": mask.hidden,
        "conditional_layer": mask.film,
        "use_complex_transposed_convolution": mask.upsample == "refined",
    }


def decoder_keys(mask: MaskConfig) -> KeyMap:
    ours, theirs = "transformer.blocks.{i}", "layers.{i}"
    attention = f"{theirs}.self_attn"
    projections = (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")
    blocks = {
        **pair("reduce.{i}", "reduces.{i}"),
        **qkv(mask.transformer(), f"{ours}.attention.qkv", projections),
        **pair(f"{ours}.attention.out", f"{attention}.out_proj"),
        **pair(f"{ours}.attention_norm", f"{theirs}.layer_norm1"),
        **pair(f"{ours}.feed_forward.up", f"{theirs}.mlp.fc1"),
        **pair(f"{ours}.feed_forward.down", f"{theirs}.mlp.fc2"),
        **pair(f"{ours}.feed_forward_norm", f"{theirs}.layer_norm2"),
    }
    layers = (".0", ".2", ".4") if mask.upsample == "refined" else ("",)
    upsample = [pair(f"upsample{layer}", f"transposed_convolution{layer}") for layer in layers]
    return {
        **pair("film.scale", "film_mul"),
        **pair("film.shift", "film_add"),
        **repeat(blocks, len(mask.taps)),
        **{name: rows for layer in upsample for name, rows in layer.items()},
    }


def keys(config: VLMConfig) -> KeyMap:
    return {
        **prefixed(clip.whole_keys(config), "", "clip."),
        **prefixed(decoder_keys(config.heads.mask), "mask.", "decoder."),
    }


def found(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    masks = model(
        images=inputs["pixel_values"], tokens=inputs["input_ids"], segments=inputs["attention_mask"],
        positions=clip.torch_positions(inputs["input_ids"]), heads=("mask",),
    ).masks
    return {**clip.found_whole(model, inputs), "masks": masks}


def expected(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    """Through their parts: their whole forward cuts every gradient that goes into CLIP."""
    pictures = model.clip.get_image_features(inputs["pixel_values"], output_hidden_states=True)
    phrases = model.clip.get_text_features(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    activations = [pictures.hidden_states[layer + 1] for layer in model.extract_layers]
    masks = model.decoder(activations, phrases.pooler_output).logits
    return {**clip.expected_whole(model.clip, inputs), "masks": masks}


WHOLE = Family(
    "CLIPSegForImageSegmentation", VLMConfig, read, write, keys,
    clip.whole_inputs, found, expected,
    {
        "projection_dim": 18, "extract_layers": [0, 2], "reduce_dim": 12, "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 20, "conditional_layer": 1, "use_complex_transposed_convolution": True,
        "vision_config": {**clip.TOWER, "num_hidden_layers": 3, "image_size": 48, "patch_size": 16},
        "text_config": clip.TINY_TEXT,
    },
)
