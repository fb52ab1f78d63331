"""ViLT (arXiv 2102.03334) with its heads for hidden words, answers and statements about two pictures."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmpipe.models.fusion import FusionConfig
from vlmpipe.models.fusion.base import SingleStreamConfig
from vlmpipe.models.heads import ClassifierConfig, HeadsConfig
from vlmpipe.models.pretrained import bert, clip, flava
from vlmpipe.models.pretrained.family import Family, Inputs, Names, Theirs, real, require, square
from vlmpipe.models.pretrained.keys import KeyMap, Reshape, one, pair, prefixed
from vlmpipe.models.pretrained.vit import HALF
from vlmpipe.models.vision import VisionConfig
from vlmpipe.models.vlm import VLMConfig


def read(theirs: Theirs, names: Names) -> VLMConfig:
    require(theirs, num_channels=3, max_image_length=-1)
    transformer = flava.read_transformer(theirs)
    return VLMConfig(
        vision=VisionConfig(
            replace(transformer, depth=0),
            image_size=square(theirs["image_size"], "image_size"),
            patch_size=square(theirs["patch_size"], "patch_size"),
            class_token=True,
            pool="class",
            interpolation="bilinear",
            final_norm=False,
            mean=HALF,
            std=HALF,
        ),
        text=bert.text_config(theirs, transformer, pooler=True),
        fusion=FusionConfig("single_stream", single_stream=SingleStreamConfig(theirs["modality_type_vocab_size"])),
        heads=read_heads(theirs, names),
    )


def read_heads(theirs: Theirs, names: Names) -> HeadsConfig:
    """The classifier of several pictures is as wide inside as what it reads, that of answers twice as wide."""
    pictures, width = theirs["num_images"], theirs["hidden_size"]
    classes = flava.class_count(theirs)
    several = ClassifierConfig(classes, hidden=width * pictures, pictures=pictures) if pictures > 0 else None
    classifies = "classifier.0.weight" in names
    return HeadsConfig(
        masked_text=flava.masked_text(theirs["vocab_size"]) if "mlm_score.transform.dense.weight" in names else None,
        answers=ClassifierConfig(classes, hidden=2 * width) if classifies and several is None else None,
        statement=several if classifies else None,
    )


def write(config: VLMConfig, head: str) -> dict[str, Any]:
    """With the one head that their class has."""
    flava.expect(config, "single_stream", head)
    sizes = {"image_size": config.vision.image_size, "patch_size": config.vision.patch_size}
    classifier = config.heads.answers or config.heads.statement
    return {
        **bert.write(config.text),
        **sizes,
        "qkv_bias": config.text.transformer.qkv_bias is not False,
        "modality_type_vocab_size": config.fusion.single_stream.types,
        "num_images": config.heads.statement.pictures if config.heads.statement else -1,
        **(flava.labels(classifier.classes) if classifier else {}),
    }


# --- keys ------------------------------------------------------------------------------------------------


def keys(config: VLMConfig) -> KeyMap:
    return {**prefixed(body_keys(config), "", "vilt."), **head_keys(config.heads)}


def body_keys(config: VLMConfig) -> KeyMap:
    width, places, words = config.vision.width, config.vision.side**2 + 1, "embeddings.text_embeddings"
    text = {
        "token_embedding.weight": one(f"{words}.word_embeddings.weight"),
        "position_embedding.weight": one(f"{words}.position_embeddings.weight"),
        "type_embedding.weight": one(f"{words}.token_type_embeddings.weight"),
        **pair("embedding_norm", f"{words}.LayerNorm"),
        **flava.layers(config.text.transformer),
        **pair("norm", "layernorm"),
        **pair("pooler", "pooler.dense"),
    }
    return {
        **prefixed(text, "text."),
        "vision.class_embedding": one("embeddings.cls_token", Reshape((width,), (1, 1, width))),
        "vision.position_embedding": one(
            "embeddings.position_embeddings", Reshape((places, width), (1, places, width))
        ),
        **pair("vision.stem", "embeddings.patch_embeddings.projection"),
        "fusion.type_embedding.weight": one("embeddings.token_type_embeddings.weight"),
    }


def head_keys(heads: HeadsConfig) -> KeyMap:
    found = {}
    if heads.masked_text:
        found |= flava.transform_keys("masked_text.met.transform", "mlm_score.transform")
        found["masked_text.met.bias"] = one("mlm_score.decoder.bias")
    for name in ("answers", "statement"):
        if getattr(heads, name):
            for layer in (0, 1, 3):
                found |= pair(f"{name}.output.{layer}", f"classifier.{layer}")
    return found


# --- parity ----------------------------------------------------------------------------------------------


def inputs(theirs: Theirs, processor: Any) -> Inputs:
    """Pictures of several sizes, filled up to the largest on the right and below."""
    patch, largest = theirs["patch_size"], theirs["image_size"] // theirs["patch_size"]
    found, several = bert.inputs(theirs, processor), max(theirs["num_images"], 1)
    count = len(found["input_ids"]) * several
    sizes = [(largest - number % 2, largest + 1 - number % 3) for number in range(count)]
    pixels, mask = torch.zeros(count, 3, patch * largest, patch * (largest + 1)), []
    for each, (down, across) in zip(pixels, sizes, strict=True):
        each[:, : down * patch, : across * patch] = torch.randn(3, down * patch, across * patch)
        mask.append(torch.zeros(each.shape[1:]))
        mask[-1][: down * patch, : across * patch] = 1
    pictures = {"pixel_values": pixels, "pixel_mask": torch.stack(mask)}
    if theirs["num_images"] > 0:
        pictures = {name: value.unflatten(0, (-1, several)) for name, value in pictures.items()}
    return {**found, **pictures}


def grids_of(mask: Tensor, patch: int) -> Tensor:
    """[n, 3] patches of their pixel mask [n, Y, X]."""
    down, across = mask[:, ::patch, 0].sum(dim=1), mask[:, 0, ::patch].sum(dim=1)
    return torch.stack([torch.ones_like(down), down, across], dim=1).long()


def arguments(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    """Theirs as ours: several pictures of a text are a pass each."""
    pixels, mask = inputs["pixel_values"], inputs["pixel_mask"]
    words = {
        "tokens": inputs["input_ids"],
        "segments": inputs["attention_mask"],
        "positions": clip.torch_positions(inputs["input_ids"]),
        "types": inputs["token_type_ids"],
    }
    if pixels.ndim == 5:
        count = pixels.shape[1]
        words = {name: value.repeat_interleave(count, dim=0) for name, value in words.items()}
        words["frames"] = torch.arange(count).repeat(len(pixels))
        pixels, mask = pixels.flatten(0, 1), mask.flatten(0, 1)
    return {**words, "images": pixels, "grids": grids_of(mask, model.config.vision.patch_size)}


def found(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    outputs = model(**arguments(model, inputs))
    values = {"answers": outputs.answers, "statement": outputs.statement}
    if outputs.text_logits is not None:
        values["text_logits"] = real(outputs.text_logits, inputs)
    return {name: value for name, value in values.items() if value is not None}


def expected_words(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    return {"text_logits": real(model(**inputs).logits, inputs)}


def expected_answers(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    return {"answers": model(**inputs).logits}


def expected_statement(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    return {"statement": model(**inputs).logits}


TINY = {
    **clip.TOWER, "vocab_size": 31, "max_position_embeddings": 19, "type_vocab_size": 2, "image_size": 20,
    "patch_size": 5, "modality_type_vocab_size": 2, "num_images": -1,
}
SHARED = {"image_processor": "ViltImageProcessorPil"}
MASKED_TEXT = Family(
    "ViltForMaskedLM", VLMConfig, read, partial(write, head="masked_text"), keys, inputs, found, expected_words, TINY,
    ignored=(r"mlm_score\.decoder\.weight",), **SHARED,
)
ANSWERS = Family(
    "ViltForQuestionAnswering", VLMConfig, read, partial(write, head="answers"), keys, inputs, found, expected_answers,
    {**TINY, "num_labels": 7}, **SHARED,
)
STATEMENT = Family(
    "ViltForImagesAndTextClassification", VLMConfig, read, partial(write, head="statement"), keys,
    inputs, found, expected_statement,
    {**TINY, "num_images": 2, "modality_type_vocab_size": 3, "num_labels": 2}, **SHARED,
)
