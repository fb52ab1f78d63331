"""Parity finds what differs, and says where."""

import pytest
import torch

from vlmpipe.__main__ import main
from vlmpipe.models.parity import TOLERANCE, Difference, compare, failed, group_of, random_module, table
from vlmpipe.models.pretrained import FAMILIES


def differences_after(kind, change, monkeypatch):
    """What parity says when our copy of their model is changed before it is compared."""
    import vlmpipe.models.parity as module

    convert = module.convert

    def changed(*arguments):
        model = convert(*arguments)
        with torch.no_grad():
            change(model)
        return model

    monkeypatch.setattr(module, "convert", changed)
    return failed(compare(*random_module(kind)), TOLERANCE)


def test_one_changed_weight_shows_in_outputs_gradients_and_weights(monkeypatch):
    wrong = differences_after("gpt2", lambda model: model.norm.bias.add_(0.01), monkeypatch)
    assert {each.kind for each in wrong} >= {"output", "weights"}
    (weights,) = (each for each in wrong if each.kind == "weights")
    assert weights.worst == "ln_f.bias" and weights.absolute == pytest.approx(0.01, rel=1e-3)


def test_another_activation_shows_where_it_is(monkeypatch):
    def change(model):
        model.transformer.blocks[1].feed_forward.activation = torch.nn.ReLU()

    wrong = differences_after("bert", change, monkeypatch)
    assert {each.kind for each in wrong} == {"output", "gradient"}
    assert any(each.worst.startswith("encoder.layer.1") for each in wrong)


def test_a_gradient_that_is_lost_shows(monkeypatch):
    def change(model):
        hook = model.token_embedding.weight.register_hook(lambda gradient: gradient * 1.001)
        assert hook is not None

    (wrong,) = differences_after("llama", change, monkeypatch)
    assert wrong.kind == "gradient" and wrong.worst == "embed_tokens.weight"
    assert wrong.relative == pytest.approx(1e-3, rel=1e-2)


def test_not_a_number_is_above_every_tolerance():
    assert failed([Difference("output", "x", (), float("nan"), float("nan"))], 1.0)


def test_weights_may_not_differ_at_all():
    assert failed([Difference("weights", "x", (), 1e-9, 1e-9)], 1.0)


def test_groups():
    names = ["text_model.encoder.layers.0.mlp.fc1.weight", "logit_scale", "a.b.c.d.e.weight", "lm_head.weight"]
    assert [group_of(name) for name in names] == ["text_model.encoder.layers", "logit_scale", "a.b.c", "lm_head"]


def test_the_command_prints_every_output_and_fails_above_its_tolerance(tmp_path, capsys):
    random_module("clip")[1].save_pretrained(tmp_path)
    assert main(["parity", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("image_embedding", "text_embedding", "logits", "vision_model.encoder.layers"))
    assert "ABOVE" not in shown and "0 above 1e-05" in shown
    assert main(["parity", str(tmp_path), "--tolerance", "1e-12"]) == 1
    assert "ABOVE" in capsys.readouterr().out


def test_the_command_says_what_is_wrong_with_a_directory(tmp_path, capsys):
    assert main(["parity", str(tmp_path)]) == 2
    assert "expected its config.json" in capsys.readouterr().err


def test_a_table_has_a_line_for_each_difference():
    rows = compare(*random_module("vit"))
    assert len(table(rows, TOLERANCE).splitlines()) == len(rows) + 1


def test_tiny_models_are_tiny():
    for kind in FAMILIES:
        _, theirs = random_module(kind)
        assert sum(part.numel() for part in theirs.parameters()) < 100_000, kind
