"""Tasks: what a model is asked on held-out data, with the right picture and with a wrong one, and the numbers from it.

A task binds a reader, what the model does with a batch, and the metrics of the answers. A model that scores as
well with the wrong picture does not look.

Shapes: B batch, T tokens, M scored tokens, E width of the shared space.
"""

import hashlib
import io
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image

from vlmpipe.data.vqa import read_vqa, vqa_images
from vlmpipe.dispatch import Cluster, map_shards
from vlmpipe.errors import UserError
from vlmpipe.evaluate.metrics import perplexity, retrieval_recall, vqa_accuracy
from vlmpipe.images import NotAnImage, decode_rgb
from vlmpipe.models import Processor, VisionLanguageModel, load
from vlmpipe.models.draw import picture_loss
from vlmpipe.models.generate import answer, attention_map, caption, embed_texts, to_device
from vlmpipe.models.generate.rows import QUESTIONED
from vlmpipe.models.processor import stack
from vlmpipe.shards import check_file, write_bytes_atomic, write_json, write_table

TaskName = Literal["captioning", "vqa"]


# Sample ids name the files of attention maps.
FILE_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure and how.

    limit: at most so many samples of each task, drawn with `seed`; null takes all. chunk: samples that one worker
    takes at once; batch_size: samples in one forward pass. attention_samples: pictures with attention maps.
    """

    tasks: tuple[TaskName, ...] = ("captioning", "vqa")
    batch_size: int = 64
    chunk: int = 256
    limit: int | None = None
    answer_tokens: int = 16
    caption_tokens: int = 64
    attention_samples: int = 12
    seed: int = 0

    def __post_init__(self):
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise UserError(f"tasks: found {list(self.tasks)}; expected at least one, each once")
        for name, least in (("batch_size", 1), ("chunk", 1), ("answer_tokens", 1), ("caption_tokens", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}: found {getattr(self, name)}; expected at least {least}")
        if self.attention_samples < 0 or (self.limit is not None and self.limit < 1):
            raise UserError("attention_samples and limit: expected at least 0 and 1; use null for no limit")


@dataclass(frozen=True)
class Sample:
    """One thing to ask; an empty question asks for a caption. `image`, `wrong_image`: keys of the task's pictures."""

    id: str
    image: Any
    wrong_image: Any
    question: str
    answers: tuple[str, ...]
    slices: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Chunk:
    """The unit of dispatch. Its samples travel without their pictures: a worker reads those from `place`."""

    name: str
    task: str
    place: Path
    samples: tuple[Sample, ...]
    attend: bool = False  # see where the model looks, rather than predict


@dataclass(frozen=True)
class Scores:
    """A task's numbers, the counts that they rest on, and per sample (by id) the row for the score store."""

    metrics: dict[str, float]
    n: dict[str, int]
    rows: dict[str, dict]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """read: the samples. pictures: their encoded images by key. predict: the model's part, a row of plain values for
    each sample of a batch. score: the metrics of all rows."""

    read: Callable[[Path], list[Sample]]
    pictures: Callable[[Path, set], Mapping[Any, bytes]]
    predict: Callable[..., list[dict]]
    score: Callable[[list[Sample], list[dict]], Scores]


def evaluate(
    name: str, model: Path, packed: Path, questions: Path, out: Path, metrics: Path, config: EvaluateConfig,
    cluster: Cluster,
) -> None:
    """Run the configured tasks on a model directory.

    Writes `out`/samples.parquet (a row per sample: task, sample_id, image_id, question, prediction, answers, score,
    wrong_image_id, wrong_prediction, wrong_score, slices), `out`/attention/TASK-ID.npz (`map` [h, w] float32 summing
    to 1, `picture` [Y, X, 3] uint8), and `metrics`: {"metrics": {name: number}, "n": {name: count}, "details": {…}}.

    Args:
        packed: a packed dataset; captioning reads its `test`. questions: VQA directories; vqa reads its `test`.

    Raises:
        UserError: no test data, a sample that can't be scored, or a model that can't do the task.
    """
    out, metrics = Path(out), Path(metrics)
    places = {"captioning": Path(packed).absolute() / "test", "vqa": Path(questions).absolute() / "test"}
    asked = {task: choose_samples(TASKS[task].read(places[task]), config) for task in config.tasks}
    chunks = [chunk for task in config.tasks for chunk in split(task, places[task], asked[task], config.chunk)]
    # Answers to questions show best where a model looks.
    task = "vqa" if "vqa" in asked else config.tasks[0]
    shown = Chunk("attention", task, places[task], tuple(spread(asked[task], config.attention_samples)), True)
    # One dispatch for everything: joining a cluster costs seconds.
    *parts, looks = map_shards(
        partial(run_chunk, model=Path(model).absolute(), config=config), [*chunks, shown], cluster, f"evaluate {name}"
    )
    merged: dict[str, dict] = {"metrics": {}, "n": {}, "details": {}}
    table = []
    for task, samples in asked.items():
        rows = [row for chunk, part in zip(chunks, parts, strict=True) if chunk.task == task for row in part]
        scores = TASKS[task].score(samples, rows)
        for field_name in merged:
            merged[field_name].update({f"{task}.{key}": value for key, value in getattr(scores, field_name).items()})
        table += [store_row(task, sample, scores.rows[sample.id]) for sample in samples]
    write_table(out / "samples.parquet", pa.Table.from_pylist(table, schema=STORE))
    names = (f"{shown.task}-{sample.id}" for sample in shown.samples)
    write_attention(out / "attention", dict(zip(names, looks, strict=True)))
    write_json(metrics, merged)


STORE = pa.schema(
    [(name, pa.string()) for name in ("task", "sample_id", "image_id", "question", "prediction")]
    + [("answers", pa.list_(pa.string())), ("score", pa.float64()), ("wrong_image_id", pa.string())]
    + [("wrong_prediction", pa.string()), ("wrong_score", pa.float64())]
    + [("slices", pa.map_(pa.string(), pa.string()))]
)


def store_row(task: str, sample: Sample, scored: Mapping[str, Any]) -> dict:
    """A row of the score store; what a task doesn't give is null."""
    return {
        "task": task,
        "sample_id": sample.id,
        "image_id": str(sample.image),
        "question": sample.question,
        "answers": list(sample.answers),
        "wrong_image_id": str(sample.wrong_image),
        "slices": sorted(sample.slices.items()),
        **scored,
    }


# --- running a task ----------------------------------------------------------------------------------------

def split(task: str, place: Path, samples: Sequence[Sample], size: int) -> list[Chunk]:
    """The samples in chunks of `size`.

    Raises:
        UserError: a sample id stands twice, or can't name a file.
    """
    counts = Counter(sample.id for sample in samples)
    odd = [key for key, count in counts.items() if count > 1 or not FILE_NAME.fullmatch(key)]
    if odd:
        raise UserError(f"{place}: found sample id {odd[0]!r}; expected each once and of letters, digits, . _ and -")
    return [
        Chunk(f"{task} from {at}", task, place, tuple(samples[at : at + size])) for at in range(0, len(samples), size)
    ]


def run_chunk(chunk: Chunk, model: Path, config: EvaluateConfig) -> list[dict]:
    """What one worker does: load the model, then predict batch by batch, or see where it looks."""
    network, processor = load(model, device())
    if chunk.attend:
        return look(network, processor, chunk)
    task = TASKS[chunk.task]
    keys = {key for sample in chunk.samples for key in (sample.image, sample.wrong_image)}
    pictures = task.pictures(chunk.place, keys)
    rows = []
    for at in range(0, len(chunk.samples), config.batch_size):
        batch = chunk.samples[at : at + config.batch_size]
        right = [decode(pictures, sample.image) for sample in batch]
        wrong = [decode(pictures, sample.wrong_image) for sample in batch]
        rows += task.predict(network, processor, batch, right, wrong, config)
    return rows


def device() -> str:
    """The accelerator that this process was given, if any."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def decode(pictures: Mapping[Any, bytes], key: Any) -> Image.Image:
    """One picture as RGB.

    Raises:
        UserError: there is no such picture, or it does not decode.
    """
    try:
        return decode_rgb(pictures[key])
    except (KeyError, NotAnImage) as error:
        why = "no picture" if isinstance(error, KeyError) else str(error)
        raise UserError(f"found {why} for {key!r}; expected a picture that decodes; mend the evaluation set") from None


def choose_samples(samples: list[Sample], config: EvaluateConfig) -> list[Sample]:
    """All samples, or `limit` of them drawn with the seed, in their order."""
    if config.limit is None or len(samples) <= config.limit:
        return samples
    chosen = np.random.default_rng(config.seed).choice(len(samples), config.limit, replace=False)
    return [samples[index] for index in sorted(chosen)]


def mismatch(keys: Mapping[Any, str], what: str) -> dict[Any, Any]:
    """For each id another id whose key differs: the distinct keys in random order, each paired with the next.

    Raises:
        UserError: fewer than two distinct keys.
    """
    ids_of: dict[str, list] = {}
    for sample, key in keys.items():
        ids_of.setdefault(key, []).append(sample)
    if len(ids_of) < 2:
        raise UserError(f"found {len(ids_of)} distinct {what}; expected at least 2, so that one can be the wrong one")
    # The pairing belongs to the data set, not to a run: every model is shown the same wrong pictures.
    distinct = sorted(ids_of)
    order = [distinct[index] for index in np.random.default_rng(0).permutation(len(distinct))]
    follower = dict(zip(order, order[1:] + order[:1], strict=True))
    wrong = {}
    for key, members in ids_of.items():
        donors = ids_of[follower[key]]
        wrong |= {sample: donors[index % len(donors)] for index, sample in enumerate(members)}
    return wrong


# --- captioning --------------------------------------------------------------------------------------------

def read_captions(directory: Path) -> list[Sample]:
    """One sample per packed pair; the wrong picture is one with another caption."""
    rows = [row for _, row in packed_rows(directory, ["uid", "caption"])]
    wrong = mismatch({row["uid"]: row["caption"] for row in rows}, f"captions in {directory}")
    return [Sample(row["uid"], row["uid"], wrong[row["uid"]], "", (row["caption"],)) for row in rows]


def packed_pictures(directory: Path, keys: set) -> dict[str, bytes]:
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
    expects either one after the true caption. A dual encoder: both embeddings."""
    truth = [sample.answers[0] for sample in batch]
    if model.image_tokens is not None:
        with_right, with_wrong = (
            picture_loss(model, processor, processor.images(pictures), truth).tolist() for pictures in (right, wrong)
        )
        length = model.codes.config.length
        return [
            {"said": None, "nll": nll, "tokens": length, "wrong_nll": wrong_nll}
            for nll, wrong_nll in zip(with_right, with_wrong, strict=True)
        ]
    if model.language_model is None:
        with torch.no_grad():
            images_BE = model.encode_image(processor.images(right).to(model.device)).float().cpu().numpy()
        texts_BE = embed_texts(model, processor, truth).float().cpu().numpy()
        return [{"image": image, "text": text} for image, text in zip(images_BE, texts_BE, strict=True)]
    said = caption(model, processor, right, config.caption_tokens)
    with_right, with_wrong = (caption_loss(model, processor, pictures, truth) for pictures in (right, wrong))
    return [
        {"said": text, "nll": nll, "tokens": tokens, "wrong_nll": wrong_nll}
        for text, (nll, tokens), (wrong_nll, _) in zip(said, with_right, with_wrong, strict=True)
    ]


@torch.no_grad()
def caption_loss(
    model: VisionLanguageModel, processor: Processor, images: Sequence[Image.Image], captions: Sequence[str]
) -> list[tuple[float, int]]:
    """(summed negative log-likelihood in nats, tokens) of each caption and its end, given its image."""
    batch = stack([[processor.encode_answer("", text)] for text in captions])
    scored_BT = (batch["labels"] != -100).to(model.device)
    labels_M = batch["labels"].to(model.device)[scored_BT]
    words = to_device(batch, model, QUESTIONED)
    outputs = model(images=processor.images(images).to(model.device), **words, select=scored_BT)
    loss_M = F.cross_entropy(outputs.logits.float(), labels_M, reduction="none")
    loss_BT = torch.zeros(scored_BT.shape, dtype=torch.float64, device=model.device)
    loss_BT[scored_BT] = loss_M.double()
    return list(zip(loss_BT.sum(dim=1).tolist(), scored_BT.sum(dim=1).tolist(), strict=True))


def score_captions(samples: list[Sample], rows: list[dict]) -> Scores:
    """Perplexity of the true captions with either picture (of either picture after the caption, where pictures are
    written), or recall at 1 for a dual encoder."""
    if "image" in rows[0]:
        return score_retrieval(samples, rows)
    by_id = dict(zip((sample.id for sample in samples), rows, strict=True))
    tokens = {key: row["tokens"] for key, row in by_id.items()}
    right = perplexity({key: row["nll"] for key, row in by_id.items()}, tokens)
    wrong = perplexity({key: row["wrong_nll"] for key, row in by_id.items()}, tokens)
    metrics = {
        "perplexity": right.value,
        "perplexity_wrong_image": wrong.value,
        "image_gain": wrong.value / right.value,
    }
    stored = {
        key: {"prediction": row["said"], "score": right.per_sample[key], "wrong_score": wrong.per_sample[key]}
        for key, row in by_id.items()
    }
    return Scores(metrics, dict.fromkeys(metrics, len(samples)), stored, {"perplexity": right.details})


def score_retrieval(samples: list[Sample], rows: list[dict]) -> Scores:
    """Recall among samples with distinct captions: of a caption that stands twice no one picture is the right one."""
    distinct = {sample.answers[0]: index for index, sample in reversed(list(enumerate(samples)))}
    chosen = sorted(distinct.values())
    images = np.stack([rows[index]["image"] for index in chosen])
    texts = np.stack([rows[index]["text"] for index in chosen])
    result = retrieval_recall(images @ texts.T, range(len(chosen)), ks=(1, 5))
    hits = {samples[index].id: result.per_sample[place] for place, index in enumerate(chosen)}
    metrics = dict(result.details)
    metrics["recall@1"] = (metrics["image_to_text@1"] + metrics["text_to_image@1"]) / 2
    stored = {sample.id: {"score": hits.get(sample.id)} for sample in samples}
    return Scores(metrics, dict.fromkeys(metrics, len(chosen)), stored, {"recall@1": {"chance": 1 / len(chosen)}})


# --- visual question answering -----------------------------------------------------------------------------

def read_questions(directory: Path) -> list[Sample]:
    """One sample per question; the wrong picture is that of another question and differs in its bytes."""
    examples = read_vqa(directory)
    pictures = vqa_images(directory)
    image_ids = list(dict.fromkeys(example.image_id for example in examples))
    digests = {image_id: hashlib.sha256(pictures[image_id]).hexdigest() for image_id in image_ids}
    wrong = mismatch(digests, f"pictures in {directory}")
    return [
        Sample(
            str(example.question_id), example.image_id, wrong[example.image_id], example.question, example.answers,
            {"question_type": example.question_type, "answer_type": example.answer_type},
        )
        for example in examples
    ]


def question_pictures(directory: Path, keys: set) -> dict[Any, bytes]:
    pictures = vqa_images(directory)
    return {key: pictures[key] for key in keys}


def predict_answers(
    model: VisionLanguageModel, processor: Processor, batch: Sequence[Sample], right: Sequence[Image.Image],
    wrong: Sequence[Image.Image], config: EvaluateConfig,
) -> list[dict]:
    """The model's answer to each question, with either picture."""
    asked = [sample.question for sample in batch]
    said = (answer(model, processor, images, asked, config.answer_tokens) for images in (right, wrong))
    return [{"right": one, "wrong": other} for one, other in zip(*said, strict=True)]


def score_answers(samples: list[Sample], rows: list[dict]) -> Scores:
    """Official VQA accuracy, in all and by question type; with the wrong picture; and of the best blind guess."""
    answers = {sample.id: sample.answers for sample in samples}
    said = {sample.id: row["right"] for sample, row in zip(samples, rows, strict=True)}
    said_wrong = {sample.id: row["wrong"] for sample, row in zip(samples, rows, strict=True)}
    right, wrong = vqa_accuracy(said, answers), vqa_accuracy(said_wrong, answers)
    blind = vqa_accuracy(best_blind_guess(samples), answers)
    metrics = {
        "accuracy": right.value,
        "accuracy_wrong_image": wrong.value,
        "accuracy_blind": blind.value,
        "gain_over_blind": right.value - blind.value,
    }
    n = dict.fromkeys(metrics, len(samples))
    by_type: dict[str, list[str]] = {}
    for sample in samples:
        by_type.setdefault(slug(sample.slices["question_type"]), []).append(sample.id)
    for kind, ids in sorted(by_type.items()):
        for key, result in (("accuracy", right), ("accuracy_wrong_image", wrong)):
            metrics[f"{key}.{kind}"] = math.fsum(result.per_sample[sample] for sample in ids) / len(ids)
            n[f"{key}.{kind}"] = len(ids)
    stored = {
        key: {
            "prediction": said[key], "score": right.per_sample[key],
            "wrong_prediction": said_wrong[key], "wrong_score": wrong.per_sample[key],
        }
        for key in said
    }
    return Scores(metrics, n, stored)


def best_blind_guess(samples: Sequence[Sample]) -> dict[str, str]:
    """For each question the most common answer to its type in this very test set: what knowing the type alone can
    reach at most."""
    counts: dict[str, Counter] = {}
    for sample in samples:
        counts.setdefault(sample.slices["question_type"], Counter()).update(sample.answers)
    best = {kind: min(given, key=lambda text, given=given: (-given[text], text)) for kind, given in counts.items()}
    return {sample.id: best[sample.slices["question_type"]] for sample in samples}


def slug(text: str) -> str:
    """A name that fits behind a dot: `what color is the` becomes `what_color_is_the`."""
    return re.sub(r"\W+", "_", text.strip().lower()).strip("_") or "none"


TASKS: dict[str, Task] = {
    "captioning": Task(read_captions, packed_pictures, predict_captions, score_captions),
    "vqa": Task(read_questions, question_pictures, predict_answers, score_answers),
}


# --- where the model looks ---------------------------------------------------------------------------------

def spread(samples: Sequence[Sample], count: int) -> list[Sample]:
    """`count` samples, in turn from each question type, so that every kind is seen."""
    turns: Counter = Counter()
    ranked = []
    for index, sample in enumerate(samples):
        kind = sample.slices.get("question_type", "")
        ranked.append((turns[kind], index))
        turns[kind] += 1
    return [samples[index] for _, index in sorted(ranked)[:count]]


def look(model: VisionLanguageModel, processor: Processor, chunk: Chunk) -> list[dict[str, np.ndarray]]:
    """For each sample `map` [h, w] float32, the model's attention over the picture, and `picture` [Y, X, 3] uint8."""
    pictures = TASKS[chunk.task].pictures(chunk.place, {sample.image for sample in chunk.samples})
    looks = []
    for sample in chunk.samples:
        picture = decode(pictures, sample.image)
        # A dual encoder needs words to look for.
        text = sample.question or (sample.answers[0] if model.language_model is None else "")
        weights = attention_map(model, processor, picture, text).detach().float().numpy()
        looks.append({"map": weights, "picture": np.asarray(picture)})
    return looks


def write_attention(directory: Path, looks: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """One NAME.npz each; those of an earlier run go."""
    shutil.rmtree(directory, ignore_errors=True)
    for name, arrays in looks.items():
        archive = io.BytesIO()
        np.savez_compressed(archive, **arrays)
        write_bytes_atomic(directory / f"{name}.npz", archive.getvalue())
