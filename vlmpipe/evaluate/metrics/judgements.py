"""Yes or no, and things that aren't there: NLVR2's consistency, pairs that match, POPE and CHAIR."""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics.result import MetricResult, check_same_samples, mean, truth_value
from vlmpipe.evaluate.metrics.tokens import ptb_tokens


def nlvr_consistency(
    predictions: Mapping[Any, bool], labels: Mapping[Any, bool], sentences: Mapping[Any, Any]
) -> MetricResult:
    """The share of sentences whose every example is judged rightly.

    Args:
        sentences: for each sample, what tells its sentence from others (the text, or an id).

    Returns:
        per_sample: by sentence, 1 or 0. details: `accuracy` over examples, and how many `sentences` there are.

    Source: NLVR2, arXiv 1811.00491, section 5.
    """
    check_same_samples(predictions, labels, "nlvr_consistency")
    check_same_samples(sentences, labels, "nlvr_consistency")
    right = {
        sample: float(_judged(predictions[sample], sample, "nlvr_consistency")
                      == truth_value(label, sample, "nlvr_consistency"))
        for sample, label in labels.items()
    }
    whole: dict[Any, float] = {}
    for sample, hit in right.items():
        whole[sentences[sample]] = min(hit, whole.get(sentences[sample], 1.0))
    return MetricResult(mean(whole), whole, {"accuracy": mean(right), "sentences": len(whole)})


def pope(predictions: Mapping[Any, bool | str], labels: Mapping[Any, bool]) -> MetricResult:
    """POPE: whether a model says that something is in the picture that isn't.

    Args:
        predictions: yes or no, or what the model said; see `says_yes`. labels: whether the thing is there.

    Returns:
        value: `accuracy`. per_sample: 1 or 0. details: `accuracy`, `precision`, `recall`, `f1` of "yes", and
        `yes_ratio`, the share of "yes" among the answers. Precision and f1 of a model that never says yes are 0.

    Source: arXiv 2305.10355, section 5.
    """
    check_same_samples(predictions, labels, "pope")
    counts: Counter[tuple[bool, bool]] = Counter()
    right = {}
    for sample, label in labels.items():
        said, true = _judged(predictions[sample], sample, "pope"), truth_value(label, sample, "pope")
        right[sample] = float(said == true)
        counts[said, true] += 1
    hits = counts[True, True]
    present, yes = hits + counts[False, True], hits + counts[True, False]
    if not present:
        raise UserError("pope: found no question whose answer is yes; expected some, or recall has no meaning")
    details = {
        "accuracy": mean(right), "precision": hits / yes if yes else 0.0, "recall": hits / present,
        "f1": 2 * hits / (yes + present), "yes_ratio": yes / len(right),
    }
    return MetricResult(details["accuracy"], right, details)


def says_yes(answer: str) -> bool:
    """How POPE reads an answer: no if its first sentence has the word "no", "No" or "not", else yes.

    So "Nope" and an empty answer are a yes, as published.
    """
    return not {"No", "no", "not"} & set(answer.partition(".")[0].replace(",", "").split(" "))


def _judged(value: Any, sample: Any, metric: str) -> bool:
    return says_yes(value) if isinstance(value, str) and metric == "pope" else truth_value(value, sample, metric)


def matching_accuracy(true: Mapping[Any, float], swapped: Mapping[Any, float]) -> MetricResult:
    """Whether a model says yes to true pairs and no to swapped ones.

    Args:
        true, swapped: for each sample the log-odds of the true pair and of a false one; above 0 is a yes.

    Returns:
        value: `accuracy`. per_sample: the mean of both answers, 0, ½ or 1. details: `auc`, the chance that a true pair
        scores higher than a swapped one, of any samples, equal scores counting half (the area under the ROC curve;
        Hanley and McNeil 1982); `true_positive_rate`, `false_positive_rate`.
    """
    check_same_samples(true, swapped, "matching_accuracy")
    true_N, swapped_N = (np.array([odds[sample] for sample in swapped], float) for odds in (true, swapped))
    if np.isnan(true_N).any() or np.isnan(swapped_N).any():
        raise UserError("matching_accuracy: found NaN log-odds; expected numbers; look at the model's output")
    ordered_N = np.sort(swapped_N)
    below_N = np.searchsorted(ordered_N, true_N, "left") + np.searchsorted(ordered_N, true_N, "right")
    right = {
        sample: (float(yes > 0) + float(no <= 0)) / 2
        for sample, yes, no in zip(swapped, true_N.tolist(), swapped_N.tolist(), strict=True)
    }
    details = {
        "accuracy": mean(right), "auc": float(below_N.mean() / 2 / len(ordered_N)),
        "true_positive_rate": float((true_N > 0).mean()), "false_positive_rate": float((swapped_N > 0).mean()),
    }
    return MetricResult(details["accuracy"], right, details)


def roc_area(weights_BN: np.ndarray, counts_NM: np.ndarray) -> np.ndarray:
    """The `auc` [B] of `matching_accuracy` for each draw of the samples, from their odds true and swapped, [N, 2]."""
    weights_BN, (true_N, swapped_N) = np.asarray(weights_BN, float), counts_NM.T
    order_N = np.argsort(swapped_N, kind="stable")
    below_BN = np.pad(weights_BN[:, order_N].cumsum(axis=1), ((0, 0), (1, 0)))
    places = [np.searchsorted(swapped_N[order_N], true_N, side) for side in ("left", "right")]
    beaten_BN = (below_BN[:, places[0]] + below_BN[:, places[1]]) / 2
    return (weights_BN * beaten_BN).sum(axis=1) / weights_BN.sum(axis=1) ** 2


def chair(
    captions: Mapping[Any, str], objects: Mapping[Any, Collection[str]], vocabulary: Mapping[str, str]
) -> MetricResult:
    """CHAIR: how often captions name things that aren't in their pictures.

    Args:
        objects: the names of all that is in each picture; officially from the boxes and from the reference captions.
        vocabulary: every word or phrase for a thing, and the thing's name ("hot dog": "hot dog", "puppy": "dog").
        Phrases win over the words in them, so "toilet seat": "toilet" keeps its seat from being a chair. English
        plurals by rule are found too; irregular ones ("men") want an entry.

    Returns:
        value: `s`, the share of captions that name at least one wrong thing. per_sample: 1 or 0. details: `s`; `i`, the
        wrong ones of all namings (a thing named twice counts twice); `mentions`; `wrong`, the names by caption.

    Source: arXiv 1809.02156, section 2.1.
    """
    check_same_samples(captions, objects, "chair")
    unknown = sorted(set().union(*objects.values()) - set(vocabulary.values()))
    if unknown:
        raise UserError(
            f"chair: found the objects {unknown[:3]} ({len(unknown)}) in pictures but no word for them; expected the "
            f"names that the vocabulary gives"
        )
    mentions, wrong = 0, {}
    for sample, present in objects.items():
        if not isinstance(captions[sample], str):
            raise UserError(f"chair: found the caption {captions[sample]!r} for {sample!r}; expected text")
        named = things_named(captions[sample], vocabulary)
        mentions += len(named)
        wrong[sample] = [name for name in named if name not in present]
    if not mentions:
        raise UserError("chair: found no word of the vocabulary in any caption; expected captions that name things")
    any_wrong = {sample: float(bool(names)) for sample, names in wrong.items()}
    details = {
        "s": mean(any_wrong), "i": sum(map(len, wrong.values())) / mentions, "mentions": mentions,
        "wrong": {sample: names for sample, names in wrong.items() if names},
    }
    return MetricResult(details["s"], any_wrong, details)


def things_named(caption: str, vocabulary: Mapping[str, str]) -> list[str]:
    """The things that a caption names, in order; of phrases that begin alike the longest."""
    words, longest = ptb_tokens(caption), max((len(phrase.split()) for phrase in vocabulary), default=0)
    names, i = [], 0
    while i < len(words):
        for size in range(min(longest, len(words) - i), 0, -1):
            phrase = " ".join(words[i : i + size])
            entry = next((form for form in (phrase, *_singulars(phrase)) if form in vocabulary), None)
            if entry is not None:
                names.append(vocabulary[entry])
                i += size - 1
                break
        i += 1
    return names


def _singulars(phrase: str) -> list[str]:
    """What an English plural may be the plural of."""
    rules = ((r"ies$", "y"), (r"ves$", "f"), (r"ves$", "fe"), (r"es$", ""), (r"s$", ""))
    return [re.sub(ending, single, phrase) for ending, single in rules if re.search(ending, phrase)]
