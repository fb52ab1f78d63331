"""Decoding with a cache and in batches is plain greedy decoding, only faster."""

import pytest
import torch

from tests.models.tiny import make, pictures
from vlmpipe.errors import UserError
from vlmpipe.models.generate import answer, attention_map, caption, embed_texts, generate
from vlmpipe.models.processor import EncodedText, stack


def plain_greedy(model, processor, image, prompt, limit):
    """No cache, no batch: the whole text again for each token."""
    ids, new = list(prompt.ids), []
    for _ in range(limit):
        batch = stack([[EncodedText(tuple(ids), 0)]])
        logits = model(image, batch["tokens"], batch["segments"], batch["positions"]).logits
        new.append(int(logits[0, -1].argmax()))
        ids.append(new[-1])
        if new[-1] == processor.eos:
            break
    return new


@pytest.mark.parametrize("seed", range(3))
def test_batched_cached_decoding_equals_plain_greedy(seed):
    model, processor = make("prefix", seed)
    shown = pictures(3, seed)
    images = processor.images(shown)
    prompts = [processor.encode_question(text) for text in ("", "what color is the circle?", "how many?")]
    found = generate(model, processor, shown, prompts, 8)
    for row, prompt in enumerate(prompts):
        expected = plain_greedy(model, processor, images[row : row + 1], prompt, 8)
        assert found[row] == expected


def test_decoding_stops_where_positions_end(prefix):
    model, processor = prefix
    prompt = processor.encode_question("red " * 100)
    found = generate(model, processor, pictures(1), [prompt], 1000)
    assert 1 <= len(found[0]) <= processor.text_limit - len(prompt.ids)


@pytest.mark.parametrize("seed", range(2))
def test_a_row_whose_positions_end_stops_alone(seed):
    """The others go on as if it were not there."""
    model, processor = make("prefix", seed)
    shown = pictures(8, seed)
    asked = ["red " * 100, "how many?", "two shapes", "", "red", "how many?", "what color?", "two"]
    prompts = [processor.encode_question(text) for text in asked]
    found = generate(model, processor, shown, prompts, 12)
    assert len(found[0]) < 12 == max(map(len, found))
    for image, prompt, ids in zip(shown, prompts, found, strict=True):
        assert ids == generate(model, processor, [image], [prompt], 12)[0]


def test_dual_encoder_answers_with_the_nearest_candidate(dual):
    model, processor = dual
    images, questions = pictures(4), ["what color?", "how many?", "what color?", "what shape?"]
    found = answer(model, processor, images, questions)
    for image, question, text in zip(images, questions, found, strict=True):
        texts = embed_texts(model, processor, [f"{question} {candidate}" for candidate in processor.answers])
        scores = texts @ model.encode_image(processor.images([image]))[0]
        assert text == processor.answers[int(scores.argmax())]


def test_dual_encoder_without_candidates_or_asked_for_captions_says_so(dual):
    model, processor = dual
    with pytest.raises(UserError, match="expected a language head"):
        caption(model, processor, pictures(1))
    processor.answers = ()
    with pytest.raises(UserError, match="no candidate answers"):
        answer(model, processor, pictures(1), ["what?"])


@pytest.mark.parametrize(("preset", "side"), [("prefix", 2), ("dual", 4)])
def test_attention_map_is_a_distribution_over_the_picture(preset, side):
    model, processor = make(preset)
    found = attention_map(model, processor, pictures(1)[0], "what color is the circle?")
    assert found.shape == (side, side)
    assert found.min() >= 0 and found.sum().item() == pytest.approx(1)
    assert not found.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_kept_weights_do_not_change_the_answer(prefix):
    model, processor = prefix
    batch = stack([[processor.encode_question("what color?")]])
    given = (processor.images(pictures(1)), batch["tokens"], batch["segments"], batch["positions"])
    weights = []
    torch.testing.assert_close(model(*given, weights=weights).logits, model(*given).logits, rtol=1e-4, atol=1e-4)
    assert [tuple(layer.shape[-2:]) for layer in weights] == [(4 + batch["tokens"].shape[1],) * 2] * 2
