"""A description in three steps: what is there, what each thing does, and both in one text (see docs/generation.md)."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from vlmpipe.errors import UserError
from vlmpipe.models.generate.answers import answer
from vlmpipe.models.generate.config import GREEDY, GenerationConfig
from vlmpipe.models.processor import Processor
from vlmpipe.models.vlm import VisionLanguageModel


@dataclass(frozen=True)
class DescribeConfig:
    """What is asked; `{objects}` and `{roles}` stand for the answers so far."""

    objects: str = "what objects are in the picture?"
    roles: str = "what is the role of each of {objects}?"
    synthesis: str = "describe the picture in one sentence, with {objects}: {roles}"
    limit: int = 48  # most tokens of one answer
    generation: GenerationConfig = GREEDY

    def __post_init__(self):
        allowed = {"objects": (), "roles": ("objects",), "synthesis": ("objects", "roles")}
        for name, known in allowed.items():
            try:
                getattr(self, name).format(**dict.fromkeys(known, ""))
            except (KeyError, IndexError, ValueError):
                places = " and ".join(f"{{{place}}}" for place in known) or "no place"
                raise UserError(f"{name}: found {getattr(self, name)!r}; expected {places} in braces") from None
        if self.limit < 1:
            raise UserError(f"limit: found {self.limit}; expected at least 1")


@dataclass(frozen=True)
class Description:
    """The answer of each step; `text` is the description."""

    objects: str
    roles: str
    text: str


def describe(
    model: VisionLanguageModel, processor: Processor, images: Sequence[Image.Image],
    config: DescribeConfig = DescribeConfig(),
) -> list[Description]:
    """One description per image; each step is one batch.

    Raises:
        UserError: the model has no language head.
    """
    if model.language_model is None:
        raise UserError("found a dual encoder; expected a language head to describe pictures; use model=llava")

    def ask(questions: list[str]) -> list[str]:
        return answer(model, processor, images, questions, config.limit, config.generation)

    objects = ask([config.objects] * len(images))
    roles = ask([config.roles.format(objects=found) for found in objects])
    texts = ask(
        [config.synthesis.format(objects=found, roles=role) for found, role in zip(objects, roles, strict=True)]
    )
    return [Description(*parts) for parts in zip(objects, roles, texts, strict=True)]
