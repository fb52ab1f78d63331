"""Does the gate's statistics alarm by chance no more than it says, and catch the drop that it says it can?

    make bench-gate        python benchmarks/gate_calibration.py [--comparisons N] [--replicates B]

A comparison is two models on the same drawn images: three to four questions an image of three kinds, a caption, a
retrieval, a yes/no statement. An image is easy or hard for both models and for all that is asked about it, so that its
samples go together. Eight rules watch: accuracy, its three kinds, its slice of night pictures, recall, a
heavy-tailed caption score like CIDEr, and F1, a corpus metric. A/A: both models are the same one, drawn twice, so that
every alarm is false. Then one rule's metric truly drops by its margin, at the number of images that the power check
names from a pilot. Beside it in the same comparisons: a plain threshold, estimate below champion less margin.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.special import ndtri

from vlmpipe.evaluate.power import Power, decide_by_p, power_check
from vlmpipe.evaluate.statistics import Bootstrap, bootstrap_corpus, bootstrap_means, holm
from vlmpipe.progress import progress

ALPHA, POWER = 0.05, 0.8
PILOT_IMAGES = 4000
KINDS = ("colour", "count", "presence")
KIND_SHARE, KIND_ACCURACY = np.array([0.5, 0.3, 0.2]), np.array([0.8, 0.6, 0.9])
ACCURACY = float(KIND_SHARE @ KIND_ACCURACY)
NIGHT_SHARE, RECALL, F1_ACCURACY = 0.25, 0.6, 0.85
# What the latent ease of a sample is made of; the first two are common to both models.
IMAGE, ITEM, MODEL_ON_IMAGE, MODEL_ON_ITEM = 0.6, 0.6, 0.3, 0.4
DEVIATION = float(np.sqrt(IMAGE**2 + ITEM**2 + MODEL_ON_IMAGE**2 + MODEL_ON_ITEM**2))
CAPTION_TAIL = 0.9  # sigma of the log-normal caption score of mean 1: skewness 7
MARGINS = {
    "accuracy": 0.03, "colour": 0.04, "count": 0.06, "presence": 0.05, "night": 0.06, "recall": 0.06, "caption": 0.1,
    "f1": 0.05,
}


@dataclass(frozen=True)
class Comparison:
    """Rows are questions, then a caption and a retrieval for each image; yes/no statements stand apart.

    Shapes: N rows, K = 7 metrics that are means, C images. yes_2C: the champion's answers, the challenger's.
    """

    images_N: np.ndarray
    differences_NK: np.ndarray
    members_NK: np.ndarray
    truth_C: np.ndarray
    yes_2C: np.ndarray

    def f1(self, weights_BC: np.ndarray) -> np.ndarray:
        """Challenger's F1 less the champion's, for each row of weights."""
        truth, (old, new) = self.truth_C, self.yes_2C
        columns = np.stack([truth, old, new, old & truth, new & truth], axis=1).astype(float)
        truths, olds, news, old_hits, new_hits = (weights_BC @ columns).T
        return 2 * new_hits / (news + truths) - 2 * old_hits / (olds + truths)


def draw(images: int, drops: dict[str, float], generator: np.random.Generator) -> Comparison:
    """Two models on fresh images; the challenger's named metrics are worse by as much as `drops` says."""
    ease_C = generator.normal(size=images)
    taste_2C = generator.normal(size=(2, images)) * MODEL_ON_IMAGE
    night_C = generator.random(images) < NIGHT_SHARE

    def latent(of: np.ndarray) -> np.ndarray:
        own_2N = taste_2C[:, of] + MODEL_ON_ITEM * generator.normal(size=(2, len(of)))
        return (IMAGE * ease_C[of] + ITEM * generator.normal(size=len(of)) + own_2N) / DEVIATION

    every = np.arange(images)
    asked_Q = np.repeat(every, 1 + generator.poisson(2.5, images))
    kind_Q = generator.choice(len(KINDS), len(asked_Q), p=KIND_SHARE)
    right_2Q = latent(asked_Q) > -ndtri(KIND_ACCURACY)[kind_Q]
    lost_Q = drops.get("accuracy", 0) / ACCURACY + night_C[asked_Q] * drops.get("night", 0) / ACCURACY
    for kind, name in enumerate(KINDS):
        lost_Q = lost_Q + (kind_Q == kind) * drops.get(name, 0) / KIND_ACCURACY[kind]
    right_2Q[1] &= generator.random(len(asked_Q)) >= lost_Q
    score_2C = np.exp(CAPTION_TAIL * latent(every) - CAPTION_TAIL**2 / 2)
    score_2C[1] *= 1 - drops.get("caption", 0)
    found_2C = latent(every) > -ndtri(RECALL)
    found_2C[1] &= generator.random(images) >= drops.get("recall", 0) / RECALL
    truth_C = generator.random(images) < 0.5
    yes_2C = (latent(every) > -ndtri(F1_ACCURACY)) == truth_C

    values_N = np.concatenate([np.diff(rows.astype(float), axis=0)[0] for rows in (right_2Q, found_2C, score_2C)])
    part_N = np.repeat([0, 1, 2], [len(asked_Q), images, images])
    members = np.zeros((len(part_N), len(MARGINS) - 1), bool)
    questions = slice(len(asked_Q))
    members[questions, :5] = np.stack([np.ones(len(asked_Q)), *(kind_Q == k for k in range(3)), night_C[asked_Q]], 1)
    members[:, 5], members[:, 6] = part_N == 1, part_N == 2
    differences_NK = np.broadcast_to(values_N[:, None], members.shape)
    return Comparison(np.concatenate([asked_Q, every, every]), differences_NK, members, truth_C, yes_2C)


def measured(one: Comparison, seed: int, replicates: int) -> list[Bootstrap]:
    """One bootstrap for each of MARGINS."""
    means = bootstrap_means(one.differences_NK, one.images_N, seed, replicates, one.members_NK)
    return [*means, bootstrap_corpus(one.f1, np.arange(len(one.truth_C)), seed, replicates)]


def powers(found: Sequence[Bootstrap]) -> list[Power]:
    """For each rule's margin at the first step of Holm over the family."""
    alpha = ALPHA / len(MARGINS)
    return [
        power_check(one.variance, one.clusters, one.samples, margin, alpha, POWER, reach=float(name != "caption"))
        for one, (name, margin) in zip(found, MARGINS.items())
    ]


def planned(replicates: int, seed: int = 0) -> dict[str, int]:
    """Images that each rule's power check names, from a pilot: slices that few images have need more of them."""
    pilot = measured(draw(PILOT_IMAGES, {}, np.random.default_rng(seed)), seed, replicates)
    return {
        name: int(np.ceil(power.clusters_needed * PILOT_IMAGES / power.clusters))
        for name, power in zip(MARGINS, powers(pilot))
    }


@dataclass(frozen=True)
class Outcome:
    """What each way of judging says of one comparison; arrays over the rules."""

    worse: np.ndarray  # shown to be worse at all, each test at ALPHA by itself
    worse_holm: np.ndarray  # the same with Holm over the family
    verdict: str
    plain: np.ndarray


def judged(found: Sequence[Bootstrap]) -> Outcome:
    margins = np.array(list(MARGINS.values()))
    estimates = np.array([one.estimate for one in found])
    p_worse = np.array([one.p_at_least(0) for one in found])
    beyond, _ = holm([one.p_at_least(-margin) for one, margin in zip(found, margins)], ALPHA)
    verdicts = {
        decide_by_p(one.estimate, one.p_at_most(-margin), float(p), margin, power, ALPHA).verdict
        for one, margin, p, power in zip(found, margins, beyond, powers(found))
    }
    verdict = next(word for word in ("FAIL", "INCONCLUSIVE", "PASS") if word in verdicts)
    return Outcome(p_worse <= ALPHA, holm(p_worse, ALPHA)[1], verdict, estimates < -margins)


def simulate(
    images: int, drops: dict[str, float], comparisons: int, replicates: int, label: str, seed: int = 1
) -> list[Outcome]:
    generators = np.random.default_rng(seed).spawn(comparisons)
    return [
        judged(measured(draw(images, drops, generator), index, replicates))
        for index, generator in enumerate(progress(generators, comparisons, label))
    ]


def share(flags: Sequence[bool]) -> str:
    return f"{np.mean(flags):.1%}"


def verdicts(outcomes: Sequence[Outcome]) -> str:
    counts = {word: np.mean([one.verdict == word for one in outcomes]) for word in ("PASS", "INCONCLUSIVE", "FAIL")}
    return " / ".join(f"{count:.1%}" for count in counts.values())


def false_alarms(images: Sequence[int], comparisons: int, replicates: int) -> Table:
    shown = Table(title=f"A/A, {comparisons} comparisons, {len(MARGINS)} rules: share with any false alarm")
    for head in ("images", "Holm", "each test at 5%", "PASS / INCONCLUSIVE / FAIL", "plain threshold"):
        shown.add_column(head)
    for number in images:
        found = simulate(number, {}, comparisons, replicates, f"A/A, {number} images")
        shown.add_row(
            f"{number:,}", share([one.worse_holm.any() for one in found]), share([one.worse.any() for one in found]),
            verdicts(found), share([one.plain.any() for one in found]),
        )
    return shown


def caught(plan: dict[str, int], comparisons: int, replicates: int) -> Table:
    shown = Table(title=f"A true drop at the number that the power check names, {comparisons} comparisons each")
    for head in ("drop", "images", "rule shows it (Holm)", "PASS / INCONCLUSIVE / FAIL", "plain threshold, that rule"):
        shown.add_column(head)
    for name, times in (("accuracy", 1), ("count", 1), ("night", 1), ("caption", 1), ("accuracy", 2)):
        drop, index = times * MARGINS[name], list(MARGINS).index(name)
        found = simulate(plan[name], {name: drop}, comparisons, replicates, f"{name} down by {drop:g}")
        shown.add_row(
            f"{name} {drop:g}, {'the margin' if times == 1 else 'twice the margin'}", f"{plan[name]:,}",
            share([one.worse_holm[index] for one in found]), verdicts(found),
            share([one.plain[index] for one in found]),
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--comparisons", type=int, default=1000, help="A/A comparisons; a third of that for each drop")
    parser.add_argument("--replicates", type=int, default=1000, help="of each bootstrap (default: 1000)")
    arguments = parser.parse_args()
    start = time.monotonic()
    plan = planned(arguments.replicates)
    print("images named by the power check:", ", ".join(f"{name} {number:,}" for name, number in plan.items()))
    most = max(plan.values())
    alarms = false_alarms((most, most // 4), arguments.comparisons, arguments.replicates)
    Console().print(alarms, caught(plan, arguments.comparisons // 3, arguments.replicates))
    print(f"targets: Holm at most {ALPHA:.0%} in A/A; each drop of the margin shown in at least {POWER:.0%}")
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
