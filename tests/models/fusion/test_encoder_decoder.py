"""An encoder that reads and a decoder that writes: SimVLM and Parti against plain formulas, and who sees whom."""

import dataclasses

import pytest
import torch

from tests.models.fusion.small import (
    SMALL,
    TRANSFORMER,
    compare_gradients,
    cross_attention,
    feed_forward,
    gelu,
    images,
    make_small,
    norm,
    self_attention,
)
from tests.models.tiny import pictures
from vlmpipe.config import parse
from vlmpipe.errors import UserError
from vlmpipe.models import VLMConfig, load, save
from vlmpipe.models.generate import generate
from vlmpipe.models.processor import EncodedText, stack

INPUTS = ("tokens", "segments", "positions", "prefix")


def words(processor, *texts, start=4):
    batch = stack([[dataclasses.replace(processor.encode(text), start=start)] for text in texts])
    return {name: batch[name] for name in INPUTS}


def encode(model, x):
    """All tokens see each other."""
    for block in model.fusion.encoder.transformer.blocks:
        x = x + self_attention(norm(x, block.attention_norm), block.attention, 3, torch.ones(len(x), len(x)))
        x = x + feed_forward(norm(x, block.feed_forward_norm), block.feed_forward, gelu)
    return norm(x, model.fusion.encoder.norm)


def decode(model, tokens, memory):
    """A token sees those before it, and all of the memory (arXiv 1706.03762, section 3.1)."""
    text, count = model.text, len(tokens)
    x = text.token_embedding.weight[tokens] + text.position_embedding.weight[:count]
    for block in text.transformer.blocks:
        x = x + self_attention(norm(x, block.attention_norm), block.attention, 3, torch.ones(count, count).tril())
        x = x + cross_attention(norm(x, block.cross.norm), memory, block.cross.attention, 3)
        x = x + feed_forward(norm(x, block.feed_forward_norm), block.feed_forward, gelu)
    return norm(x, text.norm)


def simvlm(model, image, tokens, start):
    """Logits of the words from place `start` on, in SimVLM's words: x of [T_p, T) given x before T_p (equation 3)."""
    stem, table = model.vision.stem, model.text.token_embedding.weight
    mean, std = model.vision.mean[0], model.vision.std[0]
    pixels = ((image.float() / 255 - mean) / std).reshape(3, 2, 8, 2, 8).permute(1, 3, 0, 2, 4).reshape(4, -1)
    patches = pixels @ stem.weight.flatten(1).T + stem.bias + model.vision.position_embedding
    patches = patches @ model.fusion.project.weight.T + model.fusion.project.bias
    given = table[tokens[:start]] + model.fusion.encoder.position_embedding.weight[:start]
    memory = encode(model, torch.cat([patches, given]))
    return decode(model, tokens[start:], memory) @ table.T


def test_simvlm_is_its_equations():
    model, processor = make_small("simvlm")
    batch = words(processor, "a red circle above a blue square", "a red circle", start=4)
    seen = images(2)
    found = model(images=seen, **batch).logits
    lengths = (batch["segments"] == 1).sum(1).tolist()
    assert batch["prefix"].sum(1).tolist() == [3, 3] and lengths[0] > lengths[1]
    ours = [found[row, 3:length] for row, length in enumerate(lengths)]
    plain = [simvlm(model, seen[row], batch["tokens"][row, :length], 3) for row, length in enumerate(lengths)]
    compare_gradients(torch.cat(ours), torch.cat(plain), model)


def test_given_words_see_each_other_and_later_ones_only_backward():
    model, processor = make_small("simvlm")
    seen, batch = images(1), words(processor, "a red circle above a blue square", start=4)
    before = model(images=seen, **batch).logits[0]

    def changed(place):
        tokens = batch["tokens"].clone()
        tokens[0, place] = 5
        return ((model(images=seen, **{**batch, "tokens": tokens}).logits[0] - before).abs().amax(-1) > 1e-6).tolist()

    length = batch["tokens"].shape[1]
    for place in range(3):  # any given word changes all that is written
        assert changed(place)[3:] == [True] * (length - 3)
    for place in range(3, length):
        assert changed(place)[3:] == [later >= place for later in range(3, length)]
    # The encoder's view of the first given word changes with the last one, and with no word that is not given.
    inputs = dict(zip(("images", *INPUTS), (seen, *batch.values()), strict=True))
    known = read(model, inputs)[0, :7]  # four patches and three words
    assert torch.equal(read(model, {**inputs, "tokens": replaced(batch["tokens"], 3)})[0, :7], known)
    moved = (read(model, {**inputs, "tokens": replaced(batch["tokens"], 2)})[0, :7] - known).abs().amax(-1)
    assert (moved > 1e-6).all()


def replaced(tokens, place):
    tokens = tokens.clone()
    tokens[0, place] = 5
    return tokens


def read(model, inputs):
    """What the encoder makes of one row."""
    outputs = []
    hook = model.fusion.encoder.norm.register_forward_hook(lambda module, given, output: outputs.append(output))
    model(**inputs)
    hook.remove()
    return outputs[0].clone()


def test_texts_of_a_row_are_read_one_by_one():
    model, processor = make_small("simvlm")
    texts = [
        processor.encode_answer("what color is the circle?", "red"), processor.encode_answer("", "a red circle"),
        processor.encode_answer("how many?", "two"),
    ]
    seen = images(2)
    row = stack([[texts[0], texts[1]], [texts[2]]])
    together = model(images=seen, **{name: row[name] for name in INPUTS}).logits
    at = 0
    for text, picture, index in ((texts[0], 0, 0), (texts[1], 0, 0), (texts[2], 1, 1)):
        at = 0 if index else at
        one = stack([[text]])
        alone = model(images=seen[picture : picture + 1], **{name: one[name] for name in INPUTS}).logits[0]
        written = slice(at + text.start - 1, at + len(text.ids))
        torch.testing.assert_close(together[index, written], alone[text.start - 1 :], rtol=1e-4, atol=1e-5)
        at += len(text.ids)


def test_several_pictures_of_a_row_are_all_read():
    model, processor = make_small("simvlm")
    batch, seen = words(processor, "a red circle", "two shapes"), images(3)
    rows = torch.tensor([0, 0, 1])
    before = model(images=seen, image_rows=rows, **batch).logits
    for picture, row in enumerate(rows.tolist()):
        other = seen.clone()
        other[picture] = 255 - other[picture]
        moved = (model(images=other, image_rows=rows, **batch).logits - before).abs().amax((1, 2)) > 1e-6
        assert moved.tolist() == [row == 0, row == 1]
    alone = model(images=seen[2:], **{name: value[1:] for name, value in batch.items()}).logits
    torch.testing.assert_close(before[1:], alone, rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache_equals_the_whole_text_again():
    model, processor = make_small("simvlm")
    seen = pictures(2, seed=3)
    prompts = [processor.encode_question(text) for text in ("", "what color is the circle?")]
    found = generate(model, processor, seen, prompts, 6)
    for image, prompt, new in zip(processor.images(seen), prompts, found, strict=True):
        ids = list(prompt.ids)
        for token in new:
            batch = stack([[EncodedText(tuple(ids), prompt.start)]])
            logits = model(images=image[None], **{name: batch[name] for name in INPUTS}).logits
            assert int(logits[0, -1].argmax()) == token
            ids.append(token)


def test_parti_is_an_encoder_of_words_and_a_decoder_of_codes():
    model, processor = make_small("text-to-image")
    batch, seen = words(processor, "a red circle above a blue square", "two"), images(2)
    del batch["prefix"]
    found = model(images=seen, **batch)
    codes = model.codes.encode(seen)
    assert torch.equal(found.image_codes, codes) and found.logits is None
    logits = []
    for row, length in enumerate((batch["segments"] == 1).sum(1).tolist()):
        part = model.fusion.encoder
        x = part.token_embedding.weight[batch["tokens"][row, :length]] + part.position_embedding.weight[:length]
        before = torch.cat([torch.tensor([12]), codes[row, :-1]])
        logits.append(decode(model, before, encode(model, x)) @ model.image_tokens.output.weight.T)
    compare_gradients(found.image_logits, torch.stack(logits), model)


@pytest.mark.parametrize("name", SMALL)
def test_models_are_saved_whole(tmp_path, name):
    """With the codebook of one that writes pictures; a shared embedding once."""
    model, processor = make_small(name)
    save(model, processor, tmp_path)
    again, _ = load(tmp_path)
    assert again.config == model.config and (again.codes is None or again.codes.codebook.any())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


SIMVLM, DRAWS = SMALL["simvlm"], SMALL["text-to-image"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**SIMVLM, "encoder": None}, "encoder: found none"),
        ({**SIMVLM, "encoder": {**SIMVLM["encoder"], "causal": True}}, "encoder: found causal True"),
        ({**SIMVLM, "encoder": DRAWS["encoder"]}, "encoder: found width 18; expected 24"),
        ({**SIMVLM, "fusion": {"kind": "prefix"}}, "cross: found CrossConfig.* expected one with 'cross'"),
        ({**SIMVLM, "text": {"transformer": TRANSFORMER}}, "cross: found None with fusion 'encoder"),
        ({**SIMVLM, "heads": {}}, "heads: found none with fusion 'encoder_decoder'"),
        ({**SIMVLM, "vision": None}, "vision, codes: found none of them, without heads.image_tokens"),
        ({**DRAWS, "codes": None}, "vision, codes: found none of them, with heads.image_tokens"),
        ({**DRAWS, "text": {**DRAWS["text"], "context": 3}}, "text.context 3; expected 'encoder_decoder' and 4"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        parse(VLMConfig, config, "model")
