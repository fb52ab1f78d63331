"""Groups by pattern, freezing, and the schedules' known values."""

import pytest
import torch
from torch import nn

from vlmpipe.errors import UserError
from vlmpipe.train.optim import OptimizerConfig, Rule, ScheduleConfig, learning_rates, make_optimizer, rate, set_rate


def tower() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"vision": nn.Linear(3, 4), "text": nn.Linear(4, 2)})


def test_first_matching_rule_wins():
    rules = (Rule("vision.bias", 0.1), Rule("vision.*", None))
    assert learning_rates(tower(), rules) == {
        "vision.weight": None, "vision.bias": 0.1, "text.weight": 1.0, "text.bias": 1.0,
    }


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((Rule("vison.weight"),), "pattern 'vison.weight' matches no parameter; did you mean 'vision.weight'"),
        ((Rule("vision"),), r"matches no parameter.*whole name.*'vision\.\*'"),
        ((Rule("(text"),), "no regular expression"),
        ((Rule(".*"),), "every parameter frozen"),
    ],
)
def test_rules_that_can_not_be_meant_fail(rules, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(tower(), OptimizerConfig(rules=rules))


def test_groups_carry_rate_and_decay():
    model = tower()
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.1, rules=(Rule("vision.*", 0.5),)))
    set_rate(optimizer, 0.01)
    found = {(g["lr"], g["weight_decay"], tuple(p.shape)) for g in optimizer.param_groups for p in g["params"]}
    assert found == {(0.005, 0.1, (4, 3)), (0.005, 0.0, (4,)), (0.01, 0.1, (2, 4)), (0.01, 0.0, (2,))}


def test_frozen_parameters_do_not_move():
    model = tower()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = make_optimizer(model, OptimizerConfig(rules=(Rule("vision.*"),)))
    model["text"](model["vision"](torch.ones(5, 3))).square().mean().backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"text.weight", "text.bias"}


def test_schedules_at_known_steps():
    cosine = ScheduleConfig(warmup=10, floor=0.1)
    assert [rate(cosine, step, 110) for step in (0, 9, 10)] == [0.1, 1.0, 1.0]
    assert rate(cosine, 60, 110) == pytest.approx(0.55)
    assert rate(cosine, 110, 110) == pytest.approx(0.1)
    wsd = ScheduleConfig("wsd", warmup=0, decay=0.2)
    assert [rate(wsd, step, 100) for step in (0, 80)] == [1.0, pytest.approx(1.0)]
    assert rate(wsd, 90, 100) == pytest.approx(0.5)
    assert rate(ScheduleConfig("constant", warmup=0), 99, 100) == 1.0
