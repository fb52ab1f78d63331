"""Evaluation: the configured tasks on a model directory, in one dispatch."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vlmpipe.config import to_dict
from vlmpipe.data.task import CLASS_CAPTION, CLASS_QUESTION, TaskConfig
from vlmpipe.dispatch import Cluster, map_shards
from vlmpipe.errors import UserError
from vlmpipe.evaluate.contamination import contamination
from vlmpipe.evaluate.store import CHALLENGER, CHAMPION, EVALUATION, tables, write_scores
from vlmpipe.evaluate.tasks.base import EvaluateConfig, Sample, Scores, Task, own_names, task_pictures
from vlmpipe.evaluate.tasks.captions import packed_pictures, predict_captions, read_captions, score_captions
from vlmpipe.evaluate.tasks.chunks import Chunk, Contender, Part, run_chunk, split
from vlmpipe.evaluate.tasks.classes import predict_classes, read_classes, score_classes
from vlmpipe.evaluate.tasks.compositionality import predict_contrasts, read_contrasts, score_contrasts
from vlmpipe.evaluate.tasks.cost import measure
from vlmpipe.evaluate.tasks.detection import predict_detections, read_detections, score_detections
from vlmpipe.evaluate.tasks.fairness import group_gaps, predict_fairness, read_grouped, score_fairness, with_groups
from vlmpipe.evaluate.tasks.few_shot import predict_shots, read_shots, score_shots, shot_pictures
from vlmpipe.evaluate.tasks.generalisation import predict_combinations, read_combinations, score_combinations
from vlmpipe.evaluate.tasks.hallucination import predict_polls, read_polls, score_polls
from vlmpipe.evaluate.tasks.look import spread, write_attention
from vlmpipe.evaluate.tasks.matching import predict_matches, read_matches, score_matches
from vlmpipe.evaluate.tasks.questions import predict_answers, read_questions, score_answers
from vlmpipe.evaluate.tasks.regions import (
    predict_boxes,
    predict_masks,
    read_expressions,
    read_masks,
    score_boxes,
    score_masks,
)
from vlmpipe.evaluate.tasks.resume import code_sha256, fingerprint
from vlmpipe.evaluate.tasks.retrieval import predict_retrieval, read_retrieval, score_retrieval
from vlmpipe.evaluate.tasks.robustness import predict_robustness, read_robustness, score_robustness
from vlmpipe.evaluate.tasks.statements import predict_statements, read_statements, score_statements
from vlmpipe.evaluate.tasks.text_prior import predict_prior, read_prior, score_prior
from vlmpipe.evaluate.tasks.text_to_image import predict_drawings, read_drawings, score_drawings
from vlmpipe.models.pretrained.load import locate
from vlmpipe.shards import sha256_directory, write_json, write_table

TASKS: dict[str, Task] = {
    "captioning": Task(read_captions, packed_pictures, predict_captions, score_captions, packed=True),
    "vqa": Task(read_questions, task_pictures, predict_answers, score_answers),
    "classification": Task(read_classes, task_pictures, predict_classes, score_classes),
    "statements": Task(read_statements, task_pictures, predict_statements, score_statements, version=2),
    "segmentation": Task(read_masks, task_pictures, predict_masks, score_masks),
    "referring": Task(read_expressions, task_pictures, predict_boxes, score_boxes),
    "detection": Task(read_detections, task_pictures, predict_detections, score_detections),
    "hallucination": Task(read_polls, task_pictures, predict_polls, score_polls, version=2),
    "robustness": Task(read_robustness, task_pictures, predict_robustness, score_robustness, version=2),
    "generalisation": Task(read_combinations, task_pictures, predict_combinations, score_combinations),
    "text_prior": Task(read_prior, task_pictures, predict_prior, score_prior, version=2),
    "few_shot": Task(read_shots, shot_pictures, predict_shots, score_shots),
    "compositionality": Task(read_contrasts, task_pictures, predict_contrasts, score_contrasts),
    "retrieval": Task(read_retrieval, task_pictures, predict_retrieval, score_retrieval),
    "matching": Task(read_matches, task_pictures, predict_matches, score_matches),
    "text_to_image": Task(read_drawings, packed_pictures, predict_drawings, score_drawings, packed=True),
    "fairness": Task(read_grouped, task_pictures, predict_fairness, score_fairness, version=2),
}
FILES = {CHALLENGER: "samples.parquet", CHAMPION: "champion.parquet"}


def evaluate(
    name: str, model: Path, packed: Path, questions: Path, out: Path, metrics: Path, config: EvaluateConfig,
    cluster: Cluster, task: TaskConfig | None = None, champion: tuple[str, Path] | None = None,
    state: Path | None = None,
) -> None:
    """Run the configured tasks on a model directory, and on the champion's: the same samples, prompts and decoding.

    Writes `out`/samples.parquet (a row per sample: task, sample_id, image_id, question, prediction, answers, score,
    wrong_image_id, wrong_prediction, wrong_score, slices, cluster), `out`/champion.parquet (the same of the champion,
    where there is one), `out`/scores.parquet and `out`/evaluation.json (see `evaluate.store`),
    `out`/attention/TASK-ID.npz (`map` [h, w] float32 summing to 1, `picture` [Y, X, 3] uint8), `state`/costs.json
    where `config` asks for it, and `metrics`: {"metrics": {name: number}, "n": {name: count}, "details": {…}}, with
    `contamination.TASK` and `checkpoint.round_trip` too.

    Args:
        packed: a packed dataset; captioning reads its `test`. questions: the folder of the task's own files, of which
            the other tasks read `test`; `task` says in which format (by default VQAv2's).
        champion: its version and its model directory.
        state: where what is done lies until all is (`chunks/`); an evaluation that was ended goes on from there. What
            differs each time is there too: no other run would write the same.

    Raises:
        UserError: no test data, a sample that can't be scored, or a model that can't do the task. Of a champion that
            can't, evaluation.json says why (`unscored`).
    """
    out, metrics, files = Path(out), Path(metrics), task or TaskConfig()
    folders = {key: Path(packed if TASKS[key].packed else questions).absolute() / "test" for key in config.tasks}
    asked = {
        key: with_groups(choose_samples(TASKS[key].read(folders[key], files), config), folders[key])
        for key in config.tasks
    }
    version, reigning = champion or (None, None)
    models = [contender(role, path) for role, path in ((CHALLENGER, model), (CHAMPION, reigning)) if path is not None]
    chunks = [
        chunk for one in models for key in config.tasks
        for chunk in split(key, folders[key], asked[key], config.chunk, files, one)
    ]
    # Answers to questions show best where a model looks.
    key = "vqa" if "vqa" in asked else config.tasks[0]
    looked = tuple(spread(asked[key], config.attention_samples))
    shown = Chunk("attention", key, folders[key], looked, files, models[0], attend=True)
    protocol = protocol_sha256(config, files)
    work = partial(
        run_chunk, tasks=TASKS, config=config, protocol=fingerprint([protocol, code_sha256()]),
        state=None if state is None else Path(state).absolute() / "chunks",
    )
    # One dispatch for everything: joining a cluster costs seconds.
    *parts, looks = map_shards(work, [*chunks, shown], cluster, f"evaluate {name}")
    results = [result(one, asked, [pair for pair in zip(chunks, parts) if pair[0].model == one]) for one in models]
    write_results(out, asked, results)
    write_json(out / EVALUATION, {
        "champion": version, "samples_sha256": fingerprint([asked, results[0].pictures]),
        "protocol_sha256": protocol, "metric_versions": {key: TASKS[key].version for key in config.tasks},
        "seed": config.seed, "models": {one.role: one.sha256 for one in models}, "unscored": results[-1].unscored,
    })
    names = (f"{shown.task}-{sample.id}" for sample in shown.samples)
    write_attention(out / "attention", dict(zip(names, looks.rows)))
    found = [results[0].merged(), *beside(results[0], asked, Path(questions), files, config)]
    if config.cost_samples:
        probe = replace(shown, name="costs", samples=tuple(spread(asked[key], config.cost_samples)), attend=False)
        found.append(measured(probe, models, config, cluster, state))
    write_json(metrics, {kind: {key: one[kind][key] for one in found for key in one[kind]} for kind in found[0]})
    if state is not None:
        shutil.rmtree(Path(state) / "chunks", ignore_errors=True)


def beside(
    challenger: "Result", asked: Mapping[str, list[Sample]], questions: Path, files: TaskConfig, config: EvaluateConfig
) -> list[dict[str, dict[str, Any]]]:
    """What the tasks' own metrics don't say: test pictures that training showed, and gaps between groups."""
    shows = {
        key: {name for sample in samples for name in own_names(sample)}
        for key, samples in asked.items() if not TASKS[key].packed
    }
    gaps = [
        group_gaps(key, asked[key], scores, challenger.clusters(key), config.fairness)
        for key, scores in challenger.scores.items()
    ]
    return [contamination(shows, questions, files), *gaps]


def measured(
    probe: Chunk, models: Sequence[Contender], config: EvaluateConfig, cluster: Cluster, state: Path | None
) -> dict[str, dict[str, Any]]:
    """Write what the models cost to `state`/costs.json; the metrics of the challenger's checkpoint."""
    champion = next((one for one in models if one.role == CHAMPION), None)
    work = partial(measure, task=TASKS[probe.task], config=config, champion=champion)
    # A dispatch by itself: beside others the models would be slower.
    ((costs, checkpoint),) = map_shards(work, [probe], cluster, "costs")
    if state is not None:
        write_json(Path(state) / "costs.json", costs)
    return checkpoint


def contender(role: str, directory: Path) -> Contender:
    return Contender(role, Path(directory).absolute(), sha256_directory(directory))


def protocol_sha256(config: EvaluateConfig, files: TaskConfig) -> str:
    """Of how samples are asked: two evaluations of one protocol and the same samples compare. Of a scorer that judges
    its files, too: they may change under its name."""
    judge = config.drawing.scorer if "text_to_image" in config.tasks else None
    judged = [] if judge is None else [sha256_directory(locate(judge))]
    return fingerprint([to_dict(config), to_dict(files), CLASS_QUESTION, CLASS_CAPTION, *judged])


# --- results -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Result:
    """What one model scored: by task its scores and, by sample, the digests of its right and wrong pictures; or why
    a champion has no scores."""

    role: str
    scores: dict[str, Scores]
    pictures: dict[str, dict[str, tuple[str, str]]]
    unscored: dict[str, str]

    def merged(self) -> dict[str, dict[str, Any]]:
        """`metrics`, `n` and `details` of all tasks, by full names."""
        return {
            kind: {f"{task}.{name}": value for task, scores in self.scores.items()
                   for name, value in getattr(scores, kind).items()}
            for kind in ("metrics", "n", "details")
        }

    def clusters(self, task: str) -> dict[str, str]:
        """The same for samples whose pictures have the same bytes."""
        return {sample: right[:32] for sample, (right, _) in self.pictures[task].items()}


def result(model: Contender, asked: Mapping[str, list[Sample]], done: Sequence[tuple[Chunk, Part]]) -> Result:
    """The scores of a model's chunks."""
    found = Result(model.role, {}, {}, {})
    for task, samples in asked.items():
        chunks, parts = zip(*(pair for pair in done if pair[0].task == task), strict=True)
        ids = [sample.id for chunk in chunks for sample in chunk.samples]
        seen = dict(zip(ids, (pictures for part in parts for pictures in part.pictures), strict=True))
        found.pictures[task] = {sample.id: seen[sample.id] for sample in samples}
        problem = next((part.problem for part in parts if part.problem), None)
        try:
            if problem is None:
                rows = dict(zip(ids, (row for part in parts for row in part.rows), strict=True))
                found.scores[task] = TASKS[task].score(samples, [rows[sample.id] for sample in samples])
        except UserError as error:
            if model.role != CHAMPION:
                raise
            problem = str(error)
        if problem is not None:
            found.unscored[task] = problem
    return found


def write_results(out: Path, asked: Mapping[str, list[Sample]], results: Sequence[Result]) -> None:
    """The predictions of each model, and the scores of all."""
    (out / FILES[CHAMPION]).unlink(missing_ok=True)
    parts = []
    for found in results:
        rows = []
        for task, scores in found.scores.items():
            clusters = found.clusters(task)
            rows += [store_row(task, sample, scores.rows[sample.id], clusters[sample.id]) for sample in asked[task]]
            counts = {f"{task}.{metric}": value for metric, value in scores.counts.items()}
            parts += tables(found.role, counts, clusters, {sample.id: sample.slices for sample in asked[task]})
        write_table(out / FILES[found.role], pa.Table.from_pylist(rows, schema=STORE))
    write_scores(out, parts)


STORE = pa.schema(
    [(name, pa.string()) for name in ("task", "sample_id", "image_id", "question", "prediction")]
    + [(name, pa.list_(pa.string())) for name in ("images", "wrong_images")]
    + [("answers", pa.list_(pa.string())), ("score", pa.float64()), ("wrong_image_id", pa.string())]
    + [("wrong_prediction", pa.string()), ("wrong_score", pa.float64())]
    + [("slices", pa.map_(pa.string(), pa.string())), ("cluster", pa.string())]
)


def store_row(task: str, sample: Sample, scored: Mapping[str, Any], cluster: str) -> dict:
    """A row of predictions; what a task doesn't give is null."""
    return {
        "task": task,
        "sample_id": sample.id,
        "image_id": str(sample.image),
        "images": names_of(sample.image),
        "question": sample.question,
        "answers": list(sample.answers),
        "wrong_image_id": str(sample.wrong_image),
        "wrong_images": names_of(sample.wrong_image),
        "slices": sorted(sample.slices.items()),
        "cluster": cluster,
        **scored,
    }


def names_of(shown: Any) -> list[str]:
    """Of a sample's picture or pictures."""
    return list(map(str, shown if isinstance(shown, tuple) else (shown,)))


def choose_samples(samples: list[Sample], config: EvaluateConfig) -> list[Sample]:
    """All samples, or `limit` of them drawn with the seed, in their order."""
    if config.limit is None or len(samples) <= config.limit:
        return samples
    chosen = np.random.default_rng(config.seed).choice(len(samples), config.limit, replace=False)
    return [samples[index] for index in sorted(chosen)]
