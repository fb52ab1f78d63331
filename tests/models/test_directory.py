"""A model directory comes back as it was, or says in one line what is wrong with it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.tiny import PRESETS, make
from vlmpipe.errors import UserError
from vlmpipe.models import load, save

FILES = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.mark.parametrize("preset", PRESETS)
def test_load_gives_back_what_was_saved(preset, tmp_path):
    model, processor = make(preset)
    save(model, processor, tmp_path)
    again, processor_again = load(tmp_path)
    assert again.config == model.config
    assert not again.training
    assert {k: v.tolist() for k, v in again.state_dict().items()} == {
        k: v.tolist() for k, v in model.state_dict().items()
    }
    assert processor_again.answers == processor.answers
    assert processor_again.encode("a red circle") == processor.encode("a red circle")


def test_the_same_model_gives_the_same_bytes(prefix, tmp_path):
    for name in ("first", "second"):
        save(*prefix, tmp_path / name)
    for file in FILES:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_the_random_state_of_the_caller_is_left_alone(prefix, tmp_path):
    save(*prefix, tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load(tmp_path)
    make("prefix", seed=9)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_or_torn_file_is_named(file, prefix, tmp_path):
    save(*prefix, tmp_path)
    data = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=file) as torn:
        load(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(UserError, match=file) as missing:
        load(tmp_path)
    assert all("\n" not in str(error.value) for error in (torn, missing))


def test_weights_of_another_model_are_refused_by_name(prefix, tmp_path):
    save(*prefix, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["text.norm.weight"]
    weights["text.nrom.weight"] = torch.zeros(32)
    weights["vision.norm.bias"] = torch.zeros(31)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"text\.norm\.weight.*text\.nrom\.weight.*vision\.norm\.bias"):
        load(tmp_path)


def test_an_unknown_config_key_is_named(prefix, tmp_path):
    save(*prefix, tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    facts["model"]["fusion"]["kindd"] = "prefix"
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="unknown key 'kindd'; did you mean 'kind'"):
        load(tmp_path)
