"""Answers from a list: none but these are written, and the likeliest is found."""

import pytest
import torch

from tests.models.generate.lm import gpt2, rows
from tests.models.tiny import make, pictures
from vlmpipe.errors import UserError
from vlmpipe.models.generate import GenerationConfig, Trie, answer, choose, decode, log_likelihoods
from vlmpipe.models.generate import likelihood as module
from vlmpipe.models.generate.trie import endings

CHOICES = ("red", "a red circle", "blue", "two", "a blue square above")
QUESTIONS = ("what color is the circle?", "", "how many shapes are there?")


@pytest.mark.parametrize("method", ["greedy", "sample", "beam"])
def test_nothing_but_the_choices_is_written(method):
    for seed in range(3):
        model, processor = make("prefix", seed)
        config = GenerationConfig(method, beams=2, temperature=3.0, seed=seed)
        found = answer(model, processor, pictures(3), QUESTIONS, 16, config, choices=CHOICES)
        assert set(found) <= set(CHOICES)


def test_greedy_takes_the_likeliest_branch():
    ours, _ = gpt2()
    logits = ours(**rows([3, 4])).logits[0, -1]
    first, second = sorted((9, 17), key=lambda token: -logits[token])
    for texts in ([(first, 30), (second, 30)], [(second, 8, 30), (first, 8, 30)]):
        assert decode(ours, rows([3, 4]), 9, 30, choices=[Trie(texts)])[0][0] == first


def test_likelihoods_are_those_of_each_text_alone(monkeypatch):
    ours, _ = gpt2()
    prompts = ([3, 4, 5], [6, 7, 8, 9, 10, 11], [12])
    texts = [[(3, 30), (4, 5, 6, 30), (7,), (8, 9, 30)], [(30,), (3, 3, 30)], [(5, 30), (6, 30), (5, 6, 7, 8, 30)]]

    def alone(prompt, text):
        logits = ours(**rows([*prompt, *text])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return logits[torch.arange(len(text)), list(text)].sum().item()

    for together in (module.TOGETHER, 4):  # all at once, and in several passes
        monkeypatch.setattr(module, "TOGETHER", together)
        found = log_likelihoods(ours, rows(*prompts), texts)
        for prompt, row, scores in zip(prompts, texts, found, strict=True):
            assert scores == pytest.approx([alone(prompt, text) for text in row], abs=1e-4)


def test_the_likeliest_choice_is_chosen():
    model, processor = make("prefix")
    seen = pictures(3)
    found = choose(model, processor, seen, QUESTIONS, CHOICES)
    by_length = choose(model, processor, seen, QUESTIONS, CHOICES, by_length=True)
    for image, question, one, other in zip(seen, QUESTIONS, found, by_length, strict=True):
        scores, means = [], []
        for text, ids in zip(CHOICES, endings(processor, CHOICES), strict=True):
            whole = processor.encode_answer(question, text)
            batch = rows(whole.ids)
            logits = model(images=processor.images([image]), **batch).logits[0, whole.start - 1 : -1].log_softmax(-1)
            scores.append(logits[torch.arange(len(ids)), list(ids)].sum().item())
            means.append(scores[-1] / len(ids))
        assert one == CHOICES[scores.index(max(scores))] and other == CHOICES[means.index(max(means))]


def test_lists_that_make_no_sense_are_refused():
    model, processor = make("prefix")
    with pytest.raises(UserError, match="found none"):
        answer(model, processor, pictures(1), ["what?"], choices=())
    with pytest.raises(UserError, match="found 'red' and 'RED' with the same tokens"):
        choose(model, processor, pictures(1), ["what?"], ("red", "RED"))
    ours, _ = gpt2()
    with pytest.raises(UserError, match="found a text of 39 tokens where the model has 37 positions left"):
        log_likelihoods(ours, rows([3, 4, 5]), [[(3,) * 39]])
