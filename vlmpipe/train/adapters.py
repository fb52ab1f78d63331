"""Low-rank adapters through peft: train a few weights beside frozen ones, and fold them in at the end.

The only importer of peft.
"""

import re
from dataclasses import dataclass

import torch
from torch import nn

from vlmpipe.config import nearest
from vlmpipe.errors import UserError
from vlmpipe.train.optim import Rule

# Adapters learn; whatever no rule of the user's speaks of stands still.
FIRST, LAST = Rule(r".*\.lora_[AB]\..*", 1.0), Rule(".*", None)


@dataclass(frozen=True)
class LoraConfig:
    """LoRA (arXiv 2106.09685): to each linear layer whose whole name matches `pattern`, add alpha / rank * B A.

    Everything else is frozen, but for what optimizer.rules give a rate.
    """

    rank: int = 8
    alpha: float = 16.0
    pattern: str = r"text\.transformer\..*"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"found rank: {self.rank}; expected at least 1")
        if self.alpha <= 0:
            raise UserError(f"found alpha: {self.alpha}; expected a positive number such as twice the rank")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise UserError(f"pattern: '{self.pattern}' is no regular expression ({error}); mend it") from None


def rules_with_adapters(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The user's rules for a model with adapters."""
    return (FIRST, *rules, LAST)


def add_adapters(model: nn.Module, config: LoraConfig, seed: int = 0) -> None:
    """Put adapters beside the matching linear layers of `model`. They start as nothing: outputs are the same.

    Raises:
        UserError: no linear layer matches.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    matching = [name for name in linear if re.fullmatch(config.pattern, name)]
    if not matching:
        raise UserError(
            f"lora: pattern '{config.pattern}' matches no linear layer{nearest(config.pattern, linear)}; expected the "
            f"whole name of at least one, such as {linear[0]}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft = PeftConfig(r=config.rank, lora_alpha=config.alpha, target_modules=matching)
        inject_adapter_in_model(peft, model)


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Fold the adapters into the layers beside which they stand: `model` is of the plain classes again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, part in list(model.named_modules()):
        if isinstance(part, BaseTunerLayer):
            part.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, part.get_base_layer())
