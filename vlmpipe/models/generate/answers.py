"""Answers and captions, as the rest of the program asks for them.

Shapes: B batch, A candidate answers, E width of the shared space.
"""

from collections.abc import Sequence
from copy import copy

import torch
from PIL import Image
from torch import Tensor

from vlmpipe.errors import UserError
from vlmpipe.models.checks import check_answers
from vlmpipe.models.generate.beam import beam_search
from vlmpipe.models.generate.classify import answer_logits, classify_answers
from vlmpipe.models.generate.config import GREEDY, GenerationConfig
from vlmpipe.models.generate.decode import decode
from vlmpipe.models.generate.likelihood import log_likelihoods
from vlmpipe.models.generate.rows import Example, ask, picture_inputs, to_device
from vlmpipe.models.generate.trie import Trie, endings
from vlmpipe.models.processor import EncodedText, Processor, stack
from vlmpipe.models.vlm import VisionLanguageModel


def generate(
    model: VisionLanguageModel, processor: Processor, images: Sequence[Image.Image], prompts: Sequence[EncodedText],
    limit: int, config: GenerationConfig = GREEDY, *, examples: Sequence[Example] = (),
    choices: Sequence[Trie] | None = None,
) -> list[list[int]]:
    """New token ids of each row, its end token included where it came.

    Args:
        images: one for each prompt.
        limit: most new tokens; a text also ends where the model's positions do.
        examples: answered questions that stand before each prompt.
        choices: for each row the texts of which one is written.
    """
    batch = ask(model, processor, images, prompts, examples, once=True)
    if config.method == "beam":
        found = beam_search(model, batch, limit, processor.eos, config, choices)
        return [list(texts[0].ids) if texts else [] for texts in found]
    return decode(model, batch, limit, processor.eos, config, choices)


def answer(
    model: VisionLanguageModel, processor: Processor, images: Sequence[Image.Image], questions: Sequence[str],
    limit: int = 16, config: GenerationConfig = GREEDY, *, examples: Sequence[Example] = (),
    choices: Sequence[str] | None = None,
) -> list[str]:
    """One answer per (image, question): a language model says it, others pick one of `processor.answers`, by the head
    for that or as a dual encoder.

    `examples` are shown before each question, `choices` are all that a language model may say.

    Raises:
        UserError: the model can do none of these.
    """
    if model.language_model is None and model.answers is not None:
        return classify_answers(model, processor, images, questions)
    if model.language_model is None:
        check_answers(model)
        return rank_answers(model, processor, picture_inputs(model, processor, images)["images"], questions)
    prompts = [processor.encode_question(question) for question in questions]
    tries = None if choices is None else tries_of(processor, questions, choices)
    found = generate(model, processor, images, prompts, limit, config, examples=examples, choices=tries)
    return [processor.decode(ids) for ids in found]


def tries_of(processor: Processor, questions: Sequence[str], choices: Sequence[str]) -> list[Trie]:
    """For each question the tree of the choices; answers and captions may be written otherwise."""
    kinds = {bool(question) for question in questions}
    trees = {asked: Trie(endings(processor, choices, "?" if asked else "")) for asked in kinds}
    return [trees[bool(question)] for question in questions]


def caption(
    model: VisionLanguageModel, processor: Processor, images: Sequence[Image.Image], limit: int = 64,
    config: GenerationConfig = GREEDY,
) -> list[str]:
    """One caption per image.

    Raises:
        UserError: the model has no language head.
    """
    if model.language_model is None:
        raise UserError("found a dual encoder; expected a language head to write captions; use model=llava")
    return answer(model, processor, images, [""] * len(images), limit, config)


def choose(
    model: VisionLanguageModel, processor: Processor, images: Sequence[Image.Image], questions: Sequence[str],
    choices: Sequence[str], *, examples: Sequence[Example] = (), by_length: bool = False,
) -> list[str]:
    """The choice that a language model holds likeliest as the answer to each question, ends included.

    With `by_length` by log-probability a token, which does not favour short answers.
    """
    scores_BA = choice_scores(model, processor, images, questions, choices, examples=examples)
    if by_length:
        scores_BA = scores_BA / torch.tensor([len(text) for text in endings(processor, choices)])
    return [choices[index] for index in scores_BA.argmax(dim=1).tolist()]


def choice_scores(
    model: VisionLanguageModel, processor: Processor, images: Sequence[Image.Image], questions: Sequence[str],
    choices: Sequence[str], *, examples: Sequence[Example] = (),
) -> Tensor:
    """[B, A] the log-probability in nats of each choice, its end included, as the answer to each question."""
    prompts = [processor.encode_question(question) for question in questions]
    batch = ask(model, processor, images, prompts, examples, once=True)
    return torch.tensor(log_likelihoods(model, batch, [endings(processor, choices)] * len(images)))


@torch.no_grad()
def embed_texts(model: VisionLanguageModel, processor: Processor, texts: Sequence[str]) -> Tensor:
    """[B, E] unit norm."""
    return model.encode_text(**to_device(stack([[processor.encode(text)] for text in texts]), model))


def rank_answers(
    model: VisionLanguageModel, processor: Processor, images: Tensor, questions: Sequence[str]
) -> list[str]:
    """For each image the candidate whose text "question answer" lies nearest."""
    cosines_BA = answer_cosines(model, processor, images, questions)
    return [processor.answers[index] for index in cosines_BA.argmax(dim=1).tolist()]


@torch.no_grad()
def answer_cosines(
    model: VisionLanguageModel, processor: Processor, images: Tensor, questions: Sequence[str]
) -> Tensor:
    """[B, A] of each image and the text "question answer". Each distinct text is embedded once."""
    if not processor.answers:
        raise UserError("found no candidate answers; expected a dual encoder tuned on questions; finetune the model")
    distinct = list(dict.fromkeys(questions))
    texts = [f"{question} {candidate}" for question in distinct for candidate in processor.answers]
    parts = [embed_texts(model, processor, texts[at : at + 512]) for at in range(0, len(texts), 512)]
    texts_QAE = torch.cat(parts).unflatten(0, (len(distinct), -1))
    which = torch.tensor([distinct.index(question) for question in questions], device=model.device)
    image_BE = model.encode_image(images.to(model.device))
    return (texts_QAE[which] @ image_BE[:, :, None])[:, :, 0]


def answer_probabilities(
    model: VisionLanguageModel, processor: Processor, images: Sequence[Image.Image], questions: Sequence[str], text: str
) -> list[float]:
    """How likely the model answers each question with this text: a language model of all that it could write, others
    of `processor.answers`; 0 where those don't have it.

    Raises:
        UserError: the model can't answer.
    """
    if model.language_model is not None:
        roomy = copy(processor)  # a long question leaves no positions for the text
        roomy.text_limit -= len(endings(processor, [text])[0])
        return choice_scores(model, roomy, images, questions, [text])[:, 0].exp().tolist()
    if model.answers is not None:
        logits_BA = answer_logits(model, processor, images, questions)
    else:
        check_answers(model)
        seen = picture_inputs(model, processor, images)["images"]
        logits_BA = model.projection.scale() * answer_cosines(model, processor, seen, questions)
    if text not in processor.answers:
        return [0.0] * len(questions)
    return logits_BA.float().softmax(dim=1)[:, processor.answers.index(text)].tolist()
