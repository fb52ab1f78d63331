"""FLAVA (arXiv 2112.04482) with all heads and its codebook, and what other families of that time share."""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.codebook import CodebookConfig
from vlmpipe.models.fusion import FusionConfig
from vlmpipe.models.fusion import Inputs as OurInputs
from vlmpipe.models.fusion.base import MultimodalConfig
from vlmpipe.models.heads import (
    HeadsConfig,
    MaskedImageConfig,
    MaskedTextConfig,
    MatchingConfig,
    ProjectionConfig,
)
from vlmpipe.models.layers import TransformerConfig
from vlmpipe.models.pretrained import bert, clip
from vlmpipe.models.pretrained.family import Family, Inputs, Names, Theirs, pixels, qkv, real, require, square
from vlmpipe.models.pretrained.keys import KeyMap, Reshape, one, pair, prefixed, repeat
from vlmpipe.models.text import TextConfig
from vlmpipe.models.vision import VisionConfig
from vlmpipe.models.vlm import VLMConfig

BERT_TOKENS = {"mask_token": 103, "first_word": 999}  # of bert-base-uncased, whose tokens under 999 are unused
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


# --- shared ----------------------------------------------------------------------------------------------


def layers(config: TransformerConfig) -> KeyMap:
    """Of ViLT and of FLAVA's three encoders: ViT's blocks under BERT's names."""
    ours, theirs = "transformer.blocks.{i}", "encoder.layer.{i}"
    attention = f"{theirs}.attention.attention"
    names = (f"{attention}.query", f"{attention}.key", f"{attention}.value")
    keys = {
        **pair(f"{ours}.attention_norm", f"{theirs}.layernorm_before"),
        **qkv(config, f"{ours}.attention.qkv", names, bias=config.qkv_bias is not False),
        **pair(f"{ours}.attention.out", f"{theirs}.attention.output.dense"),
        **pair(f"{ours}.feed_forward_norm", f"{theirs}.layernorm_after"),
        **pair(f"{ours}.feed_forward.up", f"{theirs}.intermediate.dense"),
        **pair(f"{ours}.feed_forward.down", f"{theirs}.output.dense"),
    }
    return repeat(keys, config.depth)


def transform_keys(ours: str, theirs: str) -> KeyMap:
    """BERT's layer before the output matrix."""
    return {**pair(f"{ours}.dense", f"{theirs}.dense"), **pair(f"{ours}.norm", f"{theirs}.LayerNorm")}


def masked_text(vocab_size: int, **changes: Any) -> MaskedTextConfig:
    """BERT's special tokens, where the vocabulary can be its own."""
    return MaskedTextConfig(**(BERT_TOKENS if vocab_size > BERT_TOKENS["first_word"] else {}), **changes)


def class_count(theirs: Theirs) -> int:
    return len(theirs.get("id2label") or {}) or theirs.get("num_labels", 2)


def labels(count: int) -> dict[str, Any]:
    """How their configs say how many classes there are."""
    names = {number: f"LABEL_{number}" for number in range(count)}
    return {"id2label": names, "label2id": {name: number for number, name in names.items()}}


def read_transformer(theirs: Theirs) -> TransformerConfig:
    return replace(clip.read_transformer(theirs), qkv_bias=None if theirs["qkv_bias"] else False)


def write_transformer(config: TransformerConfig) -> dict[str, Any]:
    return {**clip.write_transformer(config), "qkv_bias": config.qkv_bias is not False}


def expect(config: VLMConfig, fusion: str, *heads: str) -> None:
    """Refuse a model of another kind than their class is.

    Raises:
        UserError: another fusion, or other heads than these.
    """
    found = [field.name for field in fields(config.heads) if getattr(config.heads, field.name) is not None]
    if config.fusion.kind != fusion or set(found) != set(heads):
        raise UserError(
            f"model: found fusion '{config.fusion.kind}' with heads {found}; expected '{fusion}' with {list(heads)}"
        )


# --- configs ---------------------------------------------------------------------------------------------


def read(theirs: Theirs, names: Names) -> VLMConfig:
    image, text, both = theirs["image_config"], theirs["text_config"], theirs["multimodal_config"]
    require(image, num_channels=3)
    require(both, use_cls_token=True)
    return VLMConfig(
        vision=VisionConfig(
            read_transformer(image),
            image_size=square(image["image_size"], "image_size"),
            patch_size=square(image["patch_size"], "patch_size"),
            class_token=True,
            pool="class",
            mask_token=any(name.endswith("image_model.embeddings.mask_token") for name in names),
            mean=MEAN,
            std=STD,
        ),
        text=bert.text_config(text, read_transformer(text), pooler=False),
        fusion=FusionConfig("multimodal", multimodal=MultimodalConfig(read_transformer(both))),
        heads=read_heads(theirs, names),
    )


def read_heads(theirs: Theirs, names: Names) -> HeadsConfig:
    """All of them, or the projection alone where the checkpoint is the model without its heads."""
    projection = ProjectionConfig(theirs["projection_dim"], image="affine", text="affine", max_scale=None)
    if "itm_head.pooler.dense.weight" not in names:
        return HeadsConfig(projection=projection)
    image, text, codebook = theirs["image_config"], theirs["text_config"], theirs["image_codebook_config"]
    book = None
    if "image_codebook.blocks.input.weight" in names:
        require(codebook, num_groups=4, input_channels=3, vocab_size=image["vocab_size"])
        book = CodebookConfig("dalle", width=codebook["hidden_size"], blocks=codebook["num_blocks_per_group"])
    return HeadsConfig(
        projection=projection,
        matching=MatchingConfig(pooler=True),
        masked_text=masked_text(text["vocab_size"], tied=False, alone=True),
        masked_image=MaskedImageConfig("codes", image["vocab_size"], book, alone=True),
    )


def write(config: VLMConfig) -> dict[str, Any]:
    expect(config, "multimodal", "projection", "matching", "masked_text", "masked_image")
    own = config.heads.masked_image
    codes, book = {"vocab_size": own.codes}, own.codebook
    shape = {} if book is None else {"hidden_size": book.width, "num_blocks_per_group": book.blocks}
    written = write_shared(config)
    return {
        **written,
        "init_codebook": book is not None,
        "image_config": {**written["image_config"], **codes},
        "image_codebook_config": {**shape, **codes},
    }


def write_body(config: VLMConfig) -> dict[str, Any]:
    expect(config, "multimodal", "projection")
    return write_shared(config)


def write_shared(config: VLMConfig) -> dict[str, Any]:
    vision, both = config.vision, config.fusion.multimodal.transformer
    sizes = {"image_size": vision.image_size, "patch_size": vision.patch_size, "mask_token": vision.mask_token}
    return {
        "hidden_size": both.width,
        "layer_norm_eps": both.norm_eps,
        "projection_dim": config.heads.projection.width,
        "image_config": {**write_transformer(vision.transformer), **sizes},
        "text_config": {**bert.write(config.text), **write_transformer(config.text.transformer)},
        "multimodal_config": write_transformer(both),
    }


# --- keys ------------------------------------------------------------------------------------------------


def keys(config: VLMConfig) -> KeyMap:
    return {**prefixed(body_keys(config), "", "flava."), **head_keys(config)}


def body_keys(config: VLMConfig) -> KeyMap:
    width = config.fusion.multimodal.transformer.width
    joint = {
        "class_embedding": one("cls_token", Reshape((width,), (1, 1, width))),
        **layers(config.fusion.multimodal.transformer),
        **pair("norm", "layernorm"),
        **pair("pooler.dense", "pooler.dense"),
    }
    return {
        **prefixed(image_keys(config.vision), "vision.", "image_model."),
        **prefixed(text_keys(config.text), "text.", "text_model."),
        **prefixed(joint, "fusion.", "multimodal_model."),
        **pair("fusion.image_pooler.dense", "image_model.pooler.dense"),
        **pair("fusion.text_pooler.dense", "text_model.pooler.dense"),
        **pair("fusion.image_projector", "image_to_mm_projection"),
        **pair("fusion.text_projector", "text_to_mm_projection"),
        **pair("projection.image", "image_projection"),
        **pair("projection.text", "text_projection"),
        "projection.logit_scale": one("logit_scale"),
    }


def image_keys(config: VisionConfig) -> KeyMap:
    width, places = config.width, config.side**2 + 1
    token = Reshape((width,), (1, 1, width))
    return {
        "class_embedding": one("embeddings.cls_token", token),
        **({"mask_embedding": one("embeddings.mask_token", token)} if config.mask_token else {}),
        "position_embedding": one("embeddings.position_embeddings", Reshape((places, width), (1, places, width))),
        **pair("stem", "embeddings.patch_embeddings.projection"),
        **layers(config.transformer),
        **pair("norm", "layernorm"),
    }


def text_keys(config: TextConfig) -> KeyMap:
    return {
        "token_embedding.weight": one("embeddings.word_embeddings.weight"),
        "position_embedding.weight": one("embeddings.position_embeddings.weight"),
        "type_embedding.weight": one("embeddings.token_type_embeddings.weight"),
        **pair("embedding_norm", "embeddings.LayerNorm"),
        **layers(config.transformer),
        **pair("norm", "layernorm"),
    }


def head_keys(config: VLMConfig) -> KeyMap:
    found = pair("matching.pooler.dense", "itm_head.pooler.dense")
    found |= pair("matching.output", "itm_head.seq_relationship")
    for ours, theirs in (("met", "mmm_text_head"), ("alone", "mlm_head")):
        found |= transform_keys(f"masked_text.{ours}.transform", f"{theirs}.transform")
        found[f"masked_text.{ours}.output.weight"] = one(f"{theirs}.decoder.weight")
        found[f"masked_text.{ours}.bias"] = one(f"{theirs}.decoder.bias")
    for ours, theirs in (("met", "mmm_image_head"), ("alone", "mim_head")):
        found |= transform_keys(f"masked_image.{ours}.0", f"{theirs}.transform")
        found[f"masked_image.{ours}.1.weight"] = one(f"{theirs}.decoder.weight")
        found[f"masked_image.{ours}.1.bias"] = one(f"{theirs}.decoder.bias")
    book = config.heads.masked_image.codebook
    return found if book is None else {**found, **codebook_keys(book)}


def codebook_keys(book: CodebookConfig) -> KeyMap:
    ours, theirs = "masked_image.codebook", "image_codebook.blocks"
    found = {**pair(f"{ours}.input", f"{theirs}.input"), **pair(f"{ours}.output", f"{theirs}.output.conv")}
    for group in range(4):
        for block in range(book.blocks):
            here, there = f"{ours}.groups.{group}.{block}", f"{theirs}.group_{group + 1}.group.block_{block + 1}"
            for layer in range(4):
                found |= pair(f"{here}.convolutions.{layer}", f"{there}.res_path.path.conv_{layer + 1}")
            if group and not block:
                found |= pair(f"{here}.skip", f"{there}.id_path")
    return found


# --- parity ----------------------------------------------------------------------------------------------


def inputs(theirs: Theirs, processor: Any) -> Inputs:
    """Half of the patches are hidden, and the codebook has pictures of its own."""
    found = {**pixels(theirs["image_config"], processor), **bert.inputs(theirs["text_config"], processor)}
    side = square(theirs["image_config"]["image_size"], "image_size")
    patches = side // square(theirs["image_config"]["patch_size"], "patch_size")
    count = len(found["pixel_values"])
    return {
        **found,
        "bool_masked_pos": torch.rand(count, patches**2) < 0.5,
        "codebook_pixel_values": 0.1 + 0.8 * torch.rand(count, 3, 8 * patches, 8 * patches),
    }


def ours(inputs: Inputs) -> tuple[Inputs, Inputs]:
    """A picture's arguments and a text's, as our model calls them."""
    return {"images": inputs["pixel_values"]}, {
        "tokens": inputs["input_ids"],
        "segments": inputs["attention_mask"],
        "positions": clip.torch_positions(inputs["input_ids"]),
        "types": inputs["token_type_ids"],
    }


def found(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    """Of both together with hidden patches, of each alone, and of the codebook."""
    image, text = ours(inputs)
    hidden = {"patch_mask": inputs["bool_masked_pos"]}
    apart = model(**image, **text, heads=("projection",))
    both, words, patches = model(**image, **text, **hidden), model(**text), model(**image, **hidden)
    values = {
        "image_embedding": apart.image_embedding,
        "text_embedding": apart.text_embedding,
        "scale": apart.scale,
        "matching": both.matching,
        "text_logits": real(both.text_logits, inputs),
        "patch_logits": both.patch_logits,
        "text_logits_alone": real(words.text_logits, inputs),
        "patch_logits_alone": patches.patch_logits,
    }
    book = model.masked_image.codebook
    return values if book is None else {**values, "codes": book.logits(inputs["codebook_pixel_values"])}


def expected(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    """Their passes of a text and a picture alone give their unimodal heads."""
    text = {name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    image = {"pixel_values": inputs["pixel_values"], "bool_masked_pos": inputs["bool_masked_pos"]}
    both = model(**text, **image, input_ids_masked=inputs["input_ids"], return_loss=False)
    words = model.mlm_head(model.flava(**text).text_embeddings)
    patches = model.mim_head(model.flava(**image).image_embeddings[:, 1:])
    flava = model.flava
    values = {
        "image_embedding": unit(flava.image_projection(both.image_embeddings[:, 0])),
        "text_embedding": unit(flava.text_projection(both.text_embeddings[:, 0])),
        "scale": flava.logit_scale.exp(),
        "matching": both.itm_logits,
        "text_logits": real(both.mmm_text_logits, inputs),
        "patch_logits": both.mmm_image_logits,
        "text_logits_alone": real(words, inputs),
        "patch_logits_alone": patches,
    }
    book = model.image_codebook
    return values if book is None else {**values, "codes": book(inputs["codebook_pixel_values"])}


def found_body(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    """What their model without heads gives: tokens of either encoder and of both, and all that is pooled."""
    image, text = ours(inputs)
    joint = model.fusion(model.vision, model.text, OurInputs(**image, **text))
    words = model.fusion(model.vision, model.text, OurInputs(**text))
    pictures = model.fusion(model.vision, model.text, OurInputs(**image))
    return {
        "text": real(words.text, inputs),
        "image": pictures.image,
        "text_pooled": words.pooled,
        "image_pooled": pictures.pooled,
        "joint_text": real(joint.text, inputs),
        "joint_image": joint.image,
        "joint_pooled": joint.pooled,
    }


def expected_body(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    given = {name: value for name, value in inputs.items() if name not in ("bool_masked_pos", "codebook_pixel_values")}
    outputs = model(**given)
    length, joint = inputs["input_ids"].shape[1], outputs.multimodal_embeddings
    return {
        "text": real(outputs.text_embeddings, inputs),
        "image": outputs.image_embeddings[:, 1:],
        "text_pooled": outputs.text_output.pooler_output,
        "image_pooled": outputs.image_output.pooler_output,
        "joint_text": real(joint[:, -length:], inputs),
        "joint_image": joint[:, 2:-length],
        "joint_pooled": outputs.multimodal_output.pooler_output,
    }


def unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


TINY_IMAGE = {**clip.TINY_VISION, "vocab_size": 23, "mask_token": True}
TINY_TEXT = {**clip.TOWER, "vocab_size": 31, "max_position_embeddings": 19, "type_vocab_size": 2}
TINY_BODY = {
    "hidden_size": 24, "projection_dim": 18, "image_config": TINY_IMAGE, "text_config": TINY_TEXT,
    "multimodal_config": clip.TOWER,
}
WHOLE = Family(
    "FlavaForPreTraining", VLMConfig, read, write, keys, inputs, found, expected,
    {**TINY_BODY, "image_codebook_config": {"hidden_size": 4, "vocab_size": 23}},
    ignored=(r"(mim|mlm|mmm_image|mmm_text)_head\.bias",),
    image_processor="FlavaImageProcessorPil",
)
BODY = Family(
    "FlavaModel", VLMConfig, read, write_body, body_keys, inputs, found_body, expected_body, TINY_BODY,
    image_processor="FlavaImageProcessorPil",
)
