"""Retrieval: a picture's captions among all captions, and a caption's picture among all pictures.

Shapes: I pictures, C captions, K pictures of a race, E width of the shared space.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from vlmpipe.data.records import CaptionRecord
from vlmpipe.data.task import TaskConfig
from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import retrieval_ranks
from vlmpipe.evaluate.store import Counts
from vlmpipe.evaluate.tasks.base import EvaluateConfig, Sample, Scores, file_id, means, records_of
from vlmpipe.evaluate.tasks.pairs import embed_images, pair_scores
from vlmpipe.models import Processor, VisionLanguageModel
from vlmpipe.models.generate import embed_texts

KS = (1, 5, 10)
CANDIDATES = 8  # pictures of a race, where each pair of picture and caption costs a pass of the model
WAYS = ("image_to_text", "text_to_image")
Ranks = dict[str, dict[str, list[int]]]  # by way and sample


def read_retrieval(split: Path, task: TaskConfig) -> list[Sample]:
    """One sample per picture with all its captions; its rivals are other pictures with theirs (`truth`), the same for
    every model. Samples come in the order of that ring, so that a batch shares its rivals.

    A dual encoder chooses among all pictures of the test, other models among a sample's own and its rivals.
    """
    captions, ids = captions_of(split, task)
    names = sorted(captions)
    ring = [names[place] for place in np.random.default_rng(0).permutation(len(names))]
    samples = []
    for place, name in enumerate(ring):
        rivals = tuple(ring[(place + step) % len(ring)] for step in range(1, min(CANDIDATES, len(ring))))
        theirs = tuple(captions[rival] for rival in rivals)
        samples.append(Sample(file_id(ids[name]), name, rivals, "", captions[name], truth=theirs))
    return samples


def captions_of(split: Path, task: TaskConfig) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """The captions of each picture that has some, each once, and the id of its first record.

    Raises:
        UserError: fewer than two such pictures.
    """
    captions: dict[str, tuple[str, ...]] = {}
    ids: dict[str, str] = {}
    for record in records_of(split, task, CaptionRecord, "retrieval"):
        if record.captions:
            ids.setdefault(record.images[0], record.id)
            known = captions.get(record.images[0], ())
            captions[record.images[0]] = tuple(dict.fromkeys((*known, *record.captions)))
    if len(captions) < 2:
        raise UserError(f"{split}: found {len(captions)} pictures with captions; expected at least 2 to choose among")
    return captions, ids


def predict_retrieval(
    model: VisionLanguageModel, processor: Processor, batch: Sequence[Sample], right: Sequence[Image.Image],
    wrong: Sequence[tuple[Image.Image, ...]], config: EvaluateConfig,
) -> list[dict]:
    """A dual encoder: the embeddings of the picture and its captions. Others: the ranks among the rivals, and the
    caption that comes first."""
    if model.language_model is None and model.image_tokens is None and model.projection is not None:
        images_BE = embed_images(model, processor, right, config.batch_size).float().cpu().numpy()
        texts = (embed_texts(model, processor, sample.answers).float().cpu().numpy() for sample in batch)
        return [{"image": image_E, "texts": texts_CE} for image_E, texts_CE in zip(images_BE, texts, strict=True)]
    return [
        race(model, processor, sample, (one, *others), config.batch_size)
        for sample, one, others in zip(batch, right, wrong, strict=True)
    ]


def race(
    model: VisionLanguageModel, processor: Processor, sample: Sample, pictures: Sequence[Image.Image], size: int
) -> dict:
    """The sample's picture against all captions, and its captions against all pictures."""
    captions = (sample.answers, *sample.truth)
    texts = [text for own in captions for text in own]
    found = pair_scores(model, processor, pictures, [texts, *[sample.answers] * len(sample.truth)], size)
    scores_KC = np.zeros((len(captions), len(texts)))  # what the rivals' captions score with rivals isn't asked
    scores_KC[0] = found[0]
    scores_KC[1:, : len(sample.answers)] = found[1:]
    owners = owners_of(captions)
    rank_K, rank_C = retrieval_ranks(without_twins(scores_KC, captions), owners)
    return {
        "image_to_text": [int(rank_K[0])], "text_to_image": rank_C[: len(sample.answers)].tolist(),
        "said": texts[int(scores_KC[0].argmax())],
    }


def owners_of(captions: Sequence[Sequence[str]]) -> list[int]:
    """The picture of each caption."""
    return [picture for picture, own in enumerate(captions) for _ in own]


def without_twins(scores_IC: np.ndarray, captions: Sequence[Sequence[str]]) -> np.ndarray:
    """A caption that another picture has to the letter is no wrong answer there: such pairs are out of the race."""
    texts, owners = [text for own in captions for text in own], np.array(owners_of(captions))
    places: dict[str, list[int]] = {}
    for place, text in enumerate(texts):
        places.setdefault(text, []).append(place)
    scores_IC = scores_IC.copy()
    for picture, own in enumerate(captions):
        twins = [place for text in own for place in places[text] if owners[place] != picture]
        scores_IC[picture, twins] = -np.inf
    return scores_IC


# --- scores ------------------------------------------------------------------------------------------------

def score_retrieval(samples: list[Sample], rows: list[dict]) -> Scores:
    """Recall at K both ways and their mean, median ranks (1 is best), and what choosing by lot would recall."""
    whole = "image" in rows[0]
    if whole:
        ranks, said = ranks_of_all(samples, rows)
    else:
        ranks = {way: {sample.id: row[way] for sample, row in zip(samples, rows, strict=True)} for way in WAYS}
        said = {sample.id: row["said"] for sample, row in zip(samples, rows, strict=True)}
    race_of = races(samples, whole)
    pictures, captions = (min(sizes) for sizes in zip(*race_of.values(), strict=True))
    counts: dict[str, Counts] = {}
    for k in (k for k in KS if k < pictures or k == 1):
        counts |= {f"{way}@{k}": recall(ranks[way], k) for way in WAYS}
        counts[f"recall@{k}"] = means(both_ways(ranks, k))
    first = both_ways(ranks, 1)
    lot = {
        sample.id: (len(sample.answers) / race_of[sample.id][1] + 1 / race_of[sample.id][0]) / 2 for sample in samples
    }
    counts["recall@1_blind"] = means(lot)
    counts["gain_over_blind"] = means({key: value - lot[key] for key, value in first.items()})
    stored = {key: {"prediction": said[key], "score": value} for key, value in first.items()}
    found = Scores.of(counts, stored, {"recall@1": {"pictures": pictures, "captions": captions}})
    medians = {f"{way}_median_rank": 1.0 + float(np.median(np.concatenate([*ranks[way].values()]))) for way in WAYS}
    return replace(found, metrics=found.metrics | medians, n=found.n | dict.fromkeys(medians, len(samples)))


def races(samples: Sequence[Sample], whole: bool) -> dict[str, tuple[int, int]]:
    """How many pictures and captions each sample is chosen among."""
    if whole:
        return dict.fromkeys((s.id for s in samples), (len(samples), sum(len(s.answers) for s in samples)))
    return {s.id: (1 + len(s.truth), len(s.answers) + sum(map(len, s.truth))) for s in samples}


def ranks_of_all(samples: Sequence[Sample], rows: Sequence[Mapping]) -> tuple[Ranks, dict[str, str]]:
    """Of a dual encoder: every picture against every caption; and the caption that comes first."""
    captions = [sample.answers for sample in samples]
    texts_CE = np.concatenate([row["texts"] for row in rows])
    scores_IC = np.stack([row["image"] for row in rows]) @ texts_CE.T
    owners = owners_of(captions)
    rank_I, rank_C = retrieval_ranks(without_twins(scores_IC, captions), owners)
    of_texts: dict[str, list[int]] = {sample.id: [] for sample in samples}
    for owner, rank in zip(owners, rank_C.tolist(), strict=True):
        of_texts[samples[owner].id].append(rank)
    texts = [text for own in captions for text in own]
    said = {sample.id: texts[place] for sample, place in zip(samples, scores_IC.argmax(axis=1).tolist(), strict=True)}
    of_images = {sample.id: [rank] for sample, rank in zip(samples, rank_I.tolist(), strict=True)}
    return {"image_to_text": of_images, "text_to_image": of_texts}, said


def recall(ranks: Mapping[str, Sequence[int]], k: int) -> Counts:
    return Counts("ratio", {key: (float(sum(rank < k for rank in own)), float(len(own))) for key, own in ranks.items()})


def both_ways(ranks: Ranks, k: int) -> dict[str, float]:
    """For each picture the mean of whether it finds a caption and the share of its captions that find it."""
    shares = [{key: found / asked for key, (found, asked) in recall(ranks[way], k).samples.items()} for way in WAYS]
    return {key: (share + shares[1][key]) / 2 for key, share in shares[0].items()}
