"""Classification: the name of what a picture shows, out of all names that the test split has."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlmpipe.data.records import ClassRecord
from vlmpipe.data.task import CLASS_CAPTION, CLASS_QUESTION, TaskConfig
from vlmpipe.evaluate.metrics import calibration_counts, calibration_error
from vlmpipe.evaluate.store import Counts
from vlmpipe.evaluate.tasks.base import EvaluateConfig, Sample, Scores, file_id, means, mismatch, records_of
from vlmpipe.models import Processor, VisionLanguageModel
from vlmpipe.models.checks import check_answers
from vlmpipe.models.generate import answer_logits, choice_scores, embed_texts


def read_classes(split: Path, task: TaskConfig) -> list[Sample]:
    """One sample per picture; the wrong picture shows something else."""
    records = records_of(split, task, ClassRecord, "classification")
    wrong = mismatch({record.image: record.label for record in records}, f"classes in {split}")
    names = tuple(sorted({record.label for record in records}))
    return [
        Sample(file_id(record.id), record.image, wrong[record.image], CLASS_QUESTION, (record.label,), choices=names)
        for record in records
    ]


def predict_classes(
    model: VisionLanguageModel, processor: Processor, batch: Sequence[Sample], right: Sequence[Image.Image],
    wrong: Sequence[Image.Image], config: EvaluateConfig,
) -> list[dict]:
    """The name for either picture, and how sure the model is of that for the right one."""
    names = batch[0].choices
    (said, sure), (wrong_said, _) = (
        classify(model, processor, images, names, config.templates) for images in (right, wrong)
    )
    return [
        {"right": one, "sure": share, "wrong": other} for one, share, other in zip(said, sure, wrong_said, strict=True)
    ]


def classify(
    model: VisionLanguageModel, processor: Processor, images: Sequence[Image.Image], names: Sequence[str],
    templates: Sequence[str],
) -> tuple[list[str], list[float]]:
    """For each picture the likeliest name and its probability.

    A language model chooses among a caption for each name, a model of answers among those it knows, a dual encoder
    among the names by their distance times the scale that it learned.
    """
    if model.language_model is not None:
        captions = [CLASS_CAPTION.format(name) for name in names]
        logits_BA = choice_scores(model, processor, images, [""] * len(images), captions)
    elif model.answers is not None:
        names, logits_BA = processor.answers, answer_logits(model, processor, images, [CLASS_QUESTION] * len(images))
    else:
        check_answers(model)
        logits_BA = model.projection.scale() * name_cosines(model, processor, images, names, templates)
    sure_B, place_B = logits_BA.detach().float().softmax(dim=1).max(dim=1)
    return [names[place] for place in place_B.tolist()], sure_B.tolist()


@torch.no_grad()
def name_cosines(
    model: VisionLanguageModel, processor: Processor, images: Sequence[Image.Image], names: Sequence[str],
    templates: Sequence[str],
) -> Tensor:
    """[B, A] of each picture and each name."""
    weights_AE = name_embeddings(model, processor, names, templates)
    return model.encode_image(processor.images(images).to(model.device)) @ weights_AE.T


def name_embeddings(
    model: VisionLanguageModel, processor: Processor, names: Sequence[str], templates: Sequence[str]
) -> Tensor:
    """[A, E] unit norm: the mean over the templates of each name's embeddings (CLIP, arXiv 2103.00020, section
    3.1.4)."""
    texts = [template.format(name) for name in names for template in templates]
    parts = [embed_texts(model, processor, texts[at : at + 512]) for at in range(0, len(texts), 512)]
    return F.normalize(torch.cat(parts).unflatten(0, (len(names), -1)).mean(dim=1), dim=-1)


def score_classes(samples: list[Sample], rows: list[dict]) -> Scores:
    """Accuracy with either picture, and of the most common class for all; and how far the model's certainty is from
    how often it is right."""
    right, wrong = (
        {sample.id: float(row[which] == sample.answers[0]) for sample, row in zip(samples, rows, strict=True)}
        for which in ("right", "wrong")
    )
    hits = {key: bool(hit) for key, hit in right.items()}
    sure = {sample.id: row["sure"] for sample, row in zip(samples, rows, strict=True)}
    commonest = Counter(sample.answers[0] for sample in samples).most_common(1)[0][0]
    blind = {sample.id: float(sample.answers[0] == commonest) for sample in samples}
    counts = {
        "accuracy": means(right), "accuracy_wrong_image": means(wrong), "accuracy_blind": means(blind),
        "gain_over_blind": means({key: hit - blind[key] for key, hit in right.items()}),
        "calibration_error": Counts("calibration", calibration_counts(sure, hits)),
    }
    stored = {
        sample.id: {
            "prediction": row["right"], "score": right[sample.id], "wrong_prediction": row["wrong"],
            "wrong_score": wrong[sample.id],
        }
        for sample, row in zip(samples, rows, strict=True)
    }
    bins = calibration_error(sure, hits).details
    details = {"accuracy": {"classes": len(samples[0].choices)}, "calibration_error": bins}
    return Scores.of(counts, stored, details)
