"""The order of training: a pure function of the step, every row once an epoch, the same over any number of workers."""

from collections import Counter

import numpy as np
import pytest
import torch

from tests.models.tiny import make, pictures
from vlmpipe.errors import UserError
from vlmpipe.train.batches import Batches, Pair, group, make_dataset
from vlmpipe.train.sources import Source

ROWS, BATCH = 23, 4


@pytest.fixture
def dataset():
    """Row i is picture i, all pixels i."""
    _, processor = make("prefix")
    images = np.broadcast_to(np.arange(ROWS, dtype=np.uint8)[:, None, None, None], (ROWS, 3, 2, 2))
    return make_dataset(images, [Pair(i, "", "red") for i in range(ROWS)], processor, decoder=True)


def seen(batch):
    return batch["images"][:, 0, 0, 0].tolist()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_row_once_an_epoch_over_all_workers(dataset, world):
    workers = [Batches(dataset, BATCH, seed=5, rank=rank, world=world) for rank in range(world)]
    stream = [row for step in range(ROWS) for worker in workers for row in seen(worker.at(step))]
    epochs = [stream[at : at + ROWS] for at in range(0, len(stream), ROWS)]
    assert len(epochs) == BATCH
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_workers_together_see_what_one_sees(dataset):
    alone = Batches(dataset, BATCH, seed=1)
    pair = [Batches(dataset, BATCH, seed=1, rank=rank, world=2) for rank in range(2)]
    for step in (0, 5, 17):
        assert seen(alone.at(step)) == [row for worker in pair for row in seen(worker.at(step))]


def test_a_batch_depends_on_its_number_alone(dataset):
    def stream(steps, seed=2):
        batches = Batches(dataset, BATCH, seed=seed)
        return [seen(batches.at(step)) for step in steps]

    straight = stream(range(20))
    assert stream(range(11, 20)) == straight[11:]
    assert stream(reversed(range(20))) == straight[::-1]
    assert stream(range(20), seed=3) != straight


def test_a_batch_larger_than_the_data_repeats_it_evenly(dataset):
    counts = Counter(seen(Batches(dataset, ROWS * 3).at(0)))
    assert set(counts.values()) == {3}


def test_a_batch_that_workers_cannot_share_is_refused(dataset):
    with pytest.raises(UserError, match="batch_size: found 4 for 3 workers"):
        Batches(dataset, BATCH, world=3)


def test_group_keeps_every_pair_and_one_picture_a_row():
    pairs = [Pair(i % 3, f"q{i}", "a") for i in range(10)]
    found = group(pairs, 3)
    assert sorted(pair.question for row in found for pair in row) == sorted(pair.question for pair in pairs)
    assert all(len({pair.image for pair in row}) == 1 and len(row) <= 3 for row in found)
    assert [len(row) for row in found] == [3, 1, 3, 3]


def test_decoder_learns_answers_together_and_dual_encoder_one_joined_text():
    _, processor = make("prefix")
    images = processor.images(pictures(1)).numpy()
    pairs = [Pair(0, "what color?", "red"), Pair(0, "", "a red circle")]
    together = make_dataset(images, pairs, processor, decoder=True, per_row=2)
    assert len(together) == 1 and together.collate([0])["segments"].max() == 2
    apart = make_dataset(images, pairs, processor, decoder=False, per_row=2)
    assert [texts for _, texts in apart.rows] == [
        (processor.encode("what color? red"),),
        (processor.encode("a red circle"),),
    ]


def test_nothing_to_learn_is_an_error():
    _, processor = make("prefix")
    with pytest.raises(UserError, match="found no text"):
        make_dataset(np.zeros((1, 3, 2, 2), np.uint8), [], processor, decoder=True)


def test_several_pictures_in_a_row():
    _, processor = make("prefix")
    images = processor.images(pictures(3)).numpy()
    dataset = make_dataset(images, [Pair((2, 0), "", "red"), Pair(1, "", "blue")], processor, decoder=True)
    batch = dataset.collate([1, 0])
    assert batch["image_rows"].tolist() == [0, 1, 1]
    assert torch.equal(batch["images"], torch.from_numpy(images[[1, 2, 0]]))
    assert "image_rows" not in dataset.collate([1])
    other = Source([b"x"] * 4, (Pair((0, 1), "", "a"), Pair(2, "", "b")))
    assert [pair.image for pair in other.concat(other).pairs] == [(0, 1), 2, (4, 5), 6]
