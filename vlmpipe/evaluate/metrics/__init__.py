"""Metrics: pure functions on plain dicts keyed by sample id. Rates lie in [0, 1].

A metric over nothing, over missing predictions or with NaN raises `UserError`; it never returns a pretty number.
docs/metrics.md lists them all with their formulas, sources and quirks.
"""

from vlmpipe.evaluate.metrics.captions import bleu, bleu_counts, cider, rouge_l
from vlmpipe.evaluate.metrics.fairness import association, max_skew, ndkl, worst_group
from vlmpipe.evaluate.metrics.judgements import (
    chair,
    matching_accuracy,
    nlvr_consistency,
    pope,
    roc_area,
    says_yes,
    things_named,
)
from vlmpipe.evaluate.metrics.language import calibration_counts, calibration_error, perplexity
from vlmpipe.evaluate.metrics.pictures import fid, frechet_distance
from vlmpipe.evaluate.metrics.regions import Detections, box_iou, detection_map, refexp_accuracy, segmentation_iou
from vlmpipe.evaluate.metrics.result import MetricResult, check_same_samples
from vlmpipe.evaluate.metrics.similarity import (
    choice_accuracy,
    class_embedding,
    clip_score,
    group_scores,
    retrieval_ranks,
    retrieval_recall,
    zero_shot_accuracy,
)
from vlmpipe.evaluate.metrics.tokens import ptb_tokens
from vlmpipe.evaluate.metrics.vqa import answerability, normalise_answer, ranked_precision, vqa_accuracy

__all__ = [
    "Detections",
    "MetricResult",
    "answerability",
    "association",
    "bleu",
    "bleu_counts",
    "box_iou",
    "calibration_counts",
    "calibration_error",
    "chair",
    "check_same_samples",
    "choice_accuracy",
    "cider",
    "class_embedding",
    "clip_score",
    "detection_map",
    "fid",
    "frechet_distance",
    "group_scores",
    "matching_accuracy",
    "max_skew",
    "ndkl",
    "nlvr_consistency",
    "normalise_answer",
    "perplexity",
    "pope",
    "ptb_tokens",
    "ranked_precision",
    "refexp_accuracy",
    "retrieval_ranks",
    "retrieval_recall",
    "roc_area",
    "rouge_l",
    "says_yes",
    "segmentation_iou",
    "things_named",
    "vqa_accuracy",
    "worst_group",
    "zero_shot_accuracy",
]
