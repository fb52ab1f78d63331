"""ViLT, VisualBERT, ViLBERT and FLAVA at their published sizes."""

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from vlmpipe.config import parse
from vlmpipe.models import VisionLanguageModel, VLMConfig
from vlmpipe.train.loop import TrainConfig
from vlmpipe.train.objectives import check_objective

CONFIGS = Path(__file__).parents[3] / "configs/model"
TINY = ("vilt", "visualbert", "vilbert", "flava")


def preset(name):
    found = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return found if "model" in found else {"model": found}


def config(name):
    return parse(VLMConfig, preset(name)["model"]["architecture"], name)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(name):
    with torch.device("meta"):
        return VisionLanguageModel(config(name))


def theirs(architecture, **changes):
    model = getattr(transformers, architecture)
    with torch.device("meta"):
        return model(model.config_class(**changes))


def test_vilt():
    """Table 6 of the paper: 87.4M, without the words' embedding, which all compared models share."""
    model = on_meta("vilt-b32")
    assert count(model) - count(model.matching) == count(theirs("ViltForMaskedLM"))
    assert round((count(model.text.transformer) + count(model.vision.stem)) / 1e6, 1) == 87.4


def test_visualbert():
    model = on_meta("visualbert-coco")
    assert count(model) == count(theirs("VisualBertForPreTraining", visual_embedding_dim=2048))


def test_vilbert():
    """The text stream is BERT-base to the parameter; the rest from the paper's sizes. The paper tells no total."""
    model = on_meta("vilbert-base")
    bert = transformers.BertConfig()
    with torch.device("meta"):
        assert count(model.text) == count(transformers.BertModel(bert, add_pooling_layer=False))

    def linear(into, out):
        return (into + 1) * out

    def feed(width, hidden):
        """Feed-forward and the norms of a block."""
        return linear(width, hidden) + linear(hidden, width) + 4 * width

    block = 4 * linear(1024, 1024) + feed(1024, 1024)
    assert count(model.fusion.image) == 6 * block
    words = linear(768, 1024) + 2 * linear(1024, 1024) + linear(1024, 768) + feed(768, 3072)
    regions = linear(1024, 1024) + 2 * linear(768, 1024) + linear(1024, 1024) + feed(1024, 1024)
    assert count(model.fusion.layers) == 6 * (words + regions)
    embedding, poolers = linear(2053, 1024) + 2 * 1024, linear(768, 1024) + linear(1024, 1024)
    assert count(model.fusion) == 6 * (block + words + regions) + embedding + poolers


def test_flava():
    """The paper's 241M are the encoders and what projects from them; the heads and the codebook come on top."""
    model, found = on_meta("flava-full"), theirs("FlavaForPreTraining")
    assert count(model) == count(found)
    encoders = sum(map(count, (model.vision, model.text, model.fusion, model.projection)))
    assert encoders == count(found.flava) and round(encoders / 1e6) == 241


@pytest.mark.parametrize("name", TINY)
def test_the_small_ones_parse_with_their_training(name):
    model = VisionLanguageModel(config(name).with_vocab(1024))
    assert 0.9e6 < count(model) < 2.1e6, json.dumps(count(model))
    for stage, settings in preset(name)["train"].items():
        check_objective(parse(TrainConfig, settings, stage).objective)
