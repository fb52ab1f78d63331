"""Flamingo, VisualGPT, SimVLM and Parti at their published sizes. What can be compared with a published count is."""

from pathlib import Path

import pytest
import torch
import transformers
import yaml

from vlmpipe.config import parse
from vlmpipe.models import VisionLanguageModel, VLMConfig
from vlmpipe.models.fusion.resampler import Resampler, ResamplerConfig
from vlmpipe.train.optim import Rule, learning_rates

CONFIGS = Path(__file__).parents[3] / "configs/model"


def preset(name):
    """The architecture, and what the preset says of training."""
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    architecture = content["model"]["architecture"] if "model" in content else content["architecture"]
    return parse(VLMConfig, architecture, name), content.get("train", {})


def build(name):
    config, train = preset(name)
    with torch.device("meta"):
        return VisionLanguageModel(config), train


def count(*parts):
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


def trainable(model, train):
    """What the preset's rules leave to train, the same in both stages."""
    assert train["finetune"]["optimizer"] == train["pretrain"]["optimizer"]
    rules = tuple(parse(Rule, rule, "rule") for rule in train["pretrain"]["optimizer"]["rules"])
    rates = learning_rates(model, rules)
    return {name: model.get_parameter(name).numel() for name, rate in rates.items() if rate is not None}


def test_flamingo_3b_has_the_papers_layers():
    """Table 5: resampler 194M, gated layers 1.2B, language model 1.4B; 435M of the NFNet-F6 can't be compared."""
    model, train = build("flamingo-3b")
    gated = [block.cross for block in model.text.transformer.blocks]
    assert round(count(*gated) / 1e9, 1) == 1.2
    # Six layers as table 4 describes them have 189M: what the other 5M are, the paper doesn't say.
    assert count(model.fusion.resampler.layers) == pytest.approx(194e6, rel=0.03)
    # The relative positions of Transformer-XL (arXiv 1901.02860) are one matrix of the width squared in each block.
    language = count(model.text) - count(*gated) + 24 * 2048**2
    assert round(language / 1e9, 1) == 1.4
    # What learns is the two of them, and our projection from the width of ViT-L/14.
    learned = trainable(model, train)
    assert all(".cross." in name or name.startswith("fusion.") for name in learned)
    assert sum(learned.values()) == count(*gated) + count(model.fusion)


def test_openflamingo_3b_trains_what_the_released_one_does():
    """1,046,992,944 is what create_model_and_transforms of mlfoundations/open_flamingo prints for the released 3B."""
    model, train = build("flamingo-open-3b")
    assert sum(trainable(model, train).values()) == 1_046_992_944
    with torch.device("meta"):
        clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14,
        ))
    assert count(model.vision) == count(clip)


@pytest.mark.parametrize(
    ("width", "heads", "head_width", "millions"), [(1024, 8, 64, 63), (1024, 16, 128, 101)]
)
def test_resamplers_have_the_parameters_of_flamingo_mini(width, heads, head_width, millions):
    """dhansmair/flamingo-mini's wiki gives 63M to its tiny model and 101M to its mini, both over ViT-L/14."""
    transformer = {"width": width, "depth": 6, "heads": heads, "head_width": head_width, "bias": False}
    with torch.device("meta"):
        resampler = Resampler(parse(ResamplerConfig, {"transformer": transformer}, "resampler"), width)
    assert round(count(resampler) / 1e6) == millions


def test_visualgpt_is_gpt2_small_with_cross_attention():
    model, _ = build("visualgpt-gpt2")
    crossed = [block.cross for block in model.text.transformer.blocks]
    with torch.device("meta"):
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    assert count(model.text) - count(*crossed) == count(gpt2) == 124_439_808
    # Four matrices of 768 and their biases, as Enc_Dec_Attention of Vision-CAIR/VisualGPT uses, and a norm. Its linear
    # layers for the gates are not the paper's, and can't be compared.
    assert count(crossed[0]) == 4 * (768**2 + 768) + 2 * 768
    # Its encoder layers: attention, 2048 wide feed-forward, two norms.
    assert count(model.vision.transformer) == 3 * (4 * (768**2 + 768) + 2 * 768 * 2048 + 2048 + 768 + 4 * 768)


@pytest.mark.parametrize(
    ("size", "vit", "resnet"),
    [("base", 86, [3, 4, 23]), ("large", 307, [3, 8, 36]), ("huge", 632, None)],
)
def test_simvlm_is_a_resnet_and_twice_a_vit(size, vit, resnet):
    """Millions of ViT's parameters: arXiv 2010.11929, table 1. The paper gives no count of its own."""
    model, train = build(f"simvlm-{size}")
    assert train["pretrain"]["objective"] == "prefix_lm"
    encoder, decoder = model.fusion.encoder.transformer, model.text.transformer
    assert count(encoder) / 1e6 == pytest.approx(vit, rel=0.02)
    crossed = [block.cross for block in decoder.blocks]
    assert count(decoder) - count(*crossed) == count(encoder)
    assert model.fusion.encoder.token_embedding is None  # it has the decoder's
    if resnet is not None:
        with torch.device("meta"):
            stages = transformers.ResNetModel(transformers.ResNetConfig(depths=resnet, hidden_sizes=[256, 512, 1024]))
        assert count(model.vision) == count(stages)
    assert model.fusion.places.shape == (14 * 14, encoder.config.width)


def test_parti_350m_has_350m_in_its_blocks():
    """Table 1; of its larger models too, the count is that of the blocks."""
    model, _ = build("text-to-image-350m")
    blocks = count(model.fusion.encoder.transformer, model.text.transformer)
    assert round(blocks / 1e6, -1) == 350
    assert model.codes.codebook.shape == (8192, 192) and model.config.codes.length == 1024


SMALL = {"flamingo": 1.6e6, "visualgpt": 1.2e6, "simvlm": 1.3e6, "text-to-image": 1.4e6}


@pytest.mark.parametrize("name", SMALL)
def test_the_small_ones_parse_and_run(name):
    config, _ = preset(name)
    model = VisionLanguageModel(config.with_vocab(1024)).eval()
    assert count(model) == pytest.approx(SMALL[name], rel=0.1)
    tokens = torch.ones(1, 3, dtype=torch.int64)
    words = {"tokens": tokens, "segments": tokens, "positions": torch.arange(3)[None]}
    with torch.no_grad():
        if name == "text-to-image":
            start = torch.full((1, 1), config.codes.start)
            assert model(**words, codes=start).image_logits.shape == (1, 1, 256)
        else:
            assert model(torch.zeros(1, 3, 80, 80), **words).logits.shape == (1, 3, 1024)
