"""The difference between challenger and champion on the same samples, with what resampling of clusters says of it."""

import re

import numpy as np

from vlmpipe.evaluate.statistics import REPLICATES, Bootstrap, Statistic, bootstrap_corpus, bootstrap_mean
from vlmpipe.evaluate.store import Pair, Scored, metric_of

# Endings of a metric's name, or of the part before a slice's, `robustness.drop.noise`; an association's p is none of
# them: the larger it is, the less is shown of a bias.
LOWER_IS_BETTER = (
    r"perplexity", r"chair\.[si]", r"fid", r"calibration_error", r"drop", r"gap(?:_low|_high)?", r"max_skew", r"ndkl",
    r"median_rank", r"association\.[^.]+\.effect",
)
# Asked with another picture or caption, or a blank one, what is good is bad: a high accuracy needs no picture, and
# neither does a low perplexity.
NOT_SEEN = ("wrong_image", "wrong_caption", "(?<!over_)blank")
CUTOFF = re.compile(r"@\d+(?:\.\d+)?")  # of `recall@1`, `ap@0.5`
LOWER = re.compile(rf"(?:^|[._])(?:{'|'.join(LOWER_IS_BETTER)})(?:_blind)?(?=\.|$)")
UNSEEN = re.compile(rf"_(?:{'|'.join(NOT_SEEN)})(?=\.|$)")

# Forms of numbers from 0 to 1.
BOUNDED = {"f1", "bleu", "average_precision", "ranked_precision", "roc_area", "calibration"}


def lower_is_better(metric: str) -> bool:
    """Whether a metric's name says that less is better."""
    name = CUTOFF.sub("", metric)
    plain = UNSEEN.sub("", name)
    return bool(LOWER.search(plain)) != (plain != name)


def compare(pair: Pair, seed: int, replicates: int = REPLICATES, lower_is_better: bool = False) -> Bootstrap:
    """Challenger minus champion, turned round where less is better: higher is better.

    Corpus metrics are computed anew in every draw. Of clusters that were not seen a rate says that they can't differ by
    more than 1 (`Bootstrap.reach`), and so does a gain, for both models have the same blind guess; perplexities and
    other numbers without bounds say nothing of them.

    Raises:
        UserError: fewer than two clusters, or a draw without a finite value.
    """
    sign = -1.0 if lower_is_better else 1.0
    sides = (pair.challenger_NM, pair.champion_NM)
    reach = 1.0 if all(_is_rate(pair.form, counts_NM) for counts_NM in sides) else None
    if all(_is_mean(pair.form, counts_NM) for counts_NM in sides):
        difference_N = sign * (sides[0][:, 0] - sides[1][:, 0])
        return bootstrap_mean(difference_N, pair.clusters_N, seed, replicates, reach)

    def difference(weights_BN: np.ndarray) -> np.ndarray:
        challenger_B, champion_B = (metric_of(pair.form, weights_BN, counts_NM) for counts_NM in sides)
        return sign * (challenger_B - champion_B)

    return bootstrap_corpus(difference, pair.clusters_N, seed, replicates, reach)


def resample(scored: Scored, seed: int, replicates: int = REPLICATES) -> Bootstrap:
    """One model's value, with its interval.

    Raises:
        UserError: as in `compare`.
    """
    reach = 1.0 if _is_rate(scored.form, scored.counts_NM) else None
    if _is_mean(scored.form, scored.counts_NM):
        return bootstrap_mean(scored.counts_NM[:, 0], scored.clusters_N, seed, replicates, reach)
    value: Statistic = lambda weights_BN: metric_of(scored.form, weights_BN, scored.counts_NM)  # noqa: E731
    return bootstrap_corpus(value, scored.clusters_N, seed, replicates, reach)


def _is_mean(form: str, counts_NM: np.ndarray) -> bool:
    """Whether each sample weighs the same."""
    return form == "ratio" and bool((counts_NM[:, 1] == 1).all())


def _is_rate(form: str, counts_NM: np.ndarray) -> bool:
    """Whether it is a share, or a difference of two."""
    return form in BOUNDED or (form == "ratio" and bool((abs(counts_NM[:, 0]) <= counts_NM[:, 1]).all()))
