"""docs/zoo.md: what each preset scored, and a picture of what it says."""

import csv
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

from vlmpipe.data.task import TaskConfig
from vlmpipe.errors import UserError
from vlmpipe.evaluate.tasks import TASKS, Sample, decode
from vlmpipe.models import Processor, VisionLanguageModel, load
from vlmpipe.models.draw import draw
from vlmpipe.models.generate import embed_texts
from vlmpipe.models.locate import detect, segment
from vlmpipe.shards import read_json, write_bytes_atomic

# Of each task the metric that sums it up, and what it is of the same model with a wrong picture, and of a blind guess.
# The first that was measured counts.
SCORES = (
    ("vqa", "accuracy", "accuracy_wrong_image", "accuracy_blind"),
    ("classification", "accuracy", "accuracy_wrong_image", "accuracy_blind"),
    ("statements", "accuracy", "accuracy_wrong_image", "accuracy_blind"),
    ("segmentation", "iou", "iou_wrong_image", "iou_blind"),
    ("referring", "accuracy", "accuracy_wrong_image", "accuracy_blind"),
    ("detection", "ap@0.5", "ap@0.5_wrong_image", "ap@0.5_blind"),
    ("captioning", "recall@1", None, "recall@1_blind"),
    ("captioning", "pair_accuracy", None, "pair_accuracy_blind"),
    ("captioning", "perplexity", "perplexity_wrong_image", None),
)
TILES, SIDE, TEXT = 4, 112, 46  # pictures in a row, their side, and the height of the words below them
LARGEST = 40_000  # bytes of a picture


@dataclass(frozen=True)
class Row:
    """One preset on one task. stage: the training behind which it was measured; passed: whether its gates let it
    through; settings: what its run had beside the defaults, as KEY=VALUE."""

    model: str
    stage: str
    parameters: int
    task: str
    metric: str
    score: float
    wrong: float | None
    blind: float | None
    samples: int
    seconds: float
    passed: bool
    settings: tuple[str, ...] = ()


def rows_of(name: str, space: Path, params: dict, passed: bool, settings: Sequence[str] = ()) -> list[Row]:
    """What the last experiment in a workspace measured, fine-tuning before pretraining.

    Raises:
        UserError: no evaluation was reached.
    """
    results, root = space / params["results"] / "metrics", space / params["root"]
    files = [path for path in (results / "finetune.json", results / "pretrain.json") if path.exists()]
    if not files:
        raise UserError("found no metrics; expected those of the last experiment; look at its output above")
    model = root / "models" / files[0].stem
    count = sum(part.numel() for part in load(model)[0].parameters())
    timings = [root / "state" / stage / "timing.json" for stage in ("pretrain", "finetune")]
    seconds = sum(read_json(path)["seconds"] for path in timings if path.exists())
    rows: dict[tuple[str, str], Row] = {}
    for file in files:
        found = read_json(file)
        for task, metric, wrong, blind in SCORES:
            measured = found["metrics"].get(f"{task}.{metric}")
            if measured is not None and (task, metric) not in rows:
                twin, guess = (found["metrics"].get(f"{task}.{other}") for other in (wrong, blind))
                rows[task, metric] = Row(
                    name, file.stem, count, task, metric, measured, twin, guess, found["n"][f"{task}.{metric}"],
                    seconds, passed, tuple(settings),
                )
    return list(rows.values())


# --- pictures ----------------------------------------------------------------------------------------------

def picture(space: Path, params: dict, row: Row, out: Path) -> None:
    """A row of what the last model of a workspace says of a few test pictures."""
    root, task = space / params["root"], row.task
    files = TaskConfig(**params["task"])
    packed = TASKS[task].packed
    place = (root / "packed" if packed else space / files.path) / "test"
    samples = spread(TASKS[task].read(place, files))
    pictures = TASKS[task].pictures(place, {sample.image for sample in samples}, files)
    seen = [decode(pictures, sample.image) for sample in samples]
    model, processor = load(root / "models" / row.stage)
    said = predictions(root / "evaluation" / row.stage / "samples.parquet", task)
    tiles = tiles_of(task, model, processor, samples, seen, said)
    save(sheet(tiles), out)


def spread(samples: Sequence[Sample]) -> list[Sample]:
    """A few, of different pictures."""
    by_picture = list({sample.image: sample for sample in samples}.values())
    return by_picture[:: max(1, len(by_picture) // TILES)][:TILES]


def predictions(path: Path, task: str) -> dict[str, str]:
    table = pq.read_table(path, columns=["task", "sample_id", "prediction"]).to_pylist()
    return {row["sample_id"]: row["prediction"] or "" for row in table if row["task"] == task}


def tiles_of(
    task: str, model: VisionLanguageModel, processor: Processor, samples: Sequence[Sample],
    seen: Sequence[Image.Image], said: dict[str, str],
) -> list[tuple[Image.Image, str]]:
    """(picture, words below it) of each sample."""
    if task == "segmentation":
        masks = (segment(model, processor, image, [s.question])[0].numpy() for s, image in zip(samples, seen))
        return [(marked(image, mask > 0.5), s.question) for s, image, mask in zip(samples, seen, masks)]
    if task == "detection":
        return [boxed(model, processor, image, sample.choices) for sample, image in zip(samples, seen)]
    if task == "captioning" and model.image_tokens is not None:
        captions = [sample.answers[0] for sample in samples]
        return list(zip(draw(model, processor, captions, top_k=8), captions))
    if task == "captioning" and model.language_model is None and model.projection is not None:
        return retrieved(model, processor, samples, seen)
    if task == "captioning":
        return [(image, said.get(s.id) or s.answers[0]) for s, image in zip(samples, seen)]
    return [(image, f"{s.question} {said.get(s.id, '?')} ({s.answers[0]})") for s, image in zip(samples, seen)]


def marked(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The rest of the picture in the dark."""
    return Image.fromarray((np.asarray(image) * np.where(mask, 1.0, 0.25)[..., None]).astype(np.uint8))


def boxed(
    model: VisionLanguageModel, processor: Processor, image: Image.Image, names: Sequence[str]
) -> tuple[Image.Image, str]:
    """The surest boxes and their names."""
    found = detect(model, processor, image, names, 0.3)
    large = image.resize((SIDE, SIDE))
    pen = ImageDraw.Draw(large)
    for box in found.boxes[:5].tolist():
        pen.rectangle([value * SIDE / side for value, side in zip(box, image.size * 2)], outline=(255, 0, 255), width=2)
    return large, ", ".join(names[number] for number in found.phrases[:5].tolist()) or "nothing"


def retrieved(
    model: VisionLanguageModel, processor: Processor, samples: Sequence[Sample], seen: Sequence[Image.Image]
) -> list[tuple[Image.Image, str]]:
    """For each caption the nearest of the pictures shown."""
    captions = [sample.answers[0] for sample in samples]
    texts = embed_texts(model, processor, captions).numpy()
    images = model.encode_image(processor.images(seen)).detach().numpy()
    return [(seen[index], text) for index, text in zip((texts @ images.T).argmax(axis=1).tolist(), captions)]


def sheet(tiles: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    page = Image.new("RGB", (len(tiles) * (SIDE + 8), SIDE + TEXT), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(10)
    for number, (image, words) in enumerate(tiles):
        left = number * (SIDE + 8)
        page.paste(image.resize((SIDE, SIDE)), (left, 0))
        lines = "\n".join(textwrap.wrap(words, 22)[:4])
        pen.multiline_text((left, SIDE + 2), lines, fill="black", font=font, spacing=1)
    return page


def save(image: Image.Image, out: Path) -> None:
    """As a JPEG of at most `LARGEST` bytes."""
    for quality in (90, 75, 60, 45):
        data = io.BytesIO()
        image.save(data, "JPEG", quality=quality)
        if len(data.getvalue()) <= LARGEST:
            break
    write_bytes_atomic(out, data.getvalue())


# --- the page ----------------------------------------------------------------------------------------------

def write_page(path: Path, rows: Sequence[Row], known: Sequence[str], shown: str) -> None:
    """The table, the settings behind it, what was not run yet, the pictures, and DVC's comparison."""
    done = list(dict.fromkeys(row.model for row in rows))
    lines = [
        "# Zoo", "",
        "The small presets of `configs/model/`, trained and tested through the pipeline by `make zoo`: "
        f"{len(done)} of {len(known)} were run so far.",
        "*Wrong picture*: the same model asked about another picture, its blind twin. *Blind guess*: the best that can "
        "be said without a picture, or chance.",
        "Perplexity is better when lower. Seconds are of both trainings, on a machine that may have done other work.",
        "",
        "| model | parameters | after | task | metric | score | wrong picture | blind guess | samples | seconds | "
        "gates |",
        "|---|---|---|---|---|---|---|---|---|---|---|", *map(line, rows), "",
    ]
    lines += behind(rows)
    left = [name for name in known if name not in done]
    if left:
        lines += [f"Not yet run: {', '.join(left)}. `make zoo` goes on with them.", ""]
    for name in done:
        if (path.parent / "images" / "zoo" / f"{name}.jpg").exists():
            lines += [f"## {name}", "", f"![What {name} says of test pictures](images/zoo/{name}.jpg)", ""]
    lines += ["## dvc exp show", "", *compared(shown, done), ""]
    write_bytes_atomic(path, "\n".join(lines).encode())


def behind(rows: Sequence[Row]) -> list[str]:
    """With which settings which models were run, and what that means for their gates."""
    models: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        models.setdefault(row.settings, []).append(row.model)
    lines = []
    for settings, names in models.items():
        who = ", ".join(dict.fromkeys(names))
        if settings:
            lines += [f"Not with the defaults were run: {who}, but with:", "", "```", *settings, "```", ""]
        else:
            lines += [f"With the defaults were run: {who}.", ""]
    if any(models):
        lines += [
            "That the gates of a run with settings of its own passed is no independent check: settings drop or lower "
            "rules, and floors in `configs/gates/` were set after such runs.", "",
        ]
    return lines


def compared(shown: str, done: Sequence[str]) -> list[str]:
    """DVC's comparison, which is csv with a column for every parameter and metric, as a table of the scores; and which
    models it lacks."""
    found = [row for row in csv.DictReader(shown.splitlines()) if row["Experiment"]]
    wanted = dict.fromkeys(f"metrics.{task}.{metric}" for task, metric, _, _ in SCORES)
    columns = [name for name in wanted if any(measured(row, name) for row in found)]
    head = ["experiment", *(name.removeprefix("metrics.") for name in columns)]
    body = [[row["Experiment"], *(measured(row, name) for name in columns)] for row in found]
    table = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]
    absent = [name for name in done if name not in {row["Experiment"] for row in found}]
    if absent:
        names = ", ".join(absent)
        table += ["", f"DVC keeps no experiment of a run that a gate stopped; only the table above has: {names}."]
    return table


def measured(row: dict[str, str], name: str) -> str:
    """A number of an experiment, that behind fine-tuning where it was measured twice; empty where it has none."""
    # A metric of several files has a column for each, `FILE:metrics.…`; finetune.json comes before pretrain.json.
    columns = sorted(column for column in row if column and (column == name or column.endswith(f":{name}")))
    values = (row[column] for column in columns)
    return next((number(float(value)) for value in values if value and value not in "!-"), "")


def line(row: Row) -> str:
    shown = [number(row.score), number(row.wrong), number(row.blind)]
    gates = "passed" if row.passed else "stopped"
    return (
        f"| {row.model} | {row.parameters / 1e6:.1f}M | {row.stage} | {row.task} | {row.metric} "
        f"| {' | '.join(shown)} | {row.samples} | {row.seconds:.0f} | {gates} |"
    )


def number(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"
