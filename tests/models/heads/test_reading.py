"""Heads over what a fusion gave, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from tests.models.joined import batch, make
from tests.models.tiny import TEXTS
from tests.models.tiny import make as make_tiny
from vlmpipe.config import parse
from vlmpipe.errors import UserError
from vlmpipe.models.heads import HeadsConfig
from vlmpipe.models.processor import MASK, SPECIAL_TOKENS


def test_a_tokenizer_has_a_mask_where_words_are_hidden():
    model, processor = make("single_stream")
    config = model.config.heads.masked_text
    assert processor.tokenizer.token_to_id(MASK) == config.mask_token
    ids = [token for text in TEXTS for token in processor.encode(text).ids[1:-1]]
    assert min(ids) >= config.first_word == len(SPECIAL_TOKENS) + 1
    assert make_tiny("dual")[1].tokenizer.token_to_id(MASK) is None


def test_tied_words_are_read_with_their_embedding():
    model, processor = make("single_stream", masked_text={"tied": True})
    rows = batch(processor)
    reading = []
    model.masked_text.register_forward_pre_hook(lambda _, given: reading.append(given[0]))
    select = rows["segments"] != 0
    logits = model(**rows, select=select, heads=("masked_text",)).text_logits
    head = model.masked_text.met
    x = F.layer_norm(F.gelu(head.transform.dense(reading[0].fused.text[select])), (32,))
    x = x * head.transform.norm.weight + head.transform.norm.bias
    torch.testing.assert_close(logits, x @ model.text.token_embedding.weight.T + head.bias)
    assert head.output is None


def test_a_classifier_reads_the_word_before_the_last():
    model, processor = make("single_stream", answers={"classes": 5, "reads": "before_end"})
    rows, reading = batch(processor), []
    model.answers.register_forward_pre_hook(lambda _, given: reading.append(given[0].fused.text))
    found = model(**rows, heads=("answers",)).answers
    lengths = (rows["segments"] != 0).sum(dim=1)
    for row in range(4):
        torch.testing.assert_close(found[row], model.answers.output(reading[0][row, lengths[row] - 2]))


def test_only_wanted_heads_are_computed():
    model, processor = make("multimodal")
    rows = batch(processor)
    outputs = model(**rows, heads=("matching", "answers"))
    assert {name for name, value in vars(outputs).items() if value is not None} == {"matching", "answers"}


def test_patches_are_hidden_by_encoders_that_can():
    resnet = {
        "resnet": {"widths": [8, 16], "depths": [1, 1], "block": "basic", "stem_width": 8},
        "image_size": 32, "patch_size": 8,
    }
    model, processor = make("co_attention", vision=resnet)
    rows = batch(processor)
    assert model(**rows, heads=("matching",)).matching.shape == (4, 2)
    with pytest.raises(UserError, match="found hidden patches with a ResNet"):
        model(**rows, patch_mask=torch.ones(4, 16, dtype=torch.bool))
    stem = {"image_size": 32, "patch_size": 8, "transformer": {"width": 8, "depth": 0, "heads": 1}}
    model, _ = make("single_stream", vision=stem)
    with pytest.raises(UserError, match=r"found hidden patches without vision\.mask_token"):
        model(**rows, patch_mask=torch.ones(4, 16, dtype=torch.bool))


@pytest.mark.parametrize(("config", "message"), [
    ({"masked_text": {"mask_token": 7}}, "mask_token: found 7 with first_word 5"),
    ({"masked_image": {"predicts": "codes"}}, "codes: found 0 with predicts 'codes'"),
    ({"masked_image": {"codebook": {}}}, "codebook: found one with predicts 'pixels'"),
    ({"answers": {"classes": 0}}, "found classes 0, pictures 1, hidden 0"),
])
def test_values_are_checked(config, message):
    with pytest.raises(UserError, match=message):
        parse(HeadsConfig, config, "heads")


def test_a_tied_head_needs_the_embeddings_width():
    with pytest.raises(UserError, match="found true with tokens of width 40 and an embedding of width 32"):
        make("multimodal", masked_text={"tied": True})
