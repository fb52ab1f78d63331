"""Answers a second: our VQA evaluation and transformers' own generate loop, with the same weights, batch and machine.

    make bench-evaluation        python benchmarks/evaluation.py [--rounds N] [--batch N] [--part vqav2|textvqa]

A LLaVA-style model of random weights is written as a Hugging Face directory, with an image processor, a tokenizer and a
chat template that starts before the picture. Both sides read that directory, decode the same JPEGs, answer the same
questions in float32, `--batch` rows at a time, and have to give the same answers, token by token. Sides take turns, so
that noise hits both alike; a ratio is the median over rounds, by the clock and by the CPU time of the process.

vqav2: 5.4 questions a picture, as in VQAv2, where the file has them one after another. textvqa: 1.2, as in TextVQA.
Each is asked about the right pictures alone, and as the task is scored: about the right and a wrong picture.

transformers' loop is the one of its documentation: the chat template and the processor's pictures of a batch, rows
padded on the left, `generate` until the last row has ended, `batch_decode`. The row of the output matrix that ends an
answer is stretched until most answers are short, as VQAv2's are (89% of them are one word); some end at once.

The limit, before anything is measured: `floating_point` counts what each side multiplies. Pictures that are read once
are most of what can be saved; where nothing is shared, the last block of the tower is what is left to save.
"""

import argparse
import io
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vlmpipe.evaluate.tasks import TASKS
from vlmpipe.evaluate.tasks.base import EvaluateConfig, Sample
from vlmpipe.evaluate.tasks.chunks import predict_samples
from vlmpipe.evaluate.tasks.order import neighbours
from vlmpipe.models.generate import answer
from vlmpipe.models.pretrained import from_huggingface
from vlmpipe.models.pretrained.processor import own_tokenizer
from vlmpipe.models.processor import Processor, ProcessorConfig, train_tokenizer

TARGET = 2.0
CHAT = (
    "{{ bos_token }}{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)
PER_PICTURE = {"vqav2": 5.4, "textvqa": 1.2}
QUESTIONS = (
    "what color is the {}?", "is the {} {}?", "how many {} are there?", "what is on the {}?", "is this a {}?",
    "what is the {} next to the {} made of?", "what is the man in the {} {} holding in his left hand?",
    "is there a {} behind the {}?", "what time of day is it?", "who is wearing the {} {}?", "where is the {}?",
    "which of the {} in the back of the picture is closer to the {} with the {} on it?",
)


@dataclass(frozen=True)
class Shape:
    """vision, text: width, depth, heads, width inside the feed-forward layer."""

    vision: tuple[int, int, int, int] = (320, 6, 5, 1280)
    text: tuple[int, int, int, int] = (384, 6, 6, 1024)
    image: int = 192
    patch: int = 16
    vocab: int = 8192
    eos: float = 10.0  # how much longer than others the row that ends an answer is

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


TINY = Shape((32, 3, 2, 64), (32, 2, 2, 64), image=32, patch=16, vocab=512)


# --- the model and what it is asked --------------------------------------------------------------------------------

def words(count: int, seed: int = 0) -> list[str]:
    """Pseudo-words of two to four syllables."""
    random = np.random.default_rng(seed)
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "il")]
    return ["".join(random.choice(syllables, random.integers(2, 5))) for _ in range(count)]


def write_model(directory: Path, shape: Shape) -> None:
    """A LLaVA of random weights with all that feeds it."""
    from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration

    nouns = words(4 * shape.vocab)
    tokenizer = train_tokenizer([*nouns, *QUESTIONS], ProcessorConfig(vocab_size=shape.vocab - 1, words=QUESTIONS))
    theirs = own_tokenizer(Processor(ProcessorConfig(), tokenizer, shape.image, 512))
    theirs.add_special_tokens({"additional_special_tokens": ["<image>"]})
    theirs.chat_template, theirs.padding_side = CHAT, "left"
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    vision = {"model_type": "clip_vision_model", **dict(zip(names, shape.vision)), "image_size": shape.image,
              "patch_size": shape.patch, "projection_dim": shape.vision[0]}
    text = {"model_type": "llama", **dict(zip(names, shape.text)), "vocab_size": len(theirs),
            "max_position_embeddings": 1024, "initializer_range": shape.text[0] ** -0.5,
            "bos_token_id": theirs.bos_token_id, "eos_token_id": theirs.eos_token_id,
            "pad_token_id": theirs.pad_token_id}
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=theirs.convert_tokens_to_ids("<image>"),
        image_seq_length=shape.patches, vision_feature_layer=-2, tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    prompt = theirs.encode(" ASSISTANT:", add_special_tokens=False)
    end_at_random(model, theirs.eos_token_id, shape.eos, prompt)
    model.save_pretrained(directory)
    theirs.save_pretrained(directory)
    CLIPImageProcessorPil(
        size={"shortest_edge": shape.image}, crop_size={"height": shape.image, "width": shape.image}
    ).save_pretrained(directory)


@torch.no_grad()
def end_at_random(model: torch.nn.Module, eos: int, length: float, prompt: Sequence[int]) -> None:
    """Make the row of the output matrix that ends an answer `length` times as long as the others, across what all
    hidden states share, and against what those after `prompt` share: a random model would end every answer at the same
    word or none, and half of them at once."""
    drawn = torch.randint(3, model.lm_head.out_features - 2, (16, 32))
    tokens = torch.cat([drawn, torch.tensor(prompt).expand(len(drawn), -1)], dim=1)
    states_BTD = model.model.language_model(input_ids=tokens).last_hidden_state
    common_D = normalize(states_BTD.mean(dim=(0, 1)), dim=0)
    first_D = normalize(across(states_BTD[:, -1].mean(dim=0), common_D), dim=0)
    row_D = across(model.lm_head.weight[eos], common_D)
    model.lm_head.weight[eos] = length * (across(row_D, first_D) - row_D.norm() * first_D)


def across(x_D: Tensor, direction_D: Tensor) -> Tensor:
    """The part of x at a right angle to a direction of length 1."""
    return x_D - (x_D @ direction_D) * direction_D


def picture(seed: int) -> bytes:
    """A JPEG of 640 x 480 with the spectrum of a photograph."""
    random = np.random.default_rng(seed)
    across, down = np.fft.rfftfreq(640), np.fft.fftfreq(480)
    power = 1 / np.maximum(np.hypot(down[:, None], across), 1 / 640)
    noise = random.normal(size=(3, 480, len(across))) + 1j * random.normal(size=(3, 480, len(across)))
    planes = np.fft.irfft2(noise * power, s=(480, 640))
    planes = 128 + 50 * (planes - planes.mean()) / planes.std()
    file = io.BytesIO()
    Image.fromarray(planes.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(file, "JPEG", quality=90)
    return file.getvalue()


def draw(count: int, per_picture: float, seed: int = 0) -> tuple[list[Sample], dict[str, bytes]]:
    """`count` questions of 5 to 25 tokens about count / per_picture pictures, and the pictures; the wrong picture of
    each is the next one."""
    random = np.random.default_rng(seed)
    total = max(2, round(count / per_picture))
    owners = np.sort(np.concatenate([np.arange(total), random.integers(0, total, count - total)]))
    nouns, samples = words(500), []
    for number, owner in enumerate(owners.tolist()):
        form = QUESTIONS[random.integers(len(QUESTIONS))]
        question = form.format(*random.choice(nouns, form.count("{}")))
        samples.append(Sample(f"q{number}", f"p{owner}", f"p{(owner + 1) % total}", question, ("yes",) * 10))
    return samples, {f"p{number}": picture(number) for number in range(total)}


# --- sides ---------------------------------------------------------------------------------------------------------

class Ours:
    """The evaluation's own loop, from encoded pictures to answers."""

    name = "ours"

    def __init__(self, directory: Path, batch: int, limit: int):
        self.model, self.processor = from_huggingface(directory)
        self.config = EvaluateConfig(tasks=("vqa",), batch_size=batch, answer_tokens=limit)

    def answers(self, samples: Sequence[Sample], pictures: dict[str, bytes], wrong: bool) -> dict[str, tuple[str, ...]]:
        """By sample id what is said of the right picture, and with `wrong` of the wrong one."""
        task = TASKS["vqa"] if wrong else replace(TASKS["vqa"], predict=right_alone)
        asked = neighbours(samples if wrong else [replace(sample, wrong_image=sample.image) for sample in samples])
        rows = predict_samples(task, self.model, self.processor, asked, pictures, self.config)
        names = ("right", "wrong") if wrong else ("right",)
        return {sample.id: tuple(row[name] for name in names) for sample, row in zip(asked, rows, strict=True)}


def right_alone(model, processor, batch, right, wrong, config) -> list[dict]:
    said = answer(model, processor, right, [sample.question for sample in batch], config.answer_tokens)
    return [{"right": text} for text in said]


class Theirs:
    """transformers' processor and `generate`, rows in the dataset's order, wrong pictures after the right ones."""

    name = "transformers"

    def __init__(self, directory: Path, batch: int, limit: int):
        import transformers

        transformers.logging.set_verbosity_error()
        self.model = transformers.LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
        config = self.model.config
        self.processor = transformers.LlavaProcessor(
            transformers.CLIPImageProcessorPil.from_pretrained(directory),
            transformers.AutoTokenizer.from_pretrained(directory), patch_size=config.vision_config.patch_size,
            vision_feature_select_strategy="default", num_additional_image_tokens=1,
        )
        self.processor.tokenizer.padding_side = "left"
        self.batch, self.limit = batch, limit

    def answers(self, samples: Sequence[Sample], pictures: dict[str, bytes], wrong: bool) -> dict[str, tuple[str, ...]]:
        """As `Ours.answers`."""
        shown = [[sample.image for sample in samples]] + ([[sample.wrong_image for sample in samples]] if wrong else [])
        said: list[list[str]] = []
        for keys in shown:
            rows = list(zip(keys, (sample.question for sample in samples), strict=True))
            texts: list[str] = []
            for at in range(0, len(rows), self.batch):
                texts += self.generate(rows[at : at + self.batch], pictures)
            said.append(texts)
        return {sample.id: texts for sample, *texts in zip(samples, *said, strict=True)}

    def generate(self, rows: Sequence[tuple[str, str]], pictures: dict[str, bytes]) -> list[str]:
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            for _, question in rows
        ]
        given = self.processor(
            images=[Image.open(io.BytesIO(pictures[key])).convert("RGB") for key, _ in rows],
            text=[self.processor.tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True)
                  for c in chats],
            padding=True, add_special_tokens=False, return_tensors="pt",
        )
        with torch.inference_mode():
            ids = self.model.generate(**given, max_new_tokens=self.limit, do_sample=False)
        said = self.processor.tokenizer.batch_decode(ids[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in said]


# --- the limit -----------------------------------------------------------------------------------------------------

def products(width: int, inner: int, matrices: int) -> int:
    """Multiplications and additions of one token in one block: attention's four matrices and `matrices` of the
    feed-forward layer."""
    return 2 * (4 * width**2 + matrices * width * inner)


def floating_point(shape: Shape, batches: Sequence[Sequence[tuple[str, int, int]]]) -> tuple[float, float]:
    """(ours, theirs) in 1e9 operations of the matrix products with weights, attention itself left out.

    Args:
        batches: of rows (picture, tokens of the text, tokens of the answer).

    Theirs: each row's picture through all of the tower, picture and text filled up to the longest through the language
    model, as many steps of all rows as the longest answer has. Ours: each picture once without the tower's last block,
    the texts filled up to the longest, as many steps as each answer has.
    """
    see = products(shape.vision[0], shape.vision[3], 2)
    read = products(shape.text[0], shape.text[3], 3) * shape.text[1]
    ours = theirs = 0
    for rows in batches:
        pictures, count = len({picture for picture, _, _ in rows}), len(rows)
        longest, last = max(text for _, text, _ in rows), max(steps for _, _, steps in rows)
        theirs += count * (see * shape.vision[1] * (shape.patches + 1) + read * (shape.patches + longest + last))
        ours += pictures * (see * (shape.vision[1] - 1) * (shape.patches + 1) + read * shape.patches)
        ours += read * (count * longest + sum(steps for _, _, steps in rows))
    return ours / 1e9, theirs / 1e9


def batches_of(side: Ours, samples: Sequence[Sample], said: dict[str, tuple[str, ...]]) -> list[list]:
    """Our batches, for `floating_point`; a token more than its text for the end of each answer."""
    rows = []
    for sample in neighbours(samples):
        for key, text in zip((sample.image, sample.wrong_image), said[sample.id]):
            asked = len(side.processor.encode_question(sample.question).ids) - 1
            new = len(side.processor.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
            rows.append((key, asked, min(new, side.config.answer_tokens)))
    size = side.config.batch_size
    return [rows[at : at + size] for at in range(0, len(rows), size)]


# --- measuring -----------------------------------------------------------------------------------------------------

def measure(shape: Shape, sides: tuple[Ours, Theirs], part: str, wrong: bool, count: int, rounds: int) -> float:
    """Print rates and ratio of one setting; returns the median ratio by CPU time.

    Raises:
        SystemExit: an answer differs.
    """
    samples, pictures = draw(count, PER_PICTURE[part])
    said, seconds = {}, {side.name: [] for side in sides}
    for number in range(rounds + 1):  # the first one warms up
        for side in sides:
            start = np.array([time.perf_counter(), time.process_time()])
            said[side.name] = side.answers(samples, pictures, wrong)
            seconds[side.name].append(np.array([time.perf_counter(), time.process_time()]) - start)
        if number == 0:
            compare(*said.values())
            batches = batches_of(sides[0], samples, said["ours"])
            limit = floating_point(shape, batches)
    asked = f"{part}, {'right and wrong pictures' if wrong else 'right pictures'}"
    rows, tokens = count * (1 + wrong), [steps for batch in batches for _, _, steps in batch]
    print(f"{asked}: {rows} answers about {len(pictures)} pictures, all equal, {np.median(tokens):.0f} tokens each "
          f"(median; mean {np.mean(tokens):.1f})")
    print(f"  limit: {limit[0]:.0f} and {limit[1]:.0f} GFLOP, ratio {limit[1] / limit[0]:.2f}")
    ours, theirs = (np.array(seconds[side.name][1:]) for side in sides)
    for place, clock in enumerate(("clock", "CPU time")):
        ratios = theirs[:, place] / ours[:, place]
        rates = [rows / np.median(side[:, place]) for side in (ours, theirs)]
        print(f"  by {clock}: {rates[0]:.2f} and {rates[1]:.2f} answers/s, ratio {np.median(ratios):.2f} "
              f"({ratios.min():.2f} to {ratios.max():.2f})", flush=True)
    return float(np.median(ratios))


def compare(ours: dict[str, tuple[str, ...]], theirs: dict[str, tuple[str, ...]]) -> None:
    odd = [key for key in ours if tuple(ours[key]) != tuple(theirs[key])]
    if odd:
        raise SystemExit(f"{len(odd)} of {len(ours)} answers differ: {ours[odd[0]]} and {theirs[odd[0]]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=list(PER_PICTURE), action="append", help="default: both")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--limit", type=int, default=16, help="most tokens of an answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="the smallest shape: proves that it runs, measures nothing")
    options = parser.parse_args()
    shape = TINY if options.tiny else Shape()
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"batches of {options.batch} rows", flush=True)
    with tempfile.TemporaryDirectory() as place:
        write_model(Path(place), shape)
        sides = tuple(side(Path(place), options.batch, options.limit) for side in (Ours, Theirs))
        found = {
            (part, wrong): measure(shape, sides, part, wrong, options.questions, options.rounds)
            for part in options.part or PER_PICTURE for wrong in (False, True)
        }
    met = all(ratio >= TARGET for (part, _), ratio in found.items() if part == "vqav2")
    print(f"target {TARGET} on VQAv2's questions: {'met' if met else 'NOT met'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
