"""A vlmpipe model in lmms-eval: `lmms_eval --model vlmpipe --model_args pretrained=DIRECTORY --tasks vqav2_val`.

lmms-eval finds the model by an entry point of the group `lmms_eval.models`; lmms-eval itself is imported only when it
asks. `Adapter`, the class that it makes, is `Answers` with its own base class.

Written from the interface of lmms-eval 0.7. A request's `args` are (context, generation settings, the function that
gives a document's pictures, the document's number, task, split), for likelihoods with the continuation, or a function
of the document that gives it, in the second place. Documents are in `task_dict`, which lmms-eval fills.
"""

import sys
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

from PIL import Image

from vlmpipe.errors import UserError
from vlmpipe.evaluate.command import CHAMPION, find_model
from vlmpipe.models import read_model
from vlmpipe.models.generate import GenerationConfig, answer, ask, generate, log_likelihoods
from vlmpipe.models.generate.rows import with_room
from vlmpipe.models.processor import EncodedText

NAME = "vlmpipe"
TOKENS = 128  # most of an answer where the task doesn't say
LEAST_CONTEXT = 4  # tokens for which there must be room before a continuation
MARKS = ("<image>", "<video>")  # of pictures in a context; ours are put where the model wants them


class Answers:
    """What lmms-eval asks of a model.

    Args:
        pretrained: a model directory, a Hugging Face directory or hub id, or `champion`.
        batch_size: requests in one forward pass. device: as torch names it; None or "cuda" without one: the CPU.
    """

    def __init__(
        self, pretrained: str = CHAMPION, batch_size: int | str = 1, device: str | None = None,
        max_batch_size: int | None = None,
    ):
        import torch

        super().__init__()
        seen = device if device and (device == "cpu" or torch.cuda.is_available()) else None
        self.network, self.feed = read_model(find_model(pretrained), seen or "cpu")
        self.batch_size = int(batch_size)
        if self.batch_size < 1:
            raise UserError(f"batch_size: found {batch_size}; expected at least 1")

    @property
    def device(self):
        return self.network.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answer to each request, cut before the first of the texts at which it is to end."""
        rows = [(request.args[0], dict(request.args[1]), self.pictures(request.args)) for request in requests]
        said: dict[int, str] = {}
        for settings, numbers in grouped([settings for _, settings, _ in rows]):
            for at in range(0, len(numbers), self.batch_size):
                part = numbers[at : at + self.batch_size]
                texts = answer(
                    self.network, self.roomy([rows[n][2] for n in part]), [rows[n][2] for n in part],
                    [question(rows[n][0]) for n in part], int(settings.get("max_new_tokens") or TOKENS),
                    chosen(settings),
                )
                said |= {number: cut(text, settings.get("until")) for number, text in zip(part, texts, strict=True)}
        return [said[number] for number in range(len(rows))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """The mean loss in nats of a continuation's tokens, and whether they are what the model would write.

        lmms-eval takes the choice with the least of the first numbers, as its own models give losses.
        """
        found: list[tuple[float, bool]] = []
        for at in range(0, len(requests), self.batch_size):
            found += self.losses([request.args for request in requests[at : at + self.batch_size]])
        return found

    def losses(self, batch: Sequence[tuple]) -> list[tuple[float, bool]]:
        if self.network.language_model is None:
            raise UserError("found a model without a language head; expected one for likelihoods; choose another task")
        images = [self.pictures(args) for args in batch]
        feed = self.roomy(images)
        texts = [said(feed, args[0], self.continuation(args)) for args in batch]
        longest = max(map(len, texts))  # rows of a batch have the same room
        prompts = [asked_before(feed, args[0], longest) for args in batch]
        asked = ask(self.network, feed, images, prompts, once=True)
        totals = log_likelihoods(self.network, asked, [[text] for text in texts])
        written = generate(self.network, feed, images, prompts, longest)
        return [
            (-total / len(text), tuple(ids[: len(text)]) == text)
            for (total,), text, ids in zip(totals, texts, written, strict=True)
        ]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise UserError("found a task of several rounds; expected one of single questions; choose another task")

    # --- what a request is about -----------------------------------------------------------------------------

    def document(self, args: tuple) -> Any:
        *_, number, task, split = args
        return self.task_dict[task][split][number]

    def continuation(self, args: tuple) -> str:
        return args[1] if isinstance(args[1], str) else str(args[1](self.document(args)))

    def pictures(self, args: tuple) -> Image.Image | tuple[Image.Image, ...]:
        """A request's picture, or its pictures.

        Raises:
            UserError: there are none, or a video or a sound is among them.
        """
        shown = list(args[2](self.document(args)) or ())
        odd = [one for one in shown if not isinstance(one, Image.Image)]
        if not shown or odd:
            said = f"a {type(odd[0]).__name__}" if odd else "nothing"
            raise UserError(f"found {said} to look at in '{args[-2]}'; expected pictures; choose a task of pictures")
        shown = [one.convert("RGB") for one in shown]
        return shown[0] if len(shown) == 1 else tuple(shown)

    def roomy(self, images: Sequence[Any]) -> Any:
        """The processor, with room for the pictures before each text."""
        most = max(len(seen) if isinstance(seen, tuple) else 1 for seen in images)
        return with_room(self.network, self.feed, most)


def grouped(settings: Sequence[dict]) -> list[tuple[dict, list[int]]]:
    """The requests' numbers by their settings, in the order in which these come."""
    groups: dict[str, tuple[dict, list[int]]] = {}
    for number, one in enumerate(settings):
        groups.setdefault(repr(sorted(one.items(), key=str)), (one, []))[1].append(number)
    return list(groups.values())


def question(context: str) -> str:
    for mark in MARKS:
        context = context.replace(mark, "")
    return context.strip()


def said(feed: Any, context: str, continuation: str) -> tuple[int, ...]:
    """All tokens of a continuation, without the end of the text."""
    endless = copy(feed)
    endless.text_limit = sys.maxsize
    whole = endless.encode_answer(question(context), continuation.strip())
    ids = whole.ids[whole.start :]
    return ids[:-1] if len(ids) > 1 and ids[-1] == feed.eos else ids


def asked_before(feed: Any, context: str, room: int) -> EncodedText:
    """The context, without as much of its end as leaves room for a continuation of so many tokens.

    Raises:
        UserError: there is no room for a context at all.
    """
    roomy = copy(feed)
    roomy.text_limit -= room
    if roomy.text_limit < LEAST_CONTEXT:
        raise UserError(
            f"found a continuation of {room} tokens for texts of at most {feed.text_limit}; expected at most "
            f"{feed.text_limit - LEAST_CONTEXT}; choose a model with a longer context or another task"
        )
    return roomy.encode_question(question(context))


def chosen(settings: dict) -> GenerationConfig:
    """Their settings in our words: a temperature over 0 draws, beams search, else the likeliest word is taken."""
    temperature, beams = settings.get("temperature") or 0, int(settings.get("num_beams") or 1)
    if settings.get("do_sample", temperature > 0) and temperature > 0:
        kept = {"top_p": settings.get("top_p") or 1.0, "top_k": int(settings.get("top_k") or 0)}
        return GenerationConfig("sample", temperature=float(temperature), **kept)
    return GenerationConfig("beam", beams=beams) if beams > 1 else GenerationConfig()


def cut(text: str, until: str | Sequence[str] | None) -> str:
    for end in [until] if isinstance(until, str) else until or ():
        text = text.partition(end)[0] if end else text
    return text.strip()


# --- what lmms-eval imports ----------------------------------------------------------------------------------


def adapter(base: type, boxed: Callable[[Any], Any] = lambda pair: pair) -> type:
    """The class for lmms-eval, whose models all have its own base class.

    boxed: what likelihoods are handed over in. lmms-eval 0.7 makes a string of whatever a model gives that is neither
    text nor its `GenerationResult`, and then finds no numbers in it.
    """

    def loglikelihood(self: Answers, requests: Sequence[Any]) -> list[Any]:
        return [boxed(pair) for pair in Answers.loglikelihood(self, requests)]

    facts = {"__doc__": Answers.__doc__, "__module__": __name__, "is_simple": True, "loglikelihood": loglikelihood}
    return type("Adapter", (Answers, base), facts)


def manifest() -> Any:
    """What lmms-eval's registry takes."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(NAME, simple_class_path=f"{__name__}.Adapter")


def __getattr__(name: str) -> Any:
    if name != "Adapter":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.api.instance import GenerationResult
    from lmms_eval.api.model import lmms

    return adapter(lmms, GenerationResult)
