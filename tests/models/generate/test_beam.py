"""Beam search finds the texts of transformers with their scores."""

import itertools

import pytest
import torch

from tests.models.generate.lm import gpt2, rows
from vlmpipe.models.generate import GenerationConfig, Trie, beam_search, decode
from vlmpipe.models.parity import random_module
from vlmpipe.models.pretrained import convert

TEXTS = ([3, 4, 5], [6, 7, 8, 9, 10, 11], [12])
SETTINGS = [(1.0, False), (0.0, False), (2.0, False), (-1.0, False), (1.0, True)]


def theirs_say(model, text, beams, limit, eos, penalty, early, **given):
    found = model.generate(
        torch.tensor([text]), attention_mask=torch.ones(1, len(text), dtype=torch.int64), max_new_tokens=limit,
        num_beams=beams, num_return_sequences=beams, do_sample=False, length_penalty=penalty, early_stopping=early,
        eos_token_id=eos, pad_token_id=0, return_dict_in_generate=True, output_scores=True, **given,
    )
    said = []
    for ids in found.sequences[:, len(text) :].tolist():
        said.append(tuple(ids[: ids.index(eos) + 1] if eos in ids else ids))
    return said, found.sequences_scores


@pytest.mark.parametrize(("penalty", "early"), SETTINGS)
def test_gpt2_says_the_same(penalty, early):
    ours, theirs = gpt2()
    ends = []
    free = decode(ours, rows(*TEXTS), 8, eos=-1)
    for eos in {free[0][2], free[1][1], free[2][4], 7}:  # likely ends, and one that never comes
        config = GenerationConfig("beam", beams=3, length_penalty=penalty, early_stopping=early)
        found = beam_search(ours, rows(*TEXTS), 8, eos, config)
        for text, beams in zip(TEXTS, found, strict=True):
            expected, scores = theirs_say(theirs, text, 3, 8, eos, penalty, early)
            assert [beam.ids for beam in beams] == expected
            torch.testing.assert_close(torch.tensor([beam.score for beam in beams]), scores, rtol=1e-5, atol=1e-5)
            ends += [beam.ids[-1] == eos for beam in beams]
    assert any(ends) and not all(ends)


def test_llava_says_the_same():
    """Pictures in the rows, padding, rows that end at their own time."""
    config, theirs = random_module("llava")
    ours = convert(config.to_dict(), theirs.state_dict())
    mark, count = config.image_token_index, 16
    texts = ([7, *[mark] * count, 8, 9], [*[mark] * count, 10], [11, 12, *[mark] * count, 13, 14, 15])
    pixels = torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    batch = rows(*texts)
    batch |= {"images": pixels, "image_places": batch["tokens"] == mark}
    eos = decode(ours, batch, 6, eos=-1)[1][3]
    found = beam_search(ours, batch, 6, eos, GenerationConfig("beam", beams=4))
    assert any(beam.ids[-1] == eos for beams in found for beam in beams)
    for row, text in enumerate(texts):
        expected, scores = theirs_say(theirs, text, 4, 6, eos, 1.0, False, pixel_values=pixels[row : row + 1])
        assert [beam.ids for beam in found[row]] == expected
        torch.testing.assert_close(torch.tensor([beam.score for beam in found[row]]), scores, rtol=1e-5, atol=1e-5)


def test_one_beam_of_given_texts_is_the_best_of_them_when_beams_are_as_many():
    """Exhaustive search over a list, against the likelihood of each."""
    ours, _ = gpt2()
    eos = 30
    texts = [(*parts, eos) for parts in itertools.product((3, 4), (5, 6, 7))]
    found = beam_search(
        ours, rows(*TEXTS), 5, eos, GenerationConfig("beam", beams=6, length_penalty=0.0), [Trie(texts)] * 3
    )
    for text, beams in zip(TEXTS, found, strict=True):
        scores = {}
        for ids in texts:
            batch = rows([*text, *ids])
            logits = ours(**batch).logits[0, len(text) - 1 : -1].log_softmax(-1)
            scores[ids] = logits[torch.arange(len(ids)), list(ids)].sum().item()
        assert [beam.ids for beam in beams] == sorted(texts, key=lambda ids: -scores[ids])
        assert beams[0].score == pytest.approx(max(scores.values()), abs=1e-4)
