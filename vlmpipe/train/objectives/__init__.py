"""Losses, beside the model and not in it. Each is called as `objective(model, batch) -> (loss, metrics)`.

Under several processes each gets its own rows of a batch, and the mean of the processes' losses and gradients is the
loss and gradient of the whole batch in one process, for every parameter, `logit_scale` included.
"""

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

from vlmpipe.config import nearest
from vlmpipe.errors import UserError
from vlmpipe.train.objectives.answers import Answers, Statements
from vlmpipe.train.objectives.base import Batch, Result
from vlmpipe.train.objectives.boxes import Boxes
from vlmpipe.train.objectives.contrastive import Contrastive
from vlmpipe.train.objectives.image_tokens import ImageTokens
from vlmpipe.train.objectives.language import LanguageModeling
from vlmpipe.train.objectives.masked import MaskedImage, MaskedMultimodal, MaskedText
from vlmpipe.train.objectives.masks import Masks
from vlmpipe.train.objectives.matching import HardMatching, Matching
from vlmpipe.train.objectives.mixture import Mixture, mixture
from vlmpipe.train.objectives.prefix_lm import PrefixLM
from vlmpipe.train.objectives.sigmoid import Sigmoid

Objective = Callable[[nn.Module, Batch], Result]
OBJECTIVES = {
    "answers": Answers,
    "boxes": Boxes,
    "contrastive": Contrastive,
    "image_tokens": ImageTokens,
    "language_modeling": LanguageModeling,
    "masked_image": MaskedImage,
    "masked_image_alone": partial(MaskedImage, alone=True),
    "masked_multimodal": MaskedMultimodal,
    "masked_text": MaskedText,
    "masked_text_alone": partial(MaskedText, alone=True),
    "masks": Masks,
    "matching": Matching,
    "matching_hard": HardMatching,
    "prefix_lm": PrefixLM,
    "sigmoid": Sigmoid,
    "statements": Statements,
}

# Those that give the model the batch's pictures as they come, also of several sizes.
ANY_SIZE = (Answers, LanguageModeling, MaskedText, PrefixLM, Statements)


def takes_any_size(objective: Objective) -> bool:
    parts = [part for _, _, part in objective.parts] if isinstance(objective, Mixture) else [objective]
    return all(isinstance(part, ANY_SIZE) for part in parts)


def objective_for(model: nn.Module) -> Objective:
    """What a model of this shape is trained with: words if it can say them, else the shared space, hidden words, and
    whether picture and text match, as far as it has heads for them."""
    if model.language_model is not None:
        return LanguageModeling()
    heads = model.config.heads
    contrast = "sigmoid" if heads.projection is not None and heads.projection.bias is not None else "contrastive"
    fitting = {
        contrast: heads.projection, "image_tokens": heads.image_tokens, "masked_text": heads.masked_text,
        "matching": heads.matching,
    }
    names = [name for name, head in fitting.items() if head is not None]
    return make_objective(names[0] if len(names) == 1 else dict.fromkeys(names, 1.0), model)


def make_objective(wanted: str | Mapping[str, float] | None, model: nn.Module) -> Objective:
    """By name, or a mixture by names and weights; None is what fits the model's heads."""
    if wanted is None:
        return objective_for(model)
    return OBJECTIVES[wanted]() if isinstance(wanted, str) else mixture(wanted, OBJECTIVES)


def check_objective(wanted: str | Mapping[str, float] | None) -> None:
    """Refuse unknown names and weights that are no weights.

    Raises:
        UserError: naming the first of them.
    """
    weights = {} if wanted is None else {wanted: 1.0} if isinstance(wanted, str) else wanted
    if wanted is not None and not weights:
        raise UserError("objective: found a mixture of nothing; expected names with weights")
    for name, weight in weights.items():
        if name not in OBJECTIVES:
            known = ', '.join(OBJECTIVES)
            raise UserError(f"found objective '{name}'{nearest(name, OBJECTIVES)}; expected one of {known}")
        if not weight > 0:
            raise UserError(f"objective.{name}: found weight {weight}; expected a number above 0")
