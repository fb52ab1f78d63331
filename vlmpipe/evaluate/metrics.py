"""Metrics: pure functions on plain dicts keyed by sample id. Rates lie in [0, 1].

A metric over nothing, over missing predictions or with NaN raises `UserError`; it never returns a pretty number.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from vlmpipe.errors import UserError


@dataclass(frozen=True)
class MetricResult:
    """`value` sums up; `per_sample` holds each sample's share by id, where the metric decomposes."""

    value: float
    per_sample: dict[Any, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def check_same_samples(found: Mapping, expected: Mapping, metric: str) -> None:
    """Raise `UserError` unless both mappings hold the same sample ids and there is at least one."""
    if not expected:
        raise UserError(f"{metric}: found no samples; expected at least one; check the evaluation set")
    for odd, what in (
        (expected.keys() - found.keys(), "no prediction for"),
        (found.keys() - expected.keys(), "predictions for unknown"),
    ):
        if odd:
            example = min(odd, key=str)
            raise UserError(f"{metric}: found {what} samples ({len(odd)}, such as {example!r}); expected one each")


# --- VQA accuracy ------------------------------------------------------------------------------------------

_PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD_NOT_BEFORE_DIGIT = re.compile(r"\.(?!\d)")
# The official call hands re.UNICODE (32) to `sub` as its count, so that only the first 32 periods go.
_PERIODS_REMOVED = 32
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = {"a", "an", "the"}

# The official table maps a contraction written with one apostrophe missing to the full one. Its capitalised
# entries ("Im") can never match, because the text is lower-cased first: they are left out.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
    there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll
    you're you've 'ow's'at
"""


def _contraction_table() -> dict[str, str]:
    table = {}
    for full in _CONTRACTIONS.split():
        for i, letter in enumerate(full):
            if letter == "'":
                table[full[:i] + full[i + 1 :]] = full
    # As published, the wrong way round.
    return table | {"somebody'd": "somebodyd"}


_CONTRACTION_OF = _contraction_table()


def normalise_answer(answer: str) -> str:
    """The official VQA normalisation: punctuation, number words, articles, contractions.

    Source: VQAEval.processPunctuation and processDigitArticle of github.com/GT-Vision-Lab/VQA, quirks kept:
    `a/b` gives `b`, `none` gives `0`, `t-shirt` gives `t shirt`, `U.S.A.` gives `usa`, `3.5` stays.
    """
    numeric_comma = _COMMA_IN_NUMBER.search(answer) is not None
    text = answer
    for mark in _PUNCTUATION:
        glued = numeric_comma or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if glued else " ")
    text = _PERIOD_NOT_BEFORE_DIGIT.sub("", text, count=_PERIODS_REMOVED)
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTION_OF.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(
    predictions: Mapping[Any, str],
    answers: Mapping[Any, Sequence[str | Mapping]],
    mode: Literal["official", "plain"] = "official",
) -> MetricResult:
    """Leave-one-out mean of min(matches / 3, 1) over each question's human answers (usually ten).

    An answer is text, or a record of an official annotation file with the key `answer`.

    "official" normalises only where the answers differ; elsewhere the prediction must match to the letter. It
    leaves out every record equal to the one left out, as the official evaluator does: VQAv2's carry an
    `answer_id` and are never equal, VizWiz's don't, which costs its questions points. "plain" always normalises
    and leaves out exactly one. With fewer than four answers a question can't reach 1.

    Source: VQAEval.evaluate of github.com/GT-Vision-Lab/VQA (arXiv 1505.00468).
    """
    if mode not in ("official", "plain"):
        raise UserError(f"vqa_accuracy: found mode {mode!r}; expected 'official' or 'plain'")
    check_same_samples(predictions, answers, "vqa_accuracy")
    per_sample = {}
    for sample, references in answers.items():
        if not isinstance(predictions[sample], str):
            raise UserError(f"vqa_accuracy: found the prediction {predictions[sample]!r} for {sample!r}; expected text")
        if len(references) < 2:
            raise UserError(f"vqa_accuracy: found {len(references)} answers for {sample!r}; expected ten, at least two")
        per_sample[sample] = _vqa_score(predictions[sample], references, official=mode == "official")
    return MetricResult(_mean(per_sample), per_sample, {"mode": mode})


def _vqa_score(prediction: str, references: Sequence[str | Mapping], official: bool) -> float:
    texts = [_one_line(record if isinstance(record, str) else record["answer"]) for record in references]
    prediction = _one_line(prediction)
    if not official or len(set(texts)) > 1:
        prediction, *texts = (normalise_answer(text) for text in (prediction, *texts))
    records = [
        {**record, "answer": text} if official and isinstance(record, Mapping) else i
        for i, (record, text) in enumerate(zip(references, texts, strict=True))
    ]
    matching = [record for record, text in zip(records, texts, strict=True) if text == prediction]
    others = (sum(match != left_out for match in matching) for left_out in records)
    return sum(min(1.0, count / 3) for count in others) / len(records)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _mean(per_sample: Mapping[Any, float]) -> float:
    return math.fsum(per_sample.values()) / len(per_sample)


# --- retrieval ---------------------------------------------------------------------------------------------

def retrieval_recall(
    similarity: np.ndarray, caption_to_image: Sequence[int], ks: Sequence[int] = (1, 5, 10)
) -> MetricResult:
    """Recall at K in both directions, from similarity[image, caption] and each caption's image row.

    Image to text hits if any of the image's captions is in the top K; text to image has exactly one image.
    Ties count against the model, so that constant scores earn nothing.

    Returns:
        value: the mean over both directions and all K. per_sample: caption index -> text-to-image hit at the
        smallest K. details: `image_to_text@K` and `text_to_image@K`.
    """
    similarity_IC, image_of_C = _checked_similarity(similarity, caption_to_image)
    captions = np.arange(len(image_of_C))
    own_C = similarity_IC[image_of_C, captions]
    rank_C = (similarity_IC >= own_C).sum(axis=0) - 1
    is_own_IC = image_of_C[None, :] == np.arange(len(similarity_IC))[:, None]
    best_I = np.where(is_own_IC, similarity_IC, -np.inf).max(axis=1)
    rank_I = ((similarity_IC >= best_I[:, None]) & ~is_own_IC).sum(axis=1)
    details = {f"image_to_text@{k}": float((rank_I < k).mean()) for k in ks}
    details |= {f"text_to_image@{k}": float((rank_C < k).mean()) for k in ks}
    per_sample = {int(c): float(rank_C[c] < min(ks)) for c in captions}
    return MetricResult(_mean(details), per_sample, details)


def _checked_similarity(similarity: np.ndarray, caption_to_image: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    similarity, image_of = np.asarray(similarity, dtype=np.float64), np.asarray(caption_to_image, dtype=np.int64)
    if similarity.ndim != 2 or not similarity.size or similarity.shape[1] != len(image_of):
        raise UserError(
            f"retrieval_recall: found similarity of shape {similarity.shape} and {len(image_of)} captions; "
            f"expected [images, captions], at least one of each"
        )
    if np.isnan(similarity).any():
        raise UserError(f"retrieval_recall: found {int(np.isnan(similarity).sum())} NaN similarities; expected numbers")
    if set(image_of.tolist()) != set(range(len(similarity))):
        raise UserError("retrieval_recall: found an image or a caption without its partner; expected none")
    return similarity, image_of


# --- language modelling ------------------------------------------------------------------------------------

def perplexity(nll: Mapping[Any, float], tokens: Mapping[Any, int]) -> MetricResult:
    """exp(total negative log-likelihood / total tokens), over all tokens of all samples.

    Args:
        nll: each sample's summed negative log-likelihood in nats. tokens: how many tokens that sum covers.
    """
    check_same_samples(nll, tokens, "perplexity")
    for sample, count in tokens.items():
        if count < 1 or not math.isfinite(nll[sample]):
            raise UserError(
                f"perplexity: found a loss of {nll[sample]} over {count} tokens for {sample!r}; "
                f"expected a finite loss over at least one token"
            )
    total = math.fsum(nll.values()) / sum(tokens.values())
    per_sample = {sample: _exp(nll[sample] / count) for sample, count in tokens.items()}
    return MetricResult(_exp(total), per_sample, {"nats_per_token": total, "tokens": sum(tokens.values())})


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        raise UserError(f"perplexity: found {nats:.0f} nats per token; expected less than 710") from None
