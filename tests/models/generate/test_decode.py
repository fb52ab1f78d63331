"""Sampling, and texts written in a batch against each alone and against transformers."""

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tests.models.generate.lm import gpt2, rows
from vlmpipe.errors import UserError
from vlmpipe.models.generate import GenerationConfig, decode
from vlmpipe.models.generate.decode import keep, sample
from vlmpipe.models.layers import Cache

TEXTS = ([3, 4, 5], [6, 7, 8, 9, 10, 11], [12])


@pytest.mark.parametrize("settings", [(0.7, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.6), (1.3, 7, 0.8), (1.0, 100, 0.01)])
def test_what_may_be_drawn_is_what_transformers_leaves(settings):
    temperature, top_k, top_p = settings
    logits = 3 * torch.randn(6, 31, generator=torch.Generator().manual_seed(0))
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
    expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
    found = keep(logits, GenerationConfig("sample", temperature, top_k, top_p))
    assert torch.equal(found.isinf(), expected.isinf())
    torch.testing.assert_close(found.softmax(-1), expected.softmax(-1))


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(20_000, -1)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    counts = sample(logits, GenerationConfig("sample"), uniform).bincount(minlength=4) / 20_000
    torch.testing.assert_close(counts, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.01, rtol=0)
    edges = sample(logits[:2], GenerationConfig("sample", top_k=2), torch.tensor([0.0, 1.0 - 2**-24]))
    assert edges.tolist() == [3, 2]


def test_greedy_equals_transformers_and_rows_end_alone():
    ours, theirs = gpt2()
    free = decode(ours, rows(*TEXTS), 12, eos=-1)
    eos = free[1][4]  # where the second row ends, others may later or not at all
    found = decode(ours, rows(*TEXTS), 12, eos)
    for text, new in zip(TEXTS, found, strict=True):
        expected = theirs.generate(
            torch.tensor([text]), attention_mask=torch.ones(1, len(text), dtype=torch.int64), max_new_tokens=12,
            do_sample=False, eos_token_id=eos, pad_token_id=0,
        )[0, len(text) :].tolist()
        assert new == expected
        assert decode(ours, rows(text), 12, eos) == [new]
    assert len({len(new) for new in found}) > 1


def test_a_row_draws_the_same_whatever_else_is_written():
    ours, _ = gpt2()
    config = GenerationConfig("sample", temperature=2.0, seed=3)
    found = decode(ours, rows(*TEXTS), 12, eos=5, config=config)
    assert decode(ours, rows(TEXTS[0], TEXTS[2], TEXTS[1]), 12, eos=5, config=config)[0] == found[0]
    assert decode(ours, rows(*TEXTS), 12, eos=5, config=config) == found
    assert decode(ours, rows(*TEXTS), 12, eos=5, config=GenerationConfig("sample", temperature=2.0, seed=4)) != found


def test_every_row_may_use_all_positions_that_the_model_has():
    ours, _ = gpt2()
    found = decode(ours, rows(*TEXTS), 1000, eos=-1)
    assert [len(new) for new in found] == [40 - len(text) for text in TEXTS]
    assert decode(ours, rows([3] * 40, [4] * 39), 5, eos=-1)[0] == []


def test_a_cache_with_room_is_one_without():
    """Written in place or appended, and rows chosen in between."""
    torch.manual_seed(0)
    for room in (0, 2, 9):
        cache, plain = Cache(room=room), []
        kept = torch.tensor([2, 0, 0])
        cache.segments = torch.ones(3, 1)
        for step, length in enumerate((3, 1, 1, 2)):
            key = torch.randn(3, 2, length, 4)
            plain = [part[kept] for part in plain] if step == 2 else plain
            if step == 2:
                cache.select(kept)
            plain.append(key)
            keys, values = cache.extend(0, key, 2 * key)
            assert torch.equal(keys, torch.cat(plain, dim=2)) and torch.equal(values, 2 * torch.cat(plain, dim=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature: found 0.0"),
        ({"top_k": -1}, "top_k: found -1"),
        ({"top_p": 0.0}, "top_p: found 0.0"),
        ({"top_p": 1.1}, "top_p: found 1.1"),
        ({"beams": 0}, "beams: found 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        GenerationConfig(**change)
