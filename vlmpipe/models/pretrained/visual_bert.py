"""VisualBERT (arXiv 1908.03557) with its heads for hidden words, matching and answers. Its pictures are features."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmpipe.models.fusion import FusionConfig
from vlmpipe.models.fusion.base import SingleStreamConfig
from vlmpipe.models.heads import ClassifierConfig, HeadsConfig, MatchingConfig
from vlmpipe.models.pretrained import bert, clip, flava
from vlmpipe.models.pretrained.family import Family, Inputs, Names, Theirs, real, require
from vlmpipe.models.pretrained.keys import KeyMap, one, pair, prefixed
from vlmpipe.models.vision import VisionConfig
from vlmpipe.models.vlm import VLMConfig


@dataclass(frozen=True)
class Reversed:
    """Rows in reverse: their class 0 is a pair, ours is 1."""

    def to_ours(self, tensor: Tensor) -> Tensor:
        return tensor.flip(0)

    def to_theirs(self, tensor: Tensor) -> Tensor:
        return tensor.flip(0)


def read(theirs: Theirs, names: Names) -> VLMConfig:
    require(theirs, bypass_transformer=False)
    classes = flava.class_count(theirs)
    return VLMConfig(
        vision=VisionConfig(regions=theirs["visual_embedding_dim"]),
        text=bert.read({**theirs, "is_decoder": False, "add_cross_attention": False}, body_names(names)),
        fusion=FusionConfig(
            "single_stream",
            single_stream=SingleStreamConfig(
                theirs["type_vocab_size"], words_typed=False, projector=True, image_norm=True,
                image_positions=theirs["max_position_embeddings"],
            ),
        ),
        heads=HeadsConfig(
            masked_text=flava.masked_text(theirs["vocab_size"]) if "cls.predictions.bias" in names else None,
            matching=MatchingConfig() if "cls.seq_relationship.weight" in names else None,
            answers=ClassifierConfig(classes, reads="before_end") if "cls.weight" in names else None,
        ),
    )


def body_names(names: Names) -> Names:
    return frozenset(name.removeprefix("visual_bert.") for name in names)


def write(config: VLMConfig, heads: tuple[str, ...]) -> dict[str, Any]:
    """With the heads that their class has."""
    flava.expect(config, "single_stream", *heads)
    answers = config.heads.answers
    return {
        **bert.write(config.text),
        "visual_embedding_dim": config.vision.width,
        **(flava.labels(answers.classes) if answers else {}),
    }


def keys(config: VLMConfig) -> KeyMap:
    visual = "visual_bert.embeddings.visual"
    found = {
        **prefixed(bert.keys(config.text), "text.", "visual_bert."),
        "fusion.type_embedding.weight": one(f"{visual}_token_type_embeddings.weight"),
        "fusion.position_embedding.weight": one(f"{visual}_position_embeddings.weight"),
        **pair("fusion.projector", f"{visual}_projection"),
    }
    if config.heads.masked_text:
        found |= flava.transform_keys("masked_text.met.transform", "cls.predictions.transform")
        found["masked_text.met.bias"] = one("cls.predictions.bias")
    if config.heads.matching:
        found |= pair("matching.output", "cls.seq_relationship", Reversed())
    if config.heads.answers:
        found |= pair("answers.output.0", "cls")
    return found


def inputs(theirs: Theirs, processor: Any) -> Inputs:
    """Five, three and two regions, filled up with noise."""
    found = bert.inputs(theirs, processor)
    counts = torch.tensor([5, 3, 2])
    return {
        **found,
        "visual_embeds": torch.randn(3, 5, theirs["visual_embedding_dim"]),
        "visual_attention_mask": (torch.arange(5) < counts[:, None]).long(),
    }


def found(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    counts = inputs["visual_attention_mask"].sum(dim=1)
    outputs = model(
        images=inputs["visual_embeds"],
        grids=torch.stack([torch.ones_like(counts), torch.ones_like(counts), counts], dim=1),
        tokens=inputs["input_ids"],
        segments=inputs["attention_mask"],
        positions=clip.torch_positions(inputs["input_ids"]),
        types=inputs["token_type_ids"],
    )
    if outputs.answers is not None:
        return {"answers": outputs.answers}
    return {"text_logits": real(outputs.text_logits, inputs), "matching": outputs.matching}


def expected_pretraining(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    outputs = model(**inputs)
    words = outputs.prediction_logits[:, : inputs["input_ids"].shape[1]]
    return {"text_logits": real(words, inputs), "matching": outputs.seq_relationship_logits.flip(1)}


def expected_answers(model: Any, inputs: Inputs) -> dict[str, Tensor]:
    return {"answers": model(**inputs).logits}


TINY = {
    **clip.TOWER, "vocab_size": 31, "max_position_embeddings": 19, "type_vocab_size": 2, "visual_embedding_dim": 14,
    "pad_token_id": 0,
}
PRETRAINING = Family(
    "VisualBertForPreTraining", VLMConfig, read, partial(write, heads=("masked_text", "matching")), keys,
    inputs, found, expected_pretraining, TINY,
    ignored=(r"cls\.predictions\.decoder\..*",),
)
ANSWERS = Family(
    "VisualBertForQuestionAnswering", VLMConfig, read, partial(write, heads=("answers",)), keys,
    inputs, found, expected_answers,
    {**TINY, "num_labels": 7},
)
