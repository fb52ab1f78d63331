"""Captions against what people wrote: BLEU, ROUGE-L and CIDEr-D, to the numbers of the COCO caption evaluation.

METEOR and SPICE are not here. Both are Java programs (METEOR 1.5 with its tables of paraphrases, SPICE with a parser),
no kept library carries them without, and a re-implementation would give other numbers under the same names.

An empty caption is a prediction like any other, and scores 0.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics.result import MetricResult, check_same_samples, mean
from vlmpipe.evaluate.metrics.tokens import ptb_tokens

Tokenizer = Literal["ptb", "plain"] | Callable[[str], Sequence[str]]
TOKENIZERS: dict[str, Callable[[str], Sequence[str]]] = {"ptb": ptb_tokens, "plain": str.split}
ORDERS = (1, 2, 3, 4)
# The official scorer adds these above and below, so that nothing is divided by zero.
_TINY, _SMALL = 1e-15, 1e-9


def bleu(
    candidates: Mapping[Any, str], references: Mapping[Any, Sequence[str]], tokenize: Tokenizer = "ptb"
) -> MetricResult:
    """BLEU-4 of the corpus: n-grams of all captions counted together, against the reference of the closest length.

    Args:
        tokenize: "ptb" (see `tokens`), "plain" (split at white space, nothing else), or what makes words of a text.

    Returns:
        per_sample: BLEU-4 of the sentence alone, which does not average to the corpus's. details: `bleu1` to `bleu4`,
        and `length_ratio`, words written by words of the closest references.

    Of two references equally close in length the shorter counts. The official scorer's constants are kept: without a
    single right 4-gram BLEU-4 is about 1e-4, not 0.

    Source: Papineni et al. 2002, as the COCO caption evaluation counts it (arXiv 1504.00325).
    """
    counts = _all_bleu_counts(candidates, references, tokenize)
    matched, written = ([sum(c[side][k] for c in counts.values()) for k in range(len(ORDERS))] for side in (0, 1))
    length, closest = (sum(c[side] for c in counts.values()) for side in (2, 3))
    corpus = _bleu(matched, written, length, closest)
    details = {f"bleu{n}": score for n, score in zip(ORDERS, corpus, strict=True)}
    details |= {"length_ratio": length / max(closest, 1)}
    return MetricResult(corpus[-1], {sample: _bleu(*c)[-1] for sample, c in counts.items()}, details)


def bleu_counts(
    candidates: Mapping[Any, str], references: Mapping[Any, Sequence[str]], tokenize: Tokenizer = "ptb"
) -> dict[Any, list[int]]:
    """What each caption adds to `bleu`: right n-grams and n-grams (n = 1..4), words, words of the closest reference."""
    counts = _all_bleu_counts(candidates, references, tokenize)
    return {sample: [*right, *written, length, closest] for sample, (right, written, length, closest) in counts.items()}


def _all_bleu_counts(candidates: Mapping, references: Mapping, tokenize: Tokenizer) -> dict[Any, tuple]:
    words, truth = _tokenized(candidates, references, tokenize, "bleu")
    return {sample: _bleu_counts(words[sample], truth[sample]) for sample in truth}


def _bleu_counts(words: Sequence[str], references: list[Sequence[str]]) -> tuple[list[int], list[int], int, int]:
    """Right n-grams, n-grams (each for n = 1..4), words, words of the closest reference."""
    most = Counter()
    for reference in references:
        most |= ngrams(reference)
    right = Counter()
    for gram, count in ngrams(words).items():
        right[len(gram)] += min(count, most[gram])
    closest = min((abs(len(reference) - len(words)), len(reference)) for reference in references)[1]
    return [right[n] for n in ORDERS], [max(0, len(words) - n + 1) for n in ORDERS], len(words), closest


def _bleu(right: Sequence[int], written: Sequence[int], length: int, closest: int) -> list[float]:
    ratio = (length + _TINY) / (closest + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if length and ratio < 1 else float(length > 0)
    product, scores = 1.0, []
    for n, hits, total in zip(ORDERS, right, written, strict=True):
        product *= (hits + _TINY) / (total + _SMALL)
        scores.append(product ** (1 / n) * brevity)
    return scores


def rouge_l(
    candidates: Mapping[Any, str], references: Mapping[Any, Sequence[str]], tokenize: Tokenizer = "ptb",
    beta: float = 1.2,
) -> MetricResult:
    """ROUGE-L: how much of the words, in their order, a caption shares with its references; the mean over captions.

    Precision and recall are each the best over the references, so they may come from two different ones.

    Source: Lin 2004, as the COCO caption evaluation counts it (beta 1.2, which weighs recall more).
    """
    words, truth = _tokenized(candidates, references, tokenize, "rouge_l")
    scores = {sample: _rouge_l(words[sample], truth[sample], beta) for sample in truth}
    return MetricResult(mean(scores), scores, {"beta": beta})


def _rouge_l(words: Sequence[str], references: list[Sequence[str]], beta: float) -> float:
    shared = [longest_common(words, reference) for reference in references]
    if not max(shared):
        return 0.0
    precision = max(shared) / len(words)
    recall = max(count / len(reference) for count, reference in zip(shared, references, strict=True) if reference)
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest sequence of words that both have in this order, gaps allowed."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for i, other_word in enumerate(other, start=1):
            above = row[i]
            row[i] = before + 1 if word == other_word else max(above, row[i - 1])
            before = above
    return row[-1]


def cider(
    candidates: Mapping[Any, str], references: Mapping[Any, Sequence[str]], tokenize: Tokenizer = "ptb",
    sigma: float = 6.0,
) -> MetricResult:
    """CIDEr-D: the cosine of n-gram counts, n = 1..4, weighted by how few pictures an n-gram is said of; times 10.

    How many pictures an n-gram is said of is counted in the references given here, so the score of one caption changes
    with the others; of a single picture every weight, and the score, is 0. Counts are clipped to the reference's, and
    a caption of another length is punished with a Gaussian of width `sigma`.

    Returns:
        value: the mean over captions, from 0 to 10. per_sample: each one's.

    Source: Vedantam et al., arXiv 1411.5726, section 4 and 7; lengths as the COCO caption evaluation counts them (in
    pairs of words).
    """
    words, truth = _tokenized(candidates, references, tokenize, "cider")
    pictures = Counter(chain.from_iterable(
        set(chain.from_iterable(ngrams(reference) for reference in texts)) for texts in truth.values()
    ))
    rarity = _Rarity(math.log(len(truth)), pictures)
    scores = {}
    for sample, texts in truth.items():
        vector = rarity.vector(words[sample])
        scores[sample] = math.fsum(_cider(vector, rarity.vector(text), sigma) for text in texts) / len(texts)
    return MetricResult(mean(scores), scores, {"sigma": sigma, "pictures": len(truth)})


class _Rarity:
    """Weighs n-grams: log of all pictures by those that the n-gram is said of."""

    def __init__(self, log_pictures: float, said_of: Counter):
        self.log_pictures, self.said_of = log_pictures, said_of

    def vector(self, words: Sequence[str]) -> tuple[list[dict[tuple, float]], list[float], int]:
        """Weighted counts and their norm for n = 1..4, and the length in pairs of words."""
        weights: list[dict[tuple, float]] = [{} for _ in ORDERS]
        for gram, count in ngrams(words).items():
            weights[len(gram) - 1][gram] = count * (self.log_pictures - math.log(max(1, self.said_of[gram])))
        norms = [math.sqrt(math.fsum(w * w for w in of_order.values())) for of_order in weights]
        return weights, norms, max(0, len(words) - 1)


def _cider(found: tuple, true: tuple, sigma: float) -> float:
    (weights, norms, length), (true_weights, true_norms, true_length) = found, true
    cosines = (
        math.fsum(min(w, b[gram]) * b[gram] for gram, w in a.items() if gram in b) / (norm * true_norm)
        for a, b, norm, true_norm in zip(weights, true_weights, norms, true_norms, strict=True)
        if norm and true_norm
    )
    return 10 * math.exp(-((length - true_length) ** 2) / (2 * sigma**2)) * math.fsum(cosines) / len(ORDERS)


def ngrams(words: Sequence[str]) -> Counter:
    """How often each run of one to four words comes."""
    return Counter(tuple(words[i : i + n]) for n in ORDERS for i in range(len(words) - n + 1))


def _tokenized(
    candidates: Mapping[Any, str], references: Mapping[Any, Sequence[str]], tokenize: Tokenizer, metric: str
) -> tuple[dict[Any, Sequence[str]], dict[Any, list[Sequence[str]]]]:
    check_same_samples(candidates, references, metric)
    if not callable(tokenize) and tokenize not in TOKENIZERS:
        raise UserError(f"{metric}: found tokenize {tokenize!r}; expected one of {sorted(TOKENIZERS)}, or a function")
    split = tokenize if callable(tokenize) else TOKENIZERS[tokenize]
    for sample, texts in references.items():
        if isinstance(texts, str) or not all(isinstance(text, str) for text in (*texts, candidates[sample])):
            raise UserError(f"{metric}: found {candidates[sample]!r} against {texts!r} for {sample!r}; expected a text "
                            f"against a list of texts")
    truth = {sample: [split(text) for text in texts] for sample, texts in references.items()}
    for sample, texts in truth.items():
        if not any(texts):
            raise UserError(f"{metric}: found no word in the references {references[sample]!r} of {sample!r}; "
                            f"expected at least one")
    return {sample: split(candidates[sample]) for sample in truth}, truth
