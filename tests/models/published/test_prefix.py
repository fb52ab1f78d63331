"""Models that read pictures in their row, and CLIP's residual network, at their published sizes."""

from pathlib import Path

import pytest
import torch
import transformers
import yaml

from vlmpipe.config import parse
from vlmpipe.models import VisionLanguageModel, VLMConfig

CONFIGS = Path(__file__).parents[3] / "configs/model"


def config(name):
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    return parse(VLMConfig, content.get("model", content)["architecture"], name)


def on_meta(name):
    with torch.device("meta"):
        return VisionLanguageModel(config(name))


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_clip_rn50():
    """The count of the released RN50.pt; of its vision tower as CLIP's repository prints it (38.3M)."""
    model = on_meta("clip-resnet-50")
    assert count(model) == 102_007_137
    assert count(model.vision) + count(model.projection.image) == 38_316_896


def test_resnet_gpt2():
    """The parts as released: ResNet-50 and GPT-2 of 124M, and one matrix with a bias between their widths."""
    with torch.device("meta"):
        resnet = transformers.ResNetModel(transformers.ResNetConfig())
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    model = on_meta("resnet-gpt2-124m")
    assert count(model.vision) == count(resnet) == 23_508_032
    assert count(model.text) == count(gpt2) == 124_439_808
    assert count(model) == 23_508_032 + 124_439_808 + 2049 * 768


def test_llava():
    """The count that the model page of llava-hf/llava-1.5-7b-hf gives, 7.06B."""
    assert count(on_meta("llava-1.5-7b")) == 7_063_427_072


def test_qwen25_vl():
    """The settings of Qwen/Qwen2.5-VL-3B-Instruct."""
    text = {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {"hidden_size": 1280, "out_hidden_size": 2048, "depth": 32, "num_heads": 16, "intermediate_size": 3420}
    with torch.device("meta"):
        theirs = transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
        )
    assert count(on_meta("qwen2.5-vl-3b")) == count(theirs) == 3_754_622_976


@pytest.mark.parametrize("name", ["clip-resnet", "resnet-gpt2", "llava", "qwen2.5-vl"])
def test_the_small_ones_learn_with_every_parameter(name):
    model = VisionLanguageModel(config(name).with_vocab(64))
    assert 0.9e6 < count(model) < 2e6
    side = model.config.vision.image_size
    words = {"tokens": torch.ones(2, 3, dtype=torch.int64), "positions": torch.arange(3).expand(2, -1)}
    outputs = model(images=torch.randn(2, 3, side, side), segments=words["tokens"], **words)
    values = [outputs.image_embedding, outputs.text_embedding, outputs.scale, outputs.logits]
    sum((value * torch.randn_like(value)).sum() for value in values if value is not None).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
