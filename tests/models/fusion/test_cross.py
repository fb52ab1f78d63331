"""Words that look at pictures: Flamingo and VisualGPT against their papers' equations, and what must never be seen."""

import pytest
import torch

from tests.models.fusion.small import (
    SMALL,
    attention,
    compare_gradients,
    cross_attention,
    feed_forward,
    gelu,
    images,
    make_small,
    norm,
    self_attention,
    squared_relu,
)
from tests.models.tiny import TEXTS, pictures
from vlmpipe.config import parse
from vlmpipe.errors import UserError
from vlmpipe.models import VLMConfig, build
from vlmpipe.models.fusion import Inputs
from vlmpipe.models.generate import generate
from vlmpipe.models.generate.rows import Example, ask
from vlmpipe.models.layers import Cache, Memory
from vlmpipe.models.processor import EncodedText, stack

PICTURE = 3  # any token can stand where a picture does


def interleaved():
    """Two rows: one of two pictures among words, one whose picture stands first, shorter."""
    tokens = torch.tensor([[5, PICTURE, 6, 7, PICTURE, 8, 9], [PICTURE, 10, 11, 12, 0, 0, 0]])
    return {
        "images": images(3),
        "tokens": tokens,
        "segments": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
        "positions": torch.arange(7).expand(2, -1),
        "image_places": tokens == PICTURE,
        "image_rows": torch.tensor([0, 0, 1]),
    }


def resample(x, part, heads):
    """Flamingo, figure 5: the keys and values of each layer are the media and the latents."""
    latents = part.latents
    for layer in part.layers:
        normed = norm(latents, layer.latent_norm)
        seen = torch.cat([norm(x, layer.media_norm), normed])
        latents = latents + cross_attention(normed, seen, layer.attention, heads)
        latents = latents + feed_forward(norm(latents, layer.feed_forward_norm), layer.feed_forward, squared_relu)
    return norm(latents, part.norm)


def gated(y, x, part, heads, seen):
    """Flamingo, figure 4."""
    seen = cross_attention(norm(y, part.attention_norm), x, part.attention, heads, seen)
    y = y + part.attention_gate.tanh() * seen
    dense = feed_forward(norm(y, part.feed_forward_norm), part.feed_forward, squared_relu)
    return y + part.feed_forward_gate.tanh() * dense


def flamingo(model, tokens, media, last):
    """Logits of one row. `last` [t]: the number of the last medium before each token, -1 for none (the paper's phi)."""
    text, count = model.text, len(tokens)
    y = text.token_embedding.weight[tokens] + text.position_embedding.weight[:count]
    seen = (last[:, None] == torch.arange(len(media))).repeat_interleave(media.shape[1], 1)
    causal = torch.ones(count, count).tril()
    for block in text.transformer.blocks:
        if block.cross is not None:
            y = gated(y, media.flatten(0, 1), block.cross, 2, seen)
        y = y + self_attention(norm(y, block.attention_norm), block.attention, 3, causal)
        y = y + feed_forward(norm(y, block.feed_forward_norm), block.feed_forward, gelu)
    return norm(y, text.norm) @ text.token_embedding.weight.T


def test_flamingo_is_the_papers_equations():
    model, _ = make_small("flamingo")
    batch = interleaved()
    found = model(**batch).logits
    seen, part = model.vision(batch["images"]), model.fusion.resampler
    projected = seen @ part.project.weight.T + part.project.bias + part.frame_embedding.weight[0]
    media = torch.stack([resample(picture, part, 2) for picture in projected])
    first = flamingo(model, batch["tokens"][0], media[:2], torch.tensor([-1, 0, 0, 0, 1, 1, 1]))
    second = flamingo(model, batch["tokens"][1, :4], media[2:], torch.zeros(4))
    compare_gradients(torch.cat([found[0], found[1, :4]]), torch.cat([first, second]), model)


def test_a_clip_is_one_medium_of_frames_in_time():
    model, _ = make_small("flamingo")
    part, tokens = model.fusion.resampler, torch.randn(5, 4, 20)
    found = part(tokens, torch.tensor([0, 1, 0, 0, 1]))
    projected = part.project(tokens)
    times = part.frame_embedding.weight
    clips = [[0, 1], [2], [3, 4]]
    for clip, members in enumerate(clips):
        frames = torch.cat([projected[picture] + times[place] for place, picture in enumerate(members)])
        torch.testing.assert_close(found[clip], resample(frames, part, 2), rtol=1e-4, atol=1e-5)
    swapped = part(tokens[[1, 0, 2, 3, 4]], torch.tensor([0, 1, 0, 0, 1]))
    assert not torch.allclose(swapped[0], found[0], atol=1e-3)


def test_a_longer_clip_gets_times_between_the_learned_ones():
    part = make_small("flamingo")[0].fusion.resampler
    first, last = part.frame_embedding.weight
    torch.testing.assert_close(part.times(3), torch.stack([first, (first + last) / 2, last]))
    assert part(torch.randn(3, 4, 20), torch.arange(3)).shape == (1, 3, 22)


def test_gates_at_zero_leave_the_language_model_unchanged_to_the_bit():
    model, _ = make_small("flamingo")
    batch = interleaved()
    opened = model(**batch).logits
    crossed = [block for block in model.text.transformer.blocks if block.cross is not None]
    assert len(crossed) == 1
    with torch.no_grad():
        for block in crossed:
            block.cross.attention_gate.zero_()
            block.cross.feed_forward_gate.zero_()
    closed = model(**batch).logits
    for block in crossed:
        block.cross = None
    assert torch.equal(closed, model(**batch).logits)
    assert not torch.allclose(closed, opened, atol=1e-2)


def test_gates_start_closed():
    model, _ = build(parse(VLMConfig, SMALL["flamingo"], "flamingo"), TEXTS)
    gates = [value for name, value in model.named_parameters() if name.endswith("_gate")]
    assert len(gates) == 2 and all(gate == 0 for gate in gates)


def test_a_token_sees_neither_a_later_picture_nor_another_samples():
    model, _ = make_small("flamingo")
    batch = interleaved()
    before = model(**batch).logits

    def changed(picture):
        other = batch["images"].clone()
        other[picture] = 255 - other[picture]
        return (model(**{**batch, "images": other}).logits - before).abs().amax(-1) > 1e-6

    assert changed(0).int().tolist() == [[0, 1, 1, 1, 1, 1, 1], [0] * 7]  # later words see it through earlier ones
    assert changed(1).int().tolist() == [[0, 0, 0, 0, 1, 1, 1], [0] * 7]
    assert changed(2)[0].sum() == 0 and changed(2)[1, :4].all()
    looks = []
    model(**batch, looks=looks)
    assert [look.shape for look in looks] == [(2, 2, 7, 6)]


def test_texts_of_a_row_see_their_own_pictures_and_shared_ones():
    model, _ = make_small("flamingo")
    batch = interleaved()
    # Both rows of the batch one after another in one.
    names = ("tokens", "positions", "image_places")
    packed = {name: torch.cat([batch[name][0], batch[name][1, :4]])[None] for name in names}
    packed |= {"segments": torch.tensor([[1] * 7 + [2] * 4]), "image_rows": torch.zeros(3, dtype=torch.int64)}
    packed |= {"images": batch["images"]}
    alone = model(**batch).logits
    together = model(**packed).logits[0]
    torch.testing.assert_close(together[:7], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[7:], alone[1, :4], rtol=1e-4, atol=1e-5)


def test_all_pictures_before_a_word_are_seen_where_the_config_says_so():
    model, _ = make_small("flamingo")
    batch = interleaved()
    last = model.fusion.media(model.vision, Inputs(**batch))
    passed = torch.tensor([[0, 1, 1, 1, 2, 2, 2], [1] * 7])
    model.fusion.last = False
    mask = model.fusion.mask(last, batch["segments"], passed)[:, 0, :, ::3].int().tolist()
    assert mask[0] == [[0, 0], [1, 0], [1, 0], [1, 0], [1, 1], [1, 1], [1, 1]]
    assert mask[1] == [[1, 0]] * 4 + [[0, 0]] * 3
    model.fusion.last = True
    assert model.fusion.mask(last, batch["segments"], passed)[0, 0, :, ::3].int().tolist() == [
        [0, 0], [1, 0], [1, 0], [1, 0], [0, 1], [0, 1], [0, 1]
    ]


def test_places_and_pictures_must_be_as_many():
    model, _ = make_small("flamingo")
    batch = interleaved()
    batch["image_places"] = batch["image_places"].clone()
    batch["image_places"][0, 1] = False
    with pytest.raises(UserError, match="found 2 places for 3 pictures"):
        model(**batch)


def test_a_text_without_pictures_sees_zeros():
    model, _ = make_small("flamingo")
    batch = {name: interleaved()[name] for name in ("tokens", "segments", "positions")}
    y = flamingo(model, batch["tokens"][0], torch.zeros(1, 3, 22), torch.full((7,), -1))
    torch.testing.assert_close(model(**batch).logits[0], y, rtol=1e-4, atol=1e-5)


def visualgpt(model, tokens, memory):
    """Logits of one row: the self-attention's output H, then equations 3 to 6 of the paper, then the feed-forward."""
    text, count = model.text, len(tokens)
    h = text.token_embedding.weight[tokens] + text.position_embedding.weight[:count]
    for block in text.transformer.blocks:
        part = block.cross
        h = h + self_attention(norm(h, block.attention_norm), block.attention, 3, torch.ones(count, count).tril())
        seen = cross_attention(norm(h, part.norm), memory, part.attention, 3)
        gate = 1 / (1 + (-h).exp())
        visual = torch.where(gate > 0.3, gate, 0)
        language = torch.where(1 - gate > 0.3, 1 - gate, 0)
        h = visual * seen + language * h
        h = h + feed_forward(norm(h, block.feed_forward_norm), block.feed_forward, gelu)
    return norm(h, text.norm) @ text.token_embedding.weight.T


def test_visualgpt_is_the_papers_equations():
    model, _ = make_small("visualgpt")
    tokens = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    segments = torch.tensor([[1] * 4, [1] * 3 + [0]])
    found = model(images(2), tokens, segments, torch.arange(4).expand(2, -1)).logits
    memory = model.vision(images(2))
    expected = [visualgpt(model, tokens[0], memory[0]), visualgpt(model, tokens[1, :3], memory[1])]
    compare_gradients(torch.cat([found[0], found[1, :3]]), torch.cat(expected), model)


def test_complementary_gates_shut_one_side_and_never_both():
    model, _ = make_small("visualgpt")
    part = model.text.transformer.blocks[0].cross
    memory = Memory(torch.randn(1, 4, 20))
    x = torch.full((1, 1, 24), 3.0)  # sigmoid(3) = 0.95: the language gate, 0.05, is shut
    seen = part.attention(part.norm(x), memory.tokens)
    torch.testing.assert_close(part(x, memory, None), torch.sigmoid(x) * seen)
    torch.testing.assert_close(part(-x, memory, None), -x * torch.sigmoid(x))


@pytest.mark.parametrize("name", ["flamingo", "visualgpt"])
def test_generation_with_a_cache_equals_the_whole_text_again(name):
    model, processor = make_small(name)
    seen, questions = pictures(2, seed=3), ("", "what color is the circle?")
    prompts = [processor.encode_question(text) for text in questions]
    found = generate(model, processor, seen, prompts, 6)
    for image, prompt, new in zip(processor.images(seen), prompts, found, strict=True):
        ids = list(prompt.ids)
        for token in new:
            batch = stack([[EncodedText(tuple(ids), 0)]])
            batch = {name: batch[name] for name in ("tokens", "segments", "positions")}
            assert int(model(image[None], **batch).logits[0, -1].argmax()) == token
            ids.append(token)


def test_examples_stand_before_the_question_each_with_its_picture():
    """A few-shot prompt is a row of pictures among words."""
    model, processor = make_small("flamingo")
    shown = [Example(image, "what color?", "red") for image in pictures(2)]
    prompt = processor.encode_question("what color?")
    batch = ask(model, processor, pictures(1, seed=5), [prompt], shown)
    assert batch["image_places"].sum() == 3 and batch["tokens"].shape[1] < 32
    found = model(**batch).logits
    other = ask(model, processor, pictures(1, seed=6), [prompt], shown)
    before = int(batch["image_places"][0].nonzero()[-1])
    differs = (model(**other).logits - found).abs().amax(-1)[0]
    assert differs[:before].max() < 1e-6 < differs[before:].min()


def test_a_cached_token_sees_the_last_picture_among_the_words():
    model, _ = make_small("flamingo")
    batch = interleaved()
    whole = model(**batch).logits[:1]
    first = {name: value[:1, :6] for name, value in batch.items() if name not in ("images", "image_rows")}
    cache = Cache()
    before = model(images=batch["images"][:2], image_rows=torch.zeros(2).long(), **first, cache=cache).logits
    after = model(
        tokens=batch["tokens"][:1, 6:], segments=torch.ones(1, 1).long(), positions=torch.tensor([[6]]), cache=cache
    ).logits
    torch.testing.assert_close(torch.cat([before, after], dim=1), whole, rtol=1e-4, atol=1e-5)


def test_attention_of_nothing_is_zero():
    assert attention(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2), 1, torch.zeros(1, 1)).abs().sum() == 0
