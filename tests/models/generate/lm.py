"""Language models of odd sizes with the same weights here and in transformers."""

import torch
import transformers

from vlmpipe.models import VisionLanguageModel, VLMConfig
from vlmpipe.models.fusion import FusionConfig
from vlmpipe.models.heads import HeadsConfig, LanguageModelConfig
from vlmpipe.models.layers import TransformerConfig
from vlmpipe.models.parity import random_module
from vlmpipe.models.pretrained import convert
from vlmpipe.models.vision import VisionConfig


def gpt2():
    """(ours, which also reads pictures and is asked without any; theirs)."""
    config, theirs = random_module("gpt2", n_positions=40, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    text = convert(config.to_dict(), theirs.state_dict())
    vision = VisionConfig(TransformerConfig(8, 1, 1), image_size=8, patch_size=8)
    heads = HeadsConfig(language_model=LanguageModelConfig())
    ours = VisionLanguageModel(VLMConfig(vision, text.config, FusionConfig("prefix"), heads))
    ours.text.load_state_dict(text.state_dict())
    whole = transformers.GPT2LMHeadModel(config)
    whole.transformer = theirs
    whole.lm_head.weight = theirs.wte.weight
    return ours.eval(), whole.eval()


def rows(*texts):
    """Inputs of our forward, padded on the right."""
    length = max(map(len, texts))
    tokens = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts])
    segments = torch.tensor([[1] * len(text) + [0] * (length - len(text)) for text in texts])
    return {"tokens": tokens, "segments": segments, "positions": torch.arange(length).expand_as(tokens)}
