"""What is written after a picture that is looked at from outside: with a cache as without, whoever writes."""

import pytest
import torch

from tests.models.fusion.small import make_small
from tests.models.tiny import pictures
from vlmpipe.models.generate import Example, GenerationConfig, ask, attention_map, generate, log_likelihoods
from vlmpipe.models.processor import EncodedText, stack

NAMES = ("flamingo", "visualgpt", "simvlm")
QUESTIONS = ("", "what color is the circle?")


def plain_score(model, processor, image, prompt, new):
    """Log-probability of `new` after `prompt`, from the whole text at once."""
    batch = stack([[EncodedText((*prompt.ids, *new), prompt.start)]])
    words = {name: batch[name] for name in ("tokens", "segments", "positions", "prefix")}
    logits = model(processor.images([image]), **words).logits[0, len(prompt.ids) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(new)), list(new)].sum().item()


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_as_likely_as_when_read_whole(name):
    model, processor = make_small(name)
    seen, prompts = pictures(2), [processor.encode_question(text) for text in QUESTIONS]
    texts = [(5, 6, 7, processor.eos), (8, processor.eos), (9, 10, 11)]
    found = log_likelihoods(model, ask(model, processor, seen, prompts), [texts, texts])
    expected = [[plain_score(model, processor, image, prompt, new) for new in texts]
                for image, prompt in zip(seen, prompts, strict=True)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_texts_after_examples_see_the_pictures_among_them():
    model, processor = make_small("flamingo")
    shown, prompt = [Example(pictures(1, seed=4)[0], "what?", "red")], processor.encode_question("what?")
    batch, texts = ask(model, processor, pictures(1), [prompt], shown), [(5, 6, 7), (8, 9)]
    found = log_likelihoods(model, batch, [texts])[0]
    for new, score in zip(texts, found, strict=True):
        longer = {name: longer_by(batch[name], len(new)) for name in ("tokens", "segments", "image_places")}
        longer["tokens"][0, -len(new) :] = torch.tensor(new)
        longer["segments"][0, -len(new) :] = 1
        longer["positions"] = torch.arange(longer["tokens"].shape[1])[None]
        logits = model(images=batch["images"], image_rows=batch["image_rows"], **longer).logits[0, -len(new) - 1 : -1]
        expected = logits.log_softmax(-1)[torch.arange(len(new)), list(new)].sum().item()
        assert score == pytest.approx(expected, abs=1e-4)


def longer_by(tensor, count):
    return torch.cat([tensor, torch.zeros(1, count, dtype=tensor.dtype)], dim=1)


@pytest.mark.parametrize("name", NAMES)
def test_beams_of_a_batch_are_those_of_each_row_and_no_less_likely_than_greedy(name):
    model, processor = make_small(name)
    seen, prompts = pictures(2), [processor.encode_question(text) for text in QUESTIONS]
    beams = GenerationConfig(method="beam", beams=3, length_penalty=0.0)
    together = generate(model, processor, seen, prompts, 4, config=beams)
    greedy = generate(model, processor, seen, prompts, 4)
    for row, (image, prompt) in enumerate(zip(seen, prompts, strict=True)):
        assert generate(model, processor, [image], [prompt], 4, config=beams) == [together[row]]
        scores = [plain_score(model, processor, image, prompt, new[row]) for new in (together, greedy)]
        assert scores[0] >= scores[1] - 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_where_it_looked_is_a_distribution_over_the_picture(name):
    model, processor = make_small(name)
    found = attention_map(model, processor, pictures(1)[0], "what color is the circle?")
    assert found.shape == (2, 2) and found.min() >= 0
    assert found.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_classified_from_the_last_word(name):
    model, processor = make_small(name, heads={"answers": {"classes": 5}})
    texts = [processor.encode("what color is the circle?"), processor.encode("how many?")]
    batch = stack([[text] for text in texts])
    words = {name: batch[name] for name in ("tokens", "segments", "positions", "prefix")}
    seen = processor.images(pictures(2))
    found = model(seen, **words).answers
    assert found.shape == (2, 5) and model.language_model is None
    short = {name: value[1:, : len(texts[1].ids)] for name, value in words.items()}
    torch.testing.assert_close(model(seen[1:], **short).answers, found[1:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(seen.flip(0), **words).answers, found, atol=1e-4)
