"""What single tasks are told beside `EvaluateConfig`: how pictures are drawn, and which groups are compared."""

from dataclasses import dataclass, field

from vlmpipe.errors import UserError


@dataclass(frozen=True)
class DrawingConfig:
    """How `text_to_image` draws, and who judges.

    scorer: a dual encoder whose image tower gives the features of `fid` and whose space `clip_score`: a directory of
    ours, or a Hugging Face CLIP or SigLIP. temperature, top_k, guidance: see `models.draw`.
    """

    scorer: str | None = None
    temperature: float = 1.0
    top_k: int = 0
    guidance: float = 1.0

    def __post_init__(self):
        if self.temperature < 0 or self.top_k < 0:
            raise UserError(f"drawing: found temperature {self.temperature}, top_k {self.top_k}; expected at least 0")


@dataclass(frozen=True)
class Association:
    """Two groups of a column, and two lists of texts: is the first group nearer to the first texts than the second?"""

    column: str
    first: str
    second: str
    nearer: tuple[str, ...]
    further: tuple[str, ...]

    def __post_init__(self):
        if self.first == self.second or not self.nearer or not self.further:
            raise UserError(
                f"associations: found the groups '{self.first}' and '{self.second}' with {len(self.nearer)} and "
                f"{len(self.further)} texts; expected two groups, and texts for both sides"
            )


@dataclass(frozen=True)
class FairnessConfig:
    """Which groups are compared.

    columns: slices of the samples, such as those of groups.csv, by which the worst group and the gap of every task are
    told; queries: texts that name no group, for which pictures are ranked by the task `fairness`; k: how many of the
    first are looked at; associations: by name; minimum: smaller groups are named and not compared; permutations: of an
    association; seed: of those and of intervals.
    """

    columns: tuple[str, ...] = ()
    queries: tuple[str, ...] = ("a photo of a person",)
    k: int = 100
    associations: dict[str, Association] = field(default_factory=dict)
    minimum: int = 30
    permutations: int = 10_000
    seed: int = 0

    def __post_init__(self):
        if not self.queries or not all(text.strip() for text in self.queries):
            raise UserError(f"queries: found {list(self.queries)}; expected texts, none of them empty; fill the list")
        for name, least in (("k", 1), ("minimum", 2), ("permutations", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: found {getattr(self, name)}; expected at least {least}; raise it")
