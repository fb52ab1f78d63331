"""The optimizer and its learning rates: AdamW, groups by parameter pattern, a schedule by step."""

import math
import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from vlmpipe.config import nearest
from vlmpipe.errors import UserError


@dataclass(frozen=True)
class Rule:
    """Parameters whose whole name matches `pattern` (a regular expression) learn at `lr` times the rate; null freezes.

    The first rule that matches a parameter counts. A rule that matches none is taken for a typo.
    """

    pattern: str
    lr: float | None = None


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up, then a cosine to the end, or a plateau with a linear descent in its last `decay` share (WSD)."""

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: int = 50  # steps
    decay: float = 0.2
    floor: float = 0.0  # share of the peak rate that is left at the end


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101); weight decay acts on matrices only, not on norms and biases."""

    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip: float | None = 1.0  # largest norm of the whole gradient; null: never scaled down
    rules: tuple[Rule, ...] = ()
    schedule: ScheduleConfig = ScheduleConfig()

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UserError(f"found lr: {self.lr}; expected a positive rate such as 1e-3")


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Freeze and group the parameters of `model` by the rules and build the optimizer of the rest.

    Raises:
        UserError: a rule matches no parameter, or all parameters are frozen.
    """
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, scale in freeze(model, config.rules).items():
        parameter = model.get_parameter(name)
        if scale is not None:
            # A single number is not split where the others are, and the two don't go into one kernel.
            groups.setdefault((scale, parameter.ndim >= 2, parameter.ndim == 0), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "scale": scale, "weight_decay": config.weight_decay if decays else 0.0}
            for (scale, decays, _), parameters in groups.items()
        ],
        lr=config.lr, betas=config.betas, eps=config.eps, fused=True,
    )


def freeze(model: nn.Module, rules: tuple[Rule, ...]) -> dict[str, float | None]:
    """Let exactly those parameters want a gradient that the rules give a rate; returns `learning_rates`.

    Raises:
        UserError: a rule matches no parameter, or all parameters are frozen.
    """
    scales = learning_rates(model, rules)
    for name, scale in scales.items():
        model.get_parameter(name).requires_grad_(scale is not None)
    if all(scale is None for scale in scales.values()):
        raise UserError("found every parameter frozen by optimizer.rules; expected some to train; drop a rule")
    return scales


def learning_rates(model: nn.Module, rules: tuple[Rule, ...]) -> dict[str, float | None]:
    """For each parameter name the factor on the learning rate, None where it is frozen."""
    names = [name for name, _ in model.named_parameters()]
    matching = [{name for name in names if _compiled(rule).fullmatch(name)} for rule in rules]
    for rule, found in zip(rules, matching, strict=True):
        if not found:
            hint = nearest(rule.pattern, names)
            raise UserError(
                f"optimizer.rules: pattern '{rule.pattern}' matches no parameter{hint}; expected the whole name of at "
                f"least one, such as {names[0]} or '{names[0].partition('.')[0]}.*'"
            )
    return {
        name: next((rule.lr for rule, found in zip(rules, matching, strict=True) if name in found), 1.0)
        for name in names
    }


def _compiled(rule: Rule) -> re.Pattern:
    try:
        return re.compile(rule.pattern)
    except re.error as error:
        raise UserError(f"optimizer.rules: '{rule.pattern}' is no regular expression ({error}); mend it") from None


def rate(config: ScheduleConfig, step: int, steps: int) -> float:
    """The share of the peak learning rate for update `step` (counted from 0) of `steps`."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.kind == "constant":
        return 1.0
    done = (step - config.warmup) / max(1, steps - config.warmup)
    if config.kind == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * done))
    else:
        left = min(1.0, (1 - done) / config.decay) if config.decay else 1.0
    return config.floor + (1 - config.floor) * left


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
