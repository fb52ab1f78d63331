"""The same random weights in both libraries give the same outputs and gradients."""

import pytest
import torch
import transformers

from vlmpipe.errors import UserError
from vlmpipe.models.layers import Cache
from vlmpipe.models.pretrained import part_from_hugging_face

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def shaken(model):
    """Norm weights and biases start at one and zero, where a swapped pair would not show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def ours(model):
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else model.config
    return part_from_hugging_face(config, model.state_dict())


CLIP = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
TEXTS = {
    "gpt2": lambda: transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=31, n_embd=24, n_layer=2, n_head=3, n_positions=19)
    ),
    "llama": lambda: transformers.LlamaModel(
        transformers.LlamaConfig(
            vocab_size=31,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=19,
        )
    ),
    "clip": lambda: transformers.CLIPTextModel(
        transformers.CLIPTextConfig(vocab_size=31, max_position_embeddings=19, eos_token_id=30, **CLIP)
    ),
}


def padded_rows(lengths, width):
    tokens = torch.randint(3, 29, (len(lengths), width))
    real = torch.arange(width) < torch.tensor(lengths)[:, None]
    return tokens * real, real


def run_ours(model, tokens, real):
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model(model.token_embedding(tokens), real.long(), positions)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_vision_tower_equals_clip(activation):
    theirs = shaken(
        transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(image_size=20, patch_size=5, hidden_act=activation, **CLIP)
        )
    )
    model = ours(theirs)
    pixels = torch.randn(3, 3, 20, 20)
    tokens = model(pixels)
    assert relative_error(model.pool(tokens), theirs(pixels).pooler_output) <= TOLERANCE


@pytest.mark.parametrize("family", TEXTS)
def test_text_equals_transformers_with_padding(family):
    theirs = shaken(TEXTS[family]())
    model = ours(theirs)
    tokens, real = padded_rows([7, 13, 4], 13)
    expected = theirs(input_ids=tokens, attention_mask=real.long()).last_hidden_state
    assert relative_error(run_ours(model, tokens, real)[real], expected[real]) <= TOLERANCE


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradients_equal_transformers(family):
    theirs = shaken(TEXTS[family]())
    model = ours(theirs)
    tokens, real = padded_rows([5, 9], 9)
    run_ours(model, tokens, real)[real].square().sum().backward()
    theirs(input_ids=tokens, attention_mask=real.long()).last_hidden_state[real].square().sum().backward()
    embedding = next(p for name, p in theirs.named_parameters() if name.endswith(("wte.weight", "embed_tokens.weight")))
    assert relative_error(model.token_embedding.weight.grad, embedding.grad) <= TOLERANCE


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_cache_changes_nothing(family):
    model = ours(shaken(TEXTS[family]()))
    tokens, real = padded_rows([9, 9], 9)
    whole = run_ours(model, tokens, real)
    cache, parts = Cache(), []
    for start, end in ((0, 4), (4, 5), (5, 9)):
        positions = torch.arange(start, end).expand(2, -1)
        embedded = model.token_embedding(tokens[:, start:end])
        parts.append(model(embedded, real[:, start:end].long(), positions, cache))
    assert relative_error(torch.cat(parts, dim=1), whole) <= TOLERANCE


def test_keys_that_do_not_map_are_named():
    theirs = TEXTS["gpt2"]()
    weights = dict(theirs.state_dict(), surprise=torch.zeros(1))
    del weights["h.1.ln_2.bias"]
    with pytest.raises(UserError, match=r"surprise.*h\.1\.ln_2\.bias"):
        part_from_hugging_face(theirs.config.to_dict(), weights)


def test_an_unknown_family_is_named():
    with pytest.raises(UserError, match="found 'mamba'; expected one of clip_vision_model"):
        part_from_hugging_face({"model_type": "mamba"}, {})
