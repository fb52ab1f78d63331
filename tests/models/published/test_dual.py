"""CLIP and SigLIP at their published sizes, and SigLIP's small preset."""

from pathlib import Path

import pytest
import torch
import transformers
import yaml

from vlmpipe.config import parse
from vlmpipe.models import VisionLanguageModel, VLMConfig
from vlmpipe.models.pretrained import FAMILIES
from vlmpipe.models.pretrained.save import same
from vlmpipe.train.objectives import objective_for
from vlmpipe.train.objectives.sigmoid import Sigmoid

CONFIGS = Path(__file__).parents[3] / "configs/model"
# 149,620,737: CLIP ViT-B/16 as openai/CLIP and open_clip's model_profile.csv (ViT-B-16, 149.62 M) count it.
# 203,155,970: the weights of google/siglip-base-patch16-224, whose config is transformers' default.
PUBLISHED = {
    "clip-vit-b-16": ("clip", 149_620_737, {"vision_config": {"patch_size": 16}}),
    "siglip-base-patch16-224": ("siglip", 203_155_970, {}),
}


def config(name):
    return parse(VLMConfig, yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["architecture"], name)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_has_the_released_parameters_and_config(name):
    kind, published, changes = PUBLISHED[name]
    theirs = transformers.AutoConfig.for_model(kind, **changes)
    with torch.device("meta"):
        model = VisionLanguageModel(config(name))
        assert count(model) == published == count(getattr(transformers, FAMILIES[kind].architecture)(theirs))
    names = {name for rows in FAMILIES[kind].keys(model.config).values() for name in rows.names}
    assert same(FAMILIES[kind].read(theirs.to_dict(), frozenset(names)), model.config)


def test_small_siglip_trains_by_the_sigmoid_loss():
    model = VisionLanguageModel(config("siglip").with_vocab(64))
    assert isinstance(objective_for(model), Sigmoid)
    assert 0.8e6 < count(model) < 2e6
