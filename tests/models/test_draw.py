"""Drawing code by code with a cache is drawing with the whole row each time."""

import pytest
import torch

from tests.models.fusion.small import images, make_small
from tests.models.tiny import make
from vlmpipe.errors import UserError
from vlmpipe.models.draw import choose, draw, picture_loss, sample_codes
from vlmpipe.models.processor import EncodedText, stack

CAPTIONS = ["a red circle above a blue square", "two"]


def words(processor, text):
    encoded = processor.encode(text) if text else EncodedText((processor.bos,), 0)
    return {name: stack([[encoded]])[name] for name in ("tokens", "segments", "positions")}


def plain(model, processor, caption, guidance):
    """The likeliest code each time, no cache, no batch."""
    written = []
    while len(written) < 4:
        row = torch.tensor([[12, *written]])
        logits = model(**words(processor, caption), codes=row).image_logits[0, -1]
        without = model(**words(processor, ""), codes=row).image_logits[0, -1]
        written.append(int((without + guidance * (logits - without)).argmax()))
    return written


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_drawing_with_a_cache_equals_the_whole_row_again(guidance):
    model, processor = make_small("text-to-image", seed=2)
    found = sample_codes(model, processor, CAPTIONS, 0, 0, guidance, 0)
    assert found.tolist() == [plain(model, processor, caption, guidance) for caption in CAPTIONS]
    pictures = draw(model, processor, CAPTIONS, temperature=0, guidance=guidance)
    assert [picture.size for picture in pictures] == [(16, 16)] * 2
    pixels = torch.tensor(list(pictures[1].tobytes()), dtype=torch.uint8).view(16, 16, 3).permute(2, 0, 1)
    assert torch.equal(pixels, model.codes.decode(found)[1])


def test_the_same_seed_draws_the_same_and_places_differ():
    model, processor = make_small("text-to-image")
    args = (model, processor, ["two"] * 3, 2.0, 0, 1.0)
    first, again, other = sample_codes(*args, 0), sample_codes(*args, 0), sample_codes(*args, 1)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[1:], other[:2])  # picture i has seed + i
    assert len({tuple(row) for row in first.tolist()}) > 1


def test_top_k_and_temperature_limit_what_is_drawn():
    logits = torch.tensor([[0.0, 3.0, 2.0, -1.0]]).expand(200, -1)
    generators = [torch.Generator().manual_seed(seed) for seed in range(200)]
    assert set(choose(logits, 1.0, 2, generators).tolist()) == {1, 2}
    assert choose(logits, 0, 0, generators).unique().tolist() == [1]
    assert set(choose(logits, 5.0, 0, generators).tolist()) == {0, 1, 2, 3}
    drawn = choose(logits[:1].expand(2000, -1), 1.0, 0, [torch.Generator().manual_seed(seed) for seed in range(2000)])
    shares = drawn.bincount(minlength=4) / 2000
    torch.testing.assert_close(shares, logits[0].softmax(0), atol=0.03, rtol=0)


def test_the_loss_of_a_picture_is_the_sum_over_its_codes():
    model, processor = make_small("text-to-image")
    found = picture_loss(model, processor, images(2), CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        codes = model.codes.encode(images(2))[row]
        chances = model(**words(processor, caption), codes=model.codes.opening(codes[None])).image_logits[0].softmax(-1)
        torch.testing.assert_close(found[row], -chances[torch.arange(4), codes].log().sum())


def test_models_that_do_not_draw_and_numbers_without_sense_are_refused():
    with pytest.raises(UserError, match="without an image_tokens head"):
        draw(*make("prefix"), CAPTIONS)
    with pytest.raises(UserError, match="found temperature -1"):
        draw(*make_small("text-to-image"), CAPTIONS, temperature=-1)
