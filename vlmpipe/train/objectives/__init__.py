"""Losses, beside the model and not in it. Each is called as `objective(model, batch) -> (loss, metrics)`.

Under several processes each gets its own rows of a batch, and the mean of the processes' losses and gradients is the
loss and gradient of the whole batch in one process, for every parameter, `logit_scale` included.
"""

from collections.abc import Callable

from torch import nn

from vlmpipe.train.objectives.base import Batch, Result
from vlmpipe.train.objectives.boxes import Boxes
from vlmpipe.train.objectives.contrastive import Contrastive
from vlmpipe.train.objectives.image_tokens import ImageTokens
from vlmpipe.train.objectives.language import LanguageModeling
from vlmpipe.train.objectives.masks import Masks
from vlmpipe.train.objectives.prefix_lm import PrefixLM

Objective = Callable[[nn.Module, Batch], Result]
OBJECTIVES = {
    "boxes": Boxes,
    "contrastive": Contrastive,
    "image_tokens": ImageTokens,
    "language_modeling": LanguageModeling,
    "masks": Masks,
    "prefix_lm": PrefixLM,
}


def objective_for(model: nn.Module) -> Objective:
    """What a model of this shape is trained with: words if it can say them, else the shared space."""
    return OBJECTIVES["contrastive" if model.language_model is None else "language_modeling"]()
