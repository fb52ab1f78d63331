"""Answers to questions: the accuracy of VQA, and whether a question can be answered at all."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics.result import MetricResult, check_same_samples, mean, probability, truth_value

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
    return MetricResult(mean(per_sample), per_sample, {"mode": mode})


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


def answerability(probabilities: Mapping[Any, float], answerable: Mapping[Any, bool]) -> MetricResult:
    """How well a model tells the questions that its picture can't answer: VizWiz's second task.

    What counts as found is the question that can NOT be answered, as the official evaluator turns both sides round.

    Args:
        probabilities: that the question can be answered, from 0 to 1. answerable: the annotation, true or 1 if it can.

    Returns:
        value: average precision, each step of recall times the precision there, without interpolation; equal
        probabilities make one step. details: `average_precision`, and `f1` of those whose complement exceeds 0.5.

    Source: evaluate_unanswerability of the VizWiz evaluation code (arXiv 1802.08218).
    """
    check_same_samples(probabilities, answerable, "answerability")
    lacking = np.array([not truth_value(value, sample, "answerability") for sample, value in answerable.items()])
    doubt = np.array([1.0 - probability(probabilities[sample], sample, "answerability") for sample in answerable])
    if not lacking.any():
        raise UserError("answerability: found no question that can't be answered; expected at least one to be found")
    precision = average_precision(doubt, lacking)
    said = doubt > 0.5
    f1 = 2 * int((said & lacking).sum()) / int(said.sum() + lacking.sum())
    return MetricResult(precision, {}, {"average_precision": precision, "f1": f1})


def average_precision(scores_N: np.ndarray, wanted_N: np.ndarray) -> float:
    """The sum over falling scores of (gain in recall) x (precision); samples of equal score come in together."""
    order = np.argsort(-scores_N, kind="stable")
    scores, hits = scores_N[order], np.cumsum(wanted_N[order])
    last_of_score = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    precision, recall = hits[last_of_score] / (last_of_score + 1), hits[last_of_score] / hits[-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def ranked_precision(weights_BN: np.ndarray, counts_NM: np.ndarray) -> np.ndarray:
    """`average_precision` [B] of each draw of the samples, from their score and whether they are wanted, [N, 2].

    NaN where a draw has none that is wanted.
    """
    order_N = np.argsort(-counts_NM[:, 0], kind="stable")
    scores_N, wanted_N = counts_NM[order_N].T
    last = np.append(np.flatnonzero(np.diff(scores_N)), len(scores_N) - 1)
    drawn_BN = np.asarray(weights_BN, float)[:, order_N]
    hits_BT, all_BT = (values_BN.cumsum(axis=1)[:, last] for values_BN in (drawn_BN * wanted_N, drawn_BN))
    with np.errstate(divide="ignore", invalid="ignore"):
        precision_BT = np.where(all_BT > 0, hits_BT / all_BT, 0.0)
        return (np.diff(hits_BT, axis=1, prepend=0.0) * precision_BT).sum(axis=1) / hits_BT[:, -1]
