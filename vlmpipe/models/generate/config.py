"""How words are chosen."""

from dataclasses import dataclass
from typing import Literal

from vlmpipe.errors import UserError


@dataclass(frozen=True)
class GenerationConfig:
    """How words are chosen. The settings of another method than the chosen one do nothing.

    greedy: the likeliest word. sample: drawn from the words after `temperature`, of which `top_k` (0: all) and then the
    likeliest with `top_p` of the mass are left; `seed` decides, whatever else is in the batch. beam: the likeliest
    text that `beams` of them at once come upon, by log-probability / length^`length_penalty`; with `early_stopping` a
    search ends as soon as that many texts ended.
    """

    method: Literal["greedy", "sample", "beam"] = "greedy"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self):
        if not self.temperature > 0:
            raise UserError(f"temperature: found {self.temperature}; expected over 0; use method: greedy for the limit")
        if self.top_k < 0:
            raise UserError(f"top_k: found {self.top_k}; expected at least 0, where 0 keeps all words")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: found {self.top_p}; expected over 0 and at most 1")
        if self.beams < 1:
            raise UserError(f"beams: found {self.beams}; expected at least 1")


GREEDY = GenerationConfig()
