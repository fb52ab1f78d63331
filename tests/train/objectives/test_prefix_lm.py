"""Prefix language modelling: where texts are cut, and what is learned of them."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from tests.models.fusion.small import images, make_small
from tests.models.tiny import PRESETS, TEXTS, make
from vlmpipe.config import parse
from vlmpipe.models import VLMConfig, build
from vlmpipe.models.processor import stack
from vlmpipe.train.objectives import PrefixLM
from vlmpipe.train.objectives.prefix_lm import cut


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def rows(processor):
    caption = processor.encode_answer("", "a red circle above a blue square")
    answers = [processor.encode_answer("what color?", "red"), processor.encode_answer("how many?", "two shapes")]
    return stack([[caption], answers])


def test_a_text_is_cut_before_any_learned_token_each_as_likely():
    _, processor = make("prefix")
    batch = rows(processor)
    learned = batch["labels"] != -100
    count = int(learned[0].sum())
    torch.manual_seed(0)
    lengths = []
    for _ in range(600):
        prefix, labels = cut(batch["segments"], batch["labels"], batch["prefix"])
        left = labels != -100
        # What is given and what is learned are the text; both rows' texts are cut on their own.
        assert torch.equal(left, learned & ~prefix) and (prefix >= batch["prefix"]).all()
        assert left[0].any() and all(left[1][batch["segments"][1] == text].any() for text in (1, 2))
        assert torch.equal(labels[left], batch["labels"][left])
        lengths.append(count - int(left[0].sum()))
        given = prefix[0].nonzero()[:, 0].tolist()
        assert given == list(range(len(given)))
    shares = torch.tensor(lengths).bincount(minlength=count) / 600
    assert len(shares) == count and (shares - 1 / count).abs().max() < 0.05


def test_the_cuts_of_a_rows_texts_are_independent():
    _, processor = make("prefix")
    batch = rows(processor)
    torch.manual_seed(0)
    found = set()
    for _ in range(60):
        prefix, _ = cut(batch["segments"], batch["labels"], batch["prefix"])
        found.add(tuple(int(prefix[1][batch["segments"][1] == text].sum()) for text in (1, 2)))
    assert len({one for one, _ in found}) > 1 and len({two for _, two in found}) > 2


def test_the_loss_is_the_cross_entropy_of_the_rest():
    model, processor = make_small("simvlm")
    batch = {"images": images(2), **rows(processor)}
    torch.manual_seed(5)
    loss, _ = PrefixLM()(model, batch)
    torch.manual_seed(5)
    prefix, labels = cut(batch["segments"], batch["labels"], batch["prefix"])
    names = ("images", "tokens", "segments", "positions")
    logits = model(**{name: batch[name] for name in names}, prefix=prefix).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(loss, expected)


def test_without_chance_the_question_is_given_and_the_answer_learned():
    model, processor = make_small("simvlm")
    batch = {"images": images(2), **rows(processor)}
    names = ("images", "tokens", "segments", "positions", "prefix")
    logits = model(**{name: batch[name] for name in names}).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    torch.testing.assert_close(PrefixLM(random=False)(model, batch)[0], expected)


def test_a_decoder_alone_sees_its_given_words_in_both_directions():
    preset = {**PRESETS["prefix"], "fusion": {"kind": "prefix", "merge": 2, "attention": "prefix"}}
    model, processor = build(parse(VLMConfig, preset, "prefix"), TEXTS)
    model.eval()
    text = dataclasses.replace(processor.encode("a red circle above a blue square"), start=4)
    batch = stack([[text]])
    batch = {name: batch[name] for name in ("tokens", "segments", "positions", "prefix")}
    batch["images"] = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    before, length = model(**batch).logits[0], batch["tokens"].shape[1]
    for place in range(length):
        tokens = batch["tokens"].clone()
        tokens[0, place] = 5
        moved = (model(**{**batch, "tokens": tokens}).logits[0] - before).abs().amax(-1) > 1e-6
        assert moved.tolist() == [later >= place or max(later, place) < 3 for later in range(length)], place
    causal = model(**{**batch, "prefix": None}).logits[0]
    assert not torch.allclose(causal[0], before[0], atol=1e-4)
