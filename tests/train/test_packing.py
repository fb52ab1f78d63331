"""Packed rows: every sample once an epoch, few tokens wasted, a function of the step alone, each sample by itself."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.models.generate.test_rows import make_row
from tests.models.test_native import make as make_native
from tests.models.test_native import noise
from tests.models.tiny import PRESETS, TEXTS, pictures
from tests.train.test_pictures import png
from vlmpipe.config import parse
from vlmpipe.errors import UserError
from vlmpipe.models import VLMConfig, build
from vlmpipe.models.generate import ask
from vlmpipe.models.processor import EncodedText
from vlmpipe.train.batches import Dataset, Pair, make_dataset
from vlmpipe.train.loop import TrainConfig
from vlmpipe.train.packing import MarkedBatches, PackedBatches, Packer, first_fit_decreasing, places_of
from vlmpipe.train.pictures import decode_images
from vlmpipe.train.stages import make_batches

PICTURE, CAPACITY, SAMPLES = 4, 32, 101
MARK = 3  # the token that stands for a text's pictures


def line(tokens: int):
    """Every picture takes so many tokens, one after the other."""
    return lambda number: np.arange(tokens)


def made_up() -> Packer:
    """Sample i is picture i (all pixels i) with a text of 3 to 20 tokens, all i."""
    lengths = np.random.default_rng(0).integers(3, 21, SAMPLES)
    rows = tuple((i, (EncodedText((i,) * int(length), 0),)) for i, length in enumerate(lengths))
    images = np.broadcast_to(np.arange(SAMPLES, dtype=np.uint8)[:, None, None, None], (SAMPLES, 3, 2, 2))
    return Packer(Dataset(images, rows), CAPACITY, line(PICTURE))


def seen(batch) -> list[int]:
    return batch["images"][:, 0, 0, 0].tolist()


def test_first_fit_decreasing_by_hand():
    assert first_fit_decreasing([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]
    assert first_fit_decreasing([5, 5, 5], 5) == [[0], [1], [2]]


def test_rows_are_full_and_never_over():
    lengths = np.random.default_rng(1).integers(10, 200, 1000)
    rows = first_fit_decreasing(lengths, 512)
    assert sorted(number for row in rows for number in row) == list(range(1000))
    assert max(lengths[row].sum() for row in rows) <= 512
    assert lengths.sum() / (len(rows) * 512) > 0.98


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_sample_once_an_epoch_over_all_workers(world):
    workers = [PackedBatches(made_up(), 4, seed=5, rank=rank, world=world, window=40) for rank in range(world)]
    stream = [number for step in range(60) for worker in workers for number in seen(worker.at(step))]
    epochs = [stream[at : at + SAMPLES] for at in range(0, len(stream) - SAMPLES, SAMPLES)]
    assert len(epochs) > 3 and epochs[0] != epochs[1]
    assert all(set(Counter(epoch).values()) == {1} for epoch in epochs)


def test_a_batch_depends_on_its_number_alone():
    straight = PackedBatches(made_up(), 4, seed=2, window=40)
    batches = [straight.at(step) for step in range(40)]
    resumed = PackedBatches(made_up(), 4, seed=2, window=40)
    for step in (37, 3, 38):
        assert all(torch.equal(tensor, batches[step][name]) for name, tensor in resumed.at(step).items())
    assert seen(PackedBatches(made_up(), 4, seed=3, window=40).at(0)) != seen(batches[0])


def test_the_tensors_of_a_row():
    images = np.zeros((2, 3, 2, 2), np.uint8)
    rows = ((1, (EncodedText((7, 8, 9), 2), EncodedText((5, 6), 0))), (0, (EncodedText((4, 3), 1),)))
    batch = Packer(Dataset(images, rows), 14, line(2)).collate([[0, 1]])
    assert batch["tokens"].tolist() == [[0, 0, 7, 8, 9, 5, 6, 0, 0, 4, 3, 0, 0, 0]]
    assert batch["segments"].tolist() == [[-1, -1, 1, 1, 1, 2, 2, -2, -2, 4097, 4097, 0, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 1, 2, 3, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, 9, -100, 6, *[-100] * 3, 3, *[-100] * 4]]
    assert batch["image_places"].int().tolist() == [[1, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]]
    assert batch["image_rows"].tolist() == [0, 0]


def test_a_sample_longer_than_a_row_is_refused():
    packer = made_up()
    with pytest.raises(UserError, match=r"found a sample of 2\d tokens, 4 of them of pictures, in rows of 20"):
        PackedBatches(Packer(packer.dataset, 20, line(PICTURE)), 4)


@pytest.mark.parametrize("attention", ["causal", "full", "prefix"])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_packed_sample_has_the_loss_that_it_has_alone(attention, positions):
    preset = PRESETS["prefix"]
    preset = {
        **preset, "fusion": {**preset["fusion"], "attention": attention},
        "text": {**preset["text"], "positions": positions},
    }
    torch.set_num_threads(1)
    model, processor = build(parse(VLMConfig, preset, "prefix"), TEXTS)
    model.double().eval()
    pairs = [
        Pair(0, "", TEXTS[0]), Pair(1, "what color is the circle?", "red"), Pair(1, "how many shapes?", "two"),
        Pair(2, "", "a blue square"), Pair((3, 0), "is it red?", "two"),
    ]
    images = processor.images(pictures(4)).numpy()
    dataset = make_dataset(images, pairs, processor, decoder=True, per_row=2)
    packer = Packer(dataset, 128, places_of(model, images))
    together = losses(model, packer.collate([[2, 0], [3, 1]]))
    alone = torch.cat([losses(model, dataset.collate([number])) for number in (2, 0, 3, 1)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["row", "native"])
def test_a_text_that_marks_its_pictures_is_learned_as_it_is_asked(kind, tmp_path):
    """Chat templates put pictures inside of the text: so do rows of their own, packed ones and the prompt's."""
    model, processor = make_row() if kind == "row" else make_native()
    shown = pictures(3) if kind == "row" else noise((24, 40), (16, 16), (30, 20))
    model.double()
    processor.picture = MARK
    if kind == "row":
        images = processor.images(shown).numpy()
    else:
        images = decode_images(png(shown), 3, processor, tmp_path / "cache", model.config)
    prompts = [(5, MARK, 9), (5, 6, MARK, 8, 7), (5, 4)]
    texts = [EncodedText((*ids, 11, 12), len(ids)) for ids in prompts]
    dataset = Dataset(images, ((0, texts[:1]), ((1, 2), texts[1:2]), (1, texts[2:])), MARK)
    assert dataset.marked
    packer = Packer(dataset, None, places_of(model, images))
    alone = [replace(packer, capacity=int(length)).collate([[row]]) for row, length in enumerate(packer.lengths())]
    for row, seen in ((0, shown[0]), (1, tuple(shown[1:]))):
        asked = ask(model, processor, [seen], [EncodedText(prompts[row], len(prompts[row]))])
        length = asked["tokens"].shape[1]
        for name in ("tokens", "segments", "positions", "image_places"):
            assert torch.equal(alone[row][name][:, :length], asked[name]), name
        assert torch.equal(alone[row]["images"], asked["images"])
        assert alone[row]["labels"][0].tolist() == [-100] * (length - 1) + [11, 12, -100]
    each = torch.cat([losses(model, dict(batch)) for batch in alone])
    together = replace(packer, capacity=128).collate([[0, 1], [2]])
    torch.testing.assert_close(losses(model, together), each, rtol=1e-9, atol=1e-12)
    batches = make_batches(dataset, model, TrainConfig(batch_size=3), 0, 1)
    assert type(batches) is MarkedBatches
    found = losses(model, batches.at(0)).sort().values
    torch.testing.assert_close(found, each.sort().values, rtol=1e-9, atol=1e-12)


def losses(model, batch) -> torch.Tensor:
    """Of each token that is learned, in order."""
    labels = batch.pop("labels")
    logits = model(**batch, select=labels != -100).logits
    return F.cross_entropy(logits, labels[labels != -100], reduction="none")
