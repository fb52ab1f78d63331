"""Pictures and texts in one space: similarity scores, retrieval, zero-shot classes, and pairs that swap words.

Shapes: I images, C captions, P prompts of a class, E width of the space, K captions and images of a group.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics.result import MetricResult, check_same_samples, mean, unit_vector

CLIP_SCORE_WEIGHT = 2.5


def clip_score(
    images: Mapping[Any, np.ndarray], texts: Mapping[Any, np.ndarray], weight: float = CLIP_SCORE_WEIGHT
) -> MetricResult:
    """CLIPScore: `weight` times the cosine of a picture and its caption, 0 where they point apart.

    Args:
        images, texts: an embedding [E] for each sample, of any length. The published numbers are those of CLIP
        ViT-B/32 with "A photo depicts " before each caption; another model or prompt has its own scale.

    Returns:
        value: from 0 to `weight`. details: `cosine`, the mean of the raw cosines, and `cosines`, each one by id.

    Source: Hessel et al., arXiv 2104.08718, section 3.
    """
    check_same_samples(texts, images, "clip_score")
    cosines = {}
    for sample in images:
        image_E, text_E = (unit_vector(side[sample], sample, "clip_score") for side in (images, texts))
        _check_width(image_E, text_E, sample, "clip_score")
        cosines[sample] = float(image_E @ text_E)
    scores = {sample: weight * max(cosine, 0.0) for sample, cosine in cosines.items()}
    return MetricResult(mean(scores), scores, {"cosine": mean(cosines), "cosines": cosines, "weight": weight})


def _check_width(one_E: np.ndarray, other_E: np.ndarray, sample: Any, metric: str) -> None:
    if one_E.shape != other_E.shape:
        raise UserError(
            f"{metric}: found embeddings {len(one_E)} and {len(other_E)} wide for {sample!r}; expected the same space"
        )


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
    rank_I, rank_C = retrieval_ranks(similarity, caption_to_image)
    details = {f"image_to_text@{k}": float((rank_I < k).mean()) for k in ks}
    details |= {f"text_to_image@{k}": float((rank_C < k).mean()) for k in ks}
    per_sample = {c: float(rank < min(ks)) for c, rank in enumerate(rank_C.tolist())}
    return MetricResult(mean(details), per_sample, details)


def retrieval_ranks(similarity: np.ndarray, caption_to_image: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """How many wrong captions each image [I], and how many wrong images each caption [C], puts before the right one.

    0 is best; of an image's captions the first one found counts. Arguments and ties as in `retrieval_recall`; -inf
    keeps a pair out of the race.
    """
    similarity_IC, image_of_C = _checked_similarity(similarity, caption_to_image)
    own_C = similarity_IC[image_of_C, np.arange(len(image_of_C))]
    best_I = np.full(len(similarity_IC), -np.inf, own_C.dtype)
    np.maximum.at(best_I, image_of_C, own_C)
    rank_I = -np.bincount(image_of_C, own_C >= best_I[image_of_C], len(similarity_IC)).astype(np.int64)
    rank_C = np.full(len(image_of_C), -1)
    # Row by row: the comparisons of a whole COCO test would take more memory than its similarities.
    for image, row_C in enumerate(similarity_IC):
        rank_I[image] += np.count_nonzero(row_C >= best_I[image])
        rank_C += row_C >= own_C
    return rank_I, rank_C


def _checked_similarity(similarity: np.ndarray, caption_to_image: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    similarity, image_of = np.asarray(similarity), np.asarray(caption_to_image, dtype=np.int64)
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


def class_embedding(prompts_PE: Any, name: Any) -> np.ndarray:
    """One vector [E] for a class from the embeddings of its prompts: normalise each, mean, normalise again.

    Source: CLIP, arXiv 2103.00020, section 3.1.4.
    """
    prompts = np.asarray(prompts_PE, dtype=np.float64)
    if prompts.ndim != 2 or not len(prompts):
        raise UserError(
            f"zero_shot_accuracy: found prompts of shape {prompts.shape} for the class {name!r}; "
            f"expected [prompts, width]"
        )
    units_PE = [unit_vector(prompt_E, name, "zero_shot_accuracy") for prompt_E in prompts]
    return unit_vector(np.mean(units_PE, axis=0), name, "zero_shot_accuracy")


def zero_shot_accuracy(
    images: Mapping[Any, np.ndarray], labels: Mapping[Any, Any], prompts: Mapping[Any, np.ndarray]
) -> MetricResult:
    """How often the nearest class is the right one. Ties count against the model.

    Args:
        images: an embedding [E] for each sample. labels: its class. prompts: for each class the embeddings [P, E] of
        its prompts, one for each template; see `class_embedding`.

    Returns:
        value: top-1. per_sample: 1 or 0. details: `top1`, and `top5` where there are more than five classes.
    """
    check_same_samples(images, labels, "zero_shot_accuracy")
    unknown = sorted({label for label in labels.values() if label not in prompts}, key=str)
    if unknown or len(prompts) < 2:
        raise UserError(
            f"zero_shot_accuracy: found {len(prompts)} classes and none called {unknown[:3]}; expected at least two, "
            f"and prompts for every label"
        )
    place = {name: i for i, name in enumerate(prompts)}
    classes = [class_embedding(embeddings, name) for name, embeddings in prompts.items()]
    ranks = {}
    for sample, label in labels.items():
        image_E = unit_vector(images[sample], sample, "zero_shot_accuracy")
        for other_E in classes:
            _check_width(image_E, other_E, sample, "zero_shot_accuracy")
        scores = np.stack(classes) @ image_E
        ranks[sample] = int((scores >= scores[place[label]]).sum()) - 1
    top = {k: {sample: float(rank < k) for sample, rank in ranks.items()} for k in (1, 5)}
    details = {f"top{k}": mean(hits) for k, hits in top.items() if k == 1 or len(prompts) > k}
    return MetricResult(details["top1"], top[1], details)


def group_scores(scores: Mapping[Any, np.ndarray]) -> MetricResult:
    """Groups of pictures and captions that differ by a swap, each caption true of one picture: Winoground's scores.

    Args:
        scores: for each group the similarities [K, K] by caption and picture; caption k belongs to picture k.

    Returns:
        value: `group`. per_sample: its 1 or 0. details: `text` (of each picture, its caption scores higher than every
        other), `image` (of each caption, its picture does), `group` (both). Equal scores don't count: strictly `>`.

    Source: arXiv 2204.03162, section 3.2.
    """
    if not scores:
        raise UserError("group_scores: found no groups; expected at least one; check the evaluation set")
    text, image = {}, {}
    for sample, values in scores.items():
        values_KK = np.asarray(values, dtype=np.float64)
        if values_KK.ndim != 2 or values_KK.shape[0] != values_KK.shape[1] or len(values_KK) < 2:
            raise UserError(f"group_scores: found scores of shape {values_KK.shape} for {sample!r}; expected [2, 2]")
        if not np.isfinite(values_KK).all():
            raise UserError(f"group_scores: found a score that is no number for {sample!r}; expected finite scores")
        own_K, others_KK = np.diag(values_KK), np.where(np.eye(len(values_KK), dtype=bool), -np.inf, values_KK)
        text[sample] = float((own_K > others_KK.max(axis=0)).all())
        image[sample] = float((own_K > others_KK.max(axis=1)).all())
    both = {sample: text[sample] * image[sample] for sample in scores}
    return MetricResult(mean(both), both, {"text": mean(text), "image": mean(image), "group": mean(both)})


def choice_accuracy(scores: Mapping[Any, Sequence[float]]) -> MetricResult:
    """The share of samples whose first text, the true one, scores higher than every other: SugarCrepe's accuracy.

    Args:
        scores: for each sample those of its texts, two or more. Equal scores don't count: strictly `>`.

    Source: arXiv 2306.14610, section 4.
    """
    if not scores:
        raise UserError("choice_accuracy: found no samples; expected at least one; check the evaluation set")
    hits = {}
    for sample, values in scores.items():
        if len(values) < 2 or not np.isfinite(values).all():
            raise UserError(f"choice_accuracy: found the scores {list(values)} for {sample!r}; expected two or more "
                            f"finite numbers")
        hits[sample] = float(values[0] > max(values[1:]))
    return MetricResult(mean(hits), hits)
