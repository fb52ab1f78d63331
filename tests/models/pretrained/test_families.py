"""Every family in the table: the same random weights in both libraries give the same outputs and gradients, and the
trip to a directory and back changes no bit."""

import pytest
import torch
import transformers

from vlmpipe.models import from_huggingface, to_huggingface
from vlmpipe.models.parity import TOLERANCE, compare, failed, parity, random_module, table
from vlmpipe.models.pretrained import FAMILIES
from vlmpipe.models.pretrained.families import kind_of
from vlmpipe.shards import read_json

KINDS = [pytest.param(kind, id=kind) for kind in FAMILIES]
VARIANTS = {
    "clip-gelu": ("clip_vision_model", {"hidden_act": "gelu"}),
    "vit-without-qkv-bias": ("vit", {"qkv_bias": False}),
    "gpt2-narrow": ("gpt2", {"n_inner": 17}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("llama", {"head_dim": 6}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "qwen3-one-kv-head": ("qwen3", {"num_key_value_heads": 1}),
    "siglip-without-pooling": ("siglip_vision_model", {"vision_use_head": False}),
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_equal_transformers(kind):
    differences = compare(*random_module(kind))
    assert not failed(differences, TOLERANCE), table(differences, TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_so_do_variants(variant):
    kind, changes = VARIANTS[variant]
    differences = compare(*random_module(kind, **changes))
    assert not failed(differences, TOLERANCE), table(differences, TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_from_a_directory_and_back_changes_no_bit(kind, tmp_path):
    _, theirs = random_module(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    model, processor = from_huggingface(tmp_path / "theirs")
    assert processor is None and not model.training
    to_huggingface(model, None, tmp_path / "ours")
    again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    files = [read_json(tmp_path / side / "config.json") for side in ("theirs", "ours")]
    assert files[0] == files[1]
    for name, weight in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    twice, _ = from_huggingface(tmp_path / "ours")
    assert all(torch.equal(twice.state_dict()[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_family_of_a_model_of_our_own_is_found(kind, tmp_path):
    """From the config alone, as for a model that never was in transformers."""
    _, theirs = random_module(kind)
    theirs.save_pretrained(tmp_path / "theirs")
    model, _ = from_huggingface(tmp_path / "theirs")
    del model.huggingface
    # CLIP's text tower is a GPT-2 to the last weight: who wants it written as CLIP's says so.
    to_huggingface(model, None, tmp_path / "ours", kind if kind == "clip_text_model" else None)
    assert kind_of(transformers.AutoConfig.from_pretrained(tmp_path / "ours").to_dict()) == kind
    found, _ = from_huggingface(tmp_path / "ours")
    assert all(torch.equal(found.state_dict()[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("kind", ["clip", "llama"])
def test_parity_of_a_directory(kind, tmp_path):
    random_module(kind)[1].save_pretrained(tmp_path)
    differences = parity(tmp_path)
    assert not failed(differences, TOLERANCE)
    assert {each.kind for each in differences} == {"output", "gradient", "weights"}
