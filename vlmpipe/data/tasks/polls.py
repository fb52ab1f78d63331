"""POPE's questions about what is and what isn't in a picture (arXiv 2305.10355, section 5.1).

Of every picture as many things that are there are asked for as things that aren't, and those are chosen in three ways:
at random, the commonest of all pictures, and the ones that most often stand together with what is there.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import permutations

import numpy as np

from vlmpipe.data.questions import article
from vlmpipe.data.records import DetectionRecord, QuestionRecord

EACH = 3  # things that are there, and things that aren't, in one picture: six questions as published
QUESTION = "Is there {} {} in the image?"
Rank = Callable[[str, Collection[str]], float]  # of a thing that isn't in a picture, by what is there


def poll(records: Sequence[DetectionRecord], seed: int = 0, each: int = EACH) -> list[QuestionRecord]:
    """The questions of all strategies, by picture; slice `strategy`. The same records and seed give the same ones.

    Pictures with fewer things have fewer questions; those without any, or with all there are, have none.
    """
    shown = {record.id: set(record.labels) for record in records}
    names = sorted(set().union(*shown.values()))
    ranks = ranks_of(shown)
    asked = []
    for number, record in enumerate(records):
        rng = np.random.default_rng((seed, number))
        absent = [name for name in names if name not in shown[record.id]]
        present = _drawn(sorted(shown[record.id]), min(each, len(absent)), rng)
        for strategy, rank in ranks.items():
            # Equal ranks in random order: a stable sort after a shuffle.
            mixed = sorted(_drawn(absent, len(absent), rng), key=lambda name: -rank(name, shown[record.id]))
            asked += _questions(record, strategy, present, mixed[: len(present)])
    return asked


def ranks_of(shown: Mapping[str, Collection[str]]) -> dict[str, Rank]:
    """For each strategy how early it asks for a thing that isn't there."""
    common = Counter(name for names in shown.values() for name in names)
    together = Counter(pair for names in shown.values() for pair in permutations(sorted(names), 2))
    return {
        "random": lambda name, present: 0.0,
        "popular": lambda name, present: common[name],
        "adversarial": lambda name, present: sum(together[name, other] for other in present),
    }


def _drawn(names: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    return [names[i] for i in rng.permutation(len(names))[:count]]


def _questions(
    record: DetectionRecord, strategy: str, present: Sequence[str], absent: Sequence[str]
) -> list[QuestionRecord]:
    pairs = [(name, "yes") for name in present] + [(name, "no") for name in absent]
    return [
        QuestionRecord(
            f"{strategy}-{record.id}-{number}", (record.image,), QUESTION.format(article(name), name), (answer,),
            slices={"strategy": strategy},
        )
        for number, (name, answer) in enumerate(pairs)
    ]
