"""Hugging Face directories of every kind: heads, poolers, shards, old names, and what is refused."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from vlmpipe.errors import UserError
from vlmpipe.models import from_huggingface, to_huggingface
from vlmpipe.models.layers import Cache
from vlmpipe.models.parity import TOLERANCE, failed, parity, random_module
from vlmpipe.models.pretrained import FAMILIES, convert
from vlmpipe.models.pretrained.family import run_text, words
from vlmpipe.models.pretrained.load import locate
from vlmpipe.models.scorer import load_scorer
from vlmpipe.models.text import TextModel
from vlmpipe.models.vision import VisionEncoder

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def save(kind, directory, architecture=None, **changes):
    """A random directory, of a class with a task head where one is named."""
    config, theirs = random_module(kind, **changes)
    if architecture is not None:
        theirs = getattr(transformers, architecture)(config)
    theirs.save_pretrained(directory)
    return theirs


def change_weights(directory, change):
    weights = load_file(directory / WEIGHTS)
    change(weights)
    save_file(weights, directory / WEIGHTS, {"format": "pt"})


def assert_holds(model, theirs):
    """The weights of a module of transformers, to the bit."""
    found, expected = model.state_dict(), convert(theirs.config.to_dict(), theirs.state_dict()).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def relative_error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "smollm3"])
def test_the_cache_changes_nothing(kind):
    config, theirs = random_module(kind)
    model = convert(config.to_dict(), theirs.state_dict())
    inputs = {"input_ids": torch.randint(3, 29, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    whole = run_text(model, inputs)
    cache, parts = Cache(), []
    for start, end in ((0, 4), (4, 5), (5, 9)):
        positions = torch.arange(start, end).expand(2, -1)
        embedded = model.token_embedding(inputs["input_ids"][:, start:end])
        parts.append(model(embedded, inputs["attention_mask"][:, start:end], positions, cache))
    assert relative_error(torch.cat(parts, dim=1), whole) <= TOLERANCE


@pytest.mark.parametrize(
    ("kind", "architecture", "left"),
    [
        ("gpt2", "GPT2LMHeadModel", None),  # tied: its head is no weight of its own
        ("llama", "LlamaForCausalLM", "lm_head.weight"),
        ("qwen3", "Qwen3ForCausalLM", "lm_head.weight"),
        ("bert", "BertForMaskedLM", "cls.predictions"),
        ("vit", "ViTForImageClassification", "classifier.bias"),
        ("clip_vision_model", "CLIPVisionModelWithProjection", "visual_projection.weight"),
    ],
)
def test_task_heads_are_left_out_and_named(kind, architecture, left, tmp_path, caplog):
    save(kind, tmp_path, architecture)
    model, _ = from_huggingface(tmp_path)
    assert isinstance(model, TextModel | VisionEncoder)
    warned = [record.message for record in caplog.records if record.name.startswith("vlmpipe")]
    assert (left in warned[0]) if left else not warned
    assert not failed(parity(tmp_path), TOLERANCE)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_missing_pooler_is_no_random_pooler(kind, tmp_path):
    config, _ = random_module(kind)
    theirs = getattr(transformers, FAMILIES[kind].architecture)(config, add_pooling_layer=False)
    theirs.save_pretrained(tmp_path / "theirs")
    model, _ = from_huggingface(tmp_path / "theirs")
    assert model.pooler is None
    to_huggingface(model, None, tmp_path / "ours")
    written = load_file(tmp_path / "ours" / WEIGHTS)
    assert written.keys() == load_file(tmp_path / "theirs" / WEIGHTS).keys()


def test_parts_of_a_whole_model(tmp_path):
    save("clip", tmp_path)
    whole, _ = from_huggingface(tmp_path)
    vision, _ = from_huggingface(tmp_path, part="vision")
    text, _ = from_huggingface(tmp_path, part="text")
    assert isinstance(vision, VisionEncoder) and isinstance(text, TextModel)
    assert torch.equal(vision.stem.weight, whole.vision.stem.weight)
    with pytest.raises(UserError, match="found 'audio'; expected one of vision, text"):
        from_huggingface(tmp_path, part="audio")


def test_part_of_a_part_is_refused(tmp_path):
    save("gpt2", tmp_path)
    with pytest.raises(UserError, match="of a model that is a part"):
        from_huggingface(tmp_path, part="text")


def test_weights_in_several_files(tmp_path):
    _, theirs = random_module("llama")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model, _ = from_huggingface(tmp_path)
    assert torch.equal(model.token_embedding.weight, theirs.embed_tokens.weight)


def test_half_precision_is_read_as_float32_and_written_back_to_the_bit(tmp_path):
    _, theirs = random_module("gpt2")
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    model, _ = from_huggingface(tmp_path / "theirs")
    assert model.token_embedding.weight.dtype == torch.float32
    to_huggingface(model, None, tmp_path / "ours", dtype=torch.bfloat16)
    first, second = (load_file(tmp_path / side / WEIGHTS) for side in ("theirs", "ours"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_pickles_are_refused(tmp_path):
    theirs = save("gpt2", tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"found no readable weights.*expected safetensors, which hold no code"):
        from_huggingface(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    save("gpt2", tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"nonsense")
    with pytest.raises(UserError, match="found no readable weights"):
        from_huggingface(tmp_path)


def test_keys_that_do_not_map_are_named(tmp_path):
    save("gpt2", tmp_path)
    change_weights(tmp_path, lambda weights: weights.update(surprise=torch.zeros(1)) or weights.pop("h.1.ln_2.bias"))
    with pytest.raises(UserError, match=r"missing h\.1\.ln_2\.bias, unexpected surprise"):
        from_huggingface(tmp_path)


def test_constants_of_old_files_are_no_weights(tmp_path):
    clip = save("clip", tmp_path / "clip")
    change_weights(tmp_path / "clip", lambda weights: weights.update(
        {f"{tower}_model.embeddings.position_ids": torch.arange(19)[None] for tower in ("text", "vision")}
    ))
    assert_holds(from_huggingface(tmp_path / "clip")[0], clip)
    gpt2 = save("gpt2", tmp_path / "gpt2", "GPT2LMHeadModel")
    change_weights(tmp_path / "gpt2", lambda weights: weights.update({
        "transformer.h.0.attn.bias": torch.ones(1, 1, 19, 19), "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }))
    assert_holds(from_huggingface(tmp_path / "gpt2")[0], gpt2.transformer)


def test_files_have_the_names_that_older_versions_read(tmp_path):
    save("vit", tmp_path / "theirs")
    model, _ = from_huggingface(tmp_path / "theirs")
    to_huggingface(model, None, tmp_path / "ours")
    assert "encoder.layer.0.attention.attention.query.weight" in load_file(tmp_path / "ours" / WEIGHTS)


def test_weights_of_another_shape_are_named(tmp_path):
    save("gpt2", tmp_path)
    change_weights(tmp_path, lambda weights: weights.update({"wpe.weight": torch.zeros(7, 24)}))
    with pytest.raises(UserError, match=r"of another shape wpe\.weight"):
        from_huggingface(tmp_path)


def test_keys_of_a_state_in_memory_are_named_too():
    config, theirs = random_module("gpt2")
    weights = dict(theirs.state_dict(), surprise=torch.zeros(1))
    del weights["h.1.ln_2.bias"]
    with pytest.raises(UserError, match=r"surprise.*h\.1\.ln_2\.bias"):
        convert(config.to_dict(), weights)


def test_an_unknown_family_is_named(tmp_path):
    transformers.MambaConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="found 'mamba'; expected one of clip"):
        from_huggingface(tmp_path)


@pytest.mark.parametrize("read", [from_huggingface, load_scorer])
def test_code_in_a_directory_is_neither_run_nor_asked_about(read, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run it"))
    named = {"AutoConfig": "strange.Config", "AutoModel": "strange.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": named}))
    (tmp_path / "strange.py").write_text(f"open({str(tmp_path / 'harm')!r}, 'w')")
    with pytest.raises(UserError, match=r"contains custom code.*; expected .*; check") as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type"),
        ("llama", {"attention_bias": True}, "mlp_bias"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "sliding_attention"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("smollm3", {"no_rope_layers": [1, 0, 0]}, "no_rope_layers"),
        ("bert", {"hidden_act": "tanh"}, "activation"),
        ("vit", {"pooler_act": "relu"}, "pooler_act"),
    ],
)
def test_what_our_parts_cannot_do_is_refused(kind, changes, named):
    with pytest.raises(UserError, match=named):
        convert(*(part if index else part.to_dict() for index, part in enumerate(state_of(kind, changes))))


def state_of(kind, changes):
    config, theirs = random_module(kind, **changes)
    return config, theirs.state_dict()


def test_a_place_that_is_neither_a_directory_nor_an_id():
    with pytest.raises(UserError, match="found no directory '/nowhere/at/all'"):
        locate("/nowhere/at/all")


def test_a_directory_without_a_config(tmp_path):
    with pytest.raises(UserError, match=r"expected its config\.json"):
        from_huggingface(tmp_path)


def test_random_words_end_where_they_should():
    inputs = words({"vocab_size": 31, "max_position_embeddings": 19}, None, end=30)
    last = inputs["attention_mask"].sum(dim=1) - 1
    assert inputs["input_ids"][torch.arange(3), last].tolist() == [30, 30, 30]
    assert (inputs["input_ids"] == 30).sum() == 3
