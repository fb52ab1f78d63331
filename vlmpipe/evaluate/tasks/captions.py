"""Captioning: whether picture and caption belong together, in whatever way a model can tell.

Shapes: B batch, T tokens, M scored tokens, E width of the shared space.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image

from vlmpipe.data.task import TaskConfig
from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import perplexity, retrieval_ranks
from vlmpipe.evaluate.store import Counts
from vlmpipe.evaluate.tasks.base import EvaluateConfig, Sample, Scores, means, mismatch
from vlmpipe.models import Processor, VisionLanguageModel
from vlmpipe.models.draw import picture_loss
from vlmpipe.models.generate import caption, embed_texts, picture_inputs, to_device
from vlmpipe.models.generate.rows import QUESTIONED
from vlmpipe.models.processor import stack
from vlmpipe.shards import check_file


def read_captions(directory: Path, task: TaskConfig | None = None) -> list[Sample]:
    """One sample per packed pair; the wrong picture is one with another caption."""
    rows = [row for _, row in packed_rows(directory, ["uid", "caption"])]
    wrong = mismatch({row["uid"]: row["caption"] for row in rows}, f"captions in {directory}")
    return [Sample(row["uid"], row["uid"], wrong[row["uid"]], "", (row["caption"],)) for row in rows]


def packed_pictures(directory: Path, keys: set, task: TaskConfig | None = None) -> dict[str, bytes]:
    return {uid: row["image"]["bytes"] for uid, row in packed_rows(directory, ["uid", "image"]) if uid in keys}


def packed_rows(directory: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """Yield (uid, row) of a packed split.

    Raises:
        UserError: there is no split, it is empty or damaged.
    """
    found, directory = False, Path(directory)
    for file in sorted(directory.glob("*.parquet")):
        check_file(directory.parent, f"{directory.name}/{file.name}")
        for batch in pq.ParquetFile(file).iter_batches(batch_size=256, columns=list(columns)):
            for row in batch.to_pylist():
                found = True
                yield row["uid"], row
    if not found:
        raise UserError(f"found no rows in {directory}; expected a packed split; rerun the pack stage")


def predict_captions(
    model: VisionLanguageModel, processor: Processor, batch: Sequence[Sample], right: Sequence[Image.Image],
    wrong: Sequence[Image.Image], config: EvaluateConfig,
) -> list[dict]:
    """A language model: its caption, and how well it expects the true one. A model that writes pictures: how well it
    expects either one after the true caption. A dual encoder: both embeddings. One that only says whether picture and
    text match: how sure it is of that for either one."""
    truth = [sample.answers[0] for sample in batch]
    if model.image_tokens is not None:
        return drawing_losses(model, processor, truth, right, wrong)
    if model.language_model is None and model.projection is not None:
        with torch.no_grad():
            images_BE = model.encode_image(processor.images(right).to(model.device)).float().cpu().numpy()
        texts_BE = embed_texts(model, processor, truth).float().cpu().numpy()
        return [{"image": image, "text": text} for image, text in zip(images_BE, texts_BE, strict=True)]
    if model.language_model is None:
        sure = (match(model, processor, pictures, truth) for pictures in (right, wrong))
        return [{"match": one, "wrong_match": other} for one, other in zip(*sure, strict=True)]
    said = caption(model, processor, right, config.caption_tokens)
    with_right, with_wrong = (caption_loss(model, processor, pictures, truth) for pictures in (right, wrong))
    return [
        {"said": text, "nll": nll, "tokens": tokens, "wrong_nll": wrong_nll}
        for text, (nll, tokens), (wrong_nll, _) in zip(said, with_right, with_wrong, strict=True)
    ]


def drawing_losses(
    model: VisionLanguageModel, processor: Processor, captions: Sequence[str], right: Sequence[Image.Image],
    wrong: Sequence[Image.Image],
) -> list[dict]:
    """How well each caption's picture, and another one, is expected after it."""
    with_right, with_wrong = (
        picture_loss(model, processor, processor.images(pictures), captions).tolist() for pictures in (right, wrong)
    )
    length = model.codes.config.length
    return [
        {"said": None, "nll": nll, "tokens": length, "wrong_nll": wrong_nll}
        for nll, wrong_nll in zip(with_right, with_wrong, strict=True)
    ]


@torch.no_grad()
def match(
    model: VisionLanguageModel, processor: Processor, images: Sequence[Image.Image], captions: Sequence[str]
) -> list[float]:
    """The log-odds that each picture and caption belong together.

    Raises:
        UserError: the model can't tell.
    """
    if model.matching is None:
        raise UserError(
            "found a model without heads.language_model, projection, image_tokens and matching; expected one of them "
            "for the task 'captioning'; choose other tasks in evaluate"
        )
    words = to_device(stack([[processor.encode(text)] for text in captions]), model)
    outputs = model(**picture_inputs(model, processor, images), **words, heads=("matching",))
    logits_B2 = outputs.matching.float()
    return (logits_B2[:, 1] - logits_B2[:, 0]).tolist()


@torch.no_grad()
def caption_loss(
    model: VisionLanguageModel, processor: Processor, images: Sequence[Image.Image], captions: Sequence[str]
) -> list[tuple[float, int]]:
    """(summed negative log-likelihood in nats, tokens) of each caption and its end, given its image."""
    batch = stack([[processor.encode_answer("", text)] for text in captions])
    scored_BT = (batch["labels"] != -100).to(model.device)
    labels_M = batch["labels"].to(model.device)[scored_BT]
    words = to_device(batch, model, QUESTIONED)
    outputs = model(**picture_inputs(model, processor, images), **words, select=scored_BT)
    loss_M = F.cross_entropy(outputs.logits.float(), labels_M, reduction="none")
    loss_BT = torch.zeros(scored_BT.shape, dtype=torch.float64, device=model.device)
    loss_BT[scored_BT] = loss_M.double()
    return list(zip(loss_BT.sum(dim=1).tolist(), scored_BT.sum(dim=1).tolist(), strict=True))


def score_captions(samples: list[Sample], rows: list[dict]) -> Scores:
    """Perplexity of the true captions with either picture (of either picture after the caption, where pictures are
    written), recall at 1 for a dual encoder, or how often the right picture is the better match."""
    if "image" in rows[0]:
        return score_retrieval(samples, rows)
    if "match" in rows[0]:
        return score_pairs(samples, rows)
    by_id = dict(zip((sample.id for sample in samples), rows, strict=True))
    tokens = {key: row["tokens"] for key, row in by_id.items()}
    nll, wrong_nll = ({key: row[which] for key, row in by_id.items()} for which in ("nll", "wrong_nll"))
    right, wrong = perplexity(nll, tokens), perplexity(wrong_nll, tokens)
    lost = {key: wrong_nll[key] - nll[key] for key in nll}
    counts = {
        name: Counts("exp_ratio", {key: (value, tokens[key]) for key, value in nats.items()})
        for name, nats in (("perplexity", nll), ("perplexity_wrong_image", wrong_nll), ("image_gain", lost))
    }
    stored = {
        key: {"prediction": row["said"], "score": right.per_sample[key], "wrong_score": wrong.per_sample[key]}
        for key, row in by_id.items()
    }
    return Scores.of(counts, stored, {"perplexity": right.details})


def score_retrieval(samples: list[Sample], rows: list[dict]) -> Scores:
    """Recall among samples with distinct captions: of a caption that stands twice no one picture is the right one."""
    distinct = {sample.answers[0]: index for index, sample in reversed(list(enumerate(samples)))}
    chosen = sorted(distinct.values())
    images = np.stack([rows[index]["image"] for index in chosen])
    texts = np.stack([rows[index]["text"] for index in chosen])
    ranks = dict(zip(("image_to_text", "text_to_image"), retrieval_ranks(images @ texts.T, range(len(chosen)))))
    ids = [samples[index].id for index in chosen]
    hits = {
        f"{way}@{k}": dict(zip(ids, (rank < k).astype(float).tolist(), strict=True))
        for way, rank in ranks.items() for k in (1, 5)
    }
    both = {key: (hits["image_to_text@1"][key] + hits["text_to_image@1"][key]) / 2 for key in ids}
    chance = 1 / len(ids)
    counts = {way: means(found) for way, found in hits.items()}
    counts |= {"recall@1": means(both), "recall@1_blind": means(dict.fromkeys(ids, chance))}
    stored = {sample.id: {"score": hits["text_to_image@1"].get(sample.id)} for sample in samples}
    return Scores.of(counts, stored, {"recall@1": {"chance": chance}})


def score_pairs(samples: list[Sample], rows: list[dict]) -> Scores:
    """The share of captions whose own picture matches better than a wrong one, ties lost; half of them by chance."""
    hits = {sample.id: float(row["match"] > row["wrong_match"]) for sample, row in zip(samples, rows, strict=True)}
    counts = {"pair_accuracy": means(hits), "pair_accuracy_blind": means(dict.fromkeys(hits, 0.5))}
    return Scores.of(counts, {key: {"score": hit} for key, hit in hits.items()})
