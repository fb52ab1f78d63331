"""Adapters start as nothing, learn alone, and are folded in so that an ordinary model remains."""

import dataclasses

import pytest
import torch

from tests.models.tiny import make, pictures
from tests.train.rows import CONFIG
from vlmpipe.errors import UserError
from vlmpipe.models.processor import stack
from vlmpipe.train.adapters import LoraConfig, add_adapters, merge_adapters, rules_with_adapters
from vlmpipe.train.loop import train
from vlmpipe.train.objectives import OBJECTIVES
from vlmpipe.train.optim import Rule

LORA = LoraConfig(rank=2, alpha=4.0, pattern=r"text\.transformer\..*")


def make_batch(processor):
    texts = [processor.encode_answer("what?", text) for text in ("red", "a blue square")]
    return {"images": processor.images(pictures(2)), **stack([[text] for text in texts])}


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**{name: batch[name] for name in ("images", "tokens", "segments", "positions")}).logits


def trained(tmp_path, rules=()):
    """(weights before, model with adapters merged, its outputs before merging, batch)"""
    model, processor = make("prefix")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_adapters(model, LORA)
    batch = make_batch(processor)
    optimizer = dataclasses.replace(CONFIG.optimizer, rules=rules_with_adapters(rules))
    config = dataclasses.replace(CONFIG, steps=5, batch_size=2, optimizer=optimizer)
    train(model, OBJECTIVES["language_modeling"](), Same(batch), config, tmp_path)
    outputs = logits(model, batch)
    merge_adapters(model)
    return before, model, outputs, batch


class Same:
    def __init__(self, batch):
        self.batch = batch

    def at(self, step: int):
        return self.batch


def test_new_adapters_change_nothing():
    model, processor = make("prefix")
    batch = make_batch(processor)
    expected = logits(model, batch)
    add_adapters(model, LORA)
    assert torch.equal(logits(model, batch), expected)


def test_only_adapters_learn_and_merged_they_say_the_same(tmp_path):
    before, model, outputs, batch = trained(tmp_path)
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("text.transformer.") and name.endswith(".weight") for name in changed)
    torch.testing.assert_close(logits(model, batch), outputs, rtol=1e-4, atol=1e-5)
    for name in changed:
        assert torch.linalg.matrix_rank(after[name] - before[name], tol=1e-5) <= 2, name


def test_a_rule_lets_more_learn(tmp_path):
    before, model, _, _ = trained(tmp_path, (Rule(r"fusion\..*", 0.5),))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}
    assert {name.partition(".")[0] for name in changed} == {"text", "fusion"}


def test_the_same_seed_gives_the_same_adapters():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))
        model, _ = make("prefix")
        add_adapters(model, LORA, seed)
        states.append({name: tensor for name, tensor in model.state_dict().items() if "lora_A" in name})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.parametrize("values", [{"rank": 0}, {"alpha": 0.0}, {"pattern": "(text"}])
def test_values_that_make_no_adapter_are_refused(values):
    with pytest.raises(UserError, match=next(iter(values))):
        dataclasses.replace(LORA, **values)


def test_a_pattern_that_matches_nothing_is_a_typo():
    with pytest.raises(UserError, match=r"matches no linear layer.*expected the whole name"):
        add_adapters(make("prefix")[0], LoraConfig(pattern="txt.*"))
