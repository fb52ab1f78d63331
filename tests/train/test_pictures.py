"""Pictures decoded once: the same in memory and on disk, in one size or in many, alone or among others."""

import dataclasses
import io
import json

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
import transformers

from tests.models.test_native import SMALL, noise
from tests.models.test_native import make as make_native
from tests.models.tiny import make, pictures
from vlmpipe.config import parse
from vlmpipe.dispatch import Cluster
from vlmpipe.errors import UserError
from vlmpipe.models import VLMConfig, load
from vlmpipe.models.generate import caption, picture_inputs
from vlmpipe.models.parity import random_module
from vlmpipe.models.pretrained import HuggingFaceProcessor, convert
from vlmpipe.models.pretrained.processor import own_tokenizer
from vlmpipe.shards import write_manifest, write_table
from vlmpipe.train import pictures as module
from vlmpipe.train.batches import Batches, Dataset, Pair, make_dataset
from vlmpipe.train.loop import TrainConfig
from vlmpipe.train.objectives import Answers, LanguageModeling, make_objective
from vlmpipe.train.optim import OptimizerConfig, ScheduleConfig
from vlmpipe.train.packing import PackedBatches, Packer, places_of
from vlmpipe.train.pictures import OwnSizes, decode_images, inputs_of
from vlmpipe.train.stages import check_sizes, make_batches, pretrain
from vlmpipe.train.tasks import Labelled

SIZES = ((24, 40), (16, 16), (30, 20), (9, 31))


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def png(images):
    encoded = []
    for picture in images:
        picture.save(buffer := io.BytesIO(), "PNG")
        encoded.append(buffer.getvalue())
    return encoded


SQUARE = {"size": {"height": 20, "width": 20}}


@pytest.mark.parametrize(("made", "side", "found"), [
    (lambda: transformers.ViTImageProcessorPil(**SQUARE, rescale_factor=1 / 127.5), 20, r"float32 \[3, 20, 20\]"),
    (lambda: transformers.ViTImageProcessorPil(**SQUARE, do_rescale=False), 20, r"float32 \[3, 20, 20\]"),
    (lambda: transformers.ViTImageProcessorPil(**SQUARE), 30, r"uint8 \[3, 20, 20\].*of 30 x 30"),
    (lambda: transformers.ViltImageProcessorPil(size={"shortest_edge": 20}, size_divisor=4), 20, r"uint8 \[3, 20, 28"),
    (lambda: transformers.Qwen2VLImageProcessorPil(patch_size=4), 0, r"uint8 \[96\].*of one size"),
])
def test_pictures_that_training_cannot_keep_are_refused(made, side, found, tmp_path):
    with pytest.raises(UserError, match=f"that makes {found}.*; start from") as caught:
        decode_images(png(pictures(1)), 1, HuggingFaceProcessor(made(), None, side, 0), tmp_path / "cache")
    assert "expected uint8 squares" in str(caught.value) and "\n" not in str(caught.value)


def test_decoding_in_memory_and_on_disk_is_the_same(tmp_path, monkeypatch):
    _, processor = make("prefix")
    encoded = png(pictures(4))
    in_memory = decode_images(encoded, 4, processor, tmp_path / "cache.npy")
    assert not (tmp_path / "cache.npy").exists()
    monkeypatch.setattr(module, "MEMORY_LIMIT", 100)
    on_disk = decode_images(encoded, 4, processor, tmp_path / "cache.npy")
    assert isinstance(on_disk, np.memmap)
    assert np.array_equal(in_memory, on_disk)
    assert np.array_equal(in_memory, processor.images(pictures(4)).numpy())
    dataset = Dataset(on_disk, ((3, (processor.encode("red"),)),))
    assert torch.equal(dataset.collate([0])["images"], processor.images(pictures(4))[3:])


# --- of several sizes --------------------------------------------------------------------------------------

def decoded(model, processor, cache, sizes=SIZES):
    encoded = png(noise(*sizes))
    return decode_images(encoded, len(encoded), processor, cache, model.config)


def learned(changes=()):
    """(model in double precision, mixed pictures' dataset): rows of one, two and three texts, one with two pictures."""
    model, processor = make_native(changes)
    pairs = [
        Pair(0, "", "a red circle"), Pair(1, "what color is it?", "red"), Pair(1, "how many?", "two"),
        Pair((3, 0), "is it red?", "two"), Pair(2, "", "a blue square above a red circle"),
    ]
    return model.double(), lambda cache: make_dataset(decoded(model, processor, cache), pairs, processor, True, 2)


@pytest.mark.parametrize("limit", [module.MEMORY_LIMIT, 100])
def test_each_keeps_its_size_as_in_answers(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MEMORY_LIMIT", limit)
    model, processor = make_native()
    kept = decoded(model, processor, tmp_path / "cache")
    assert isinstance(kept, OwnSizes) and len(kept) == 4 and isinstance(kept.values, np.memmap) == (limit == 100)
    for numbers in ([0, 1, 2, 3], [2, 0], [3], [1, 1]):
        found = inputs_of(kept, numbers)
        expected = picture_inputs(model, processor, [noise(*SIZES)[number] for number in numbers])
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        assert [kept.grid(number) for number in numbers] == [tuple(grid) for grid in found["grids"].tolist()]


@pytest.mark.parametrize("changes", [
    {},
    {"fusion": {**SMALL["fusion"], "attention": "full"}},
    {"text": {**SMALL["text"], "rotary_sections": []}},
    {"text": {**SMALL["text"], "positions": "learned", "rotary_sections": []}},
], ids=["places", "full", "rotary", "learned"])
def test_among_other_sizes_a_sample_has_the_loss_that_it_has_alone(changes, tmp_path):
    """In rows of their own and in packed ones."""
    model, make_rows = learned(changes.items())
    dataset = make_rows(tmp_path / "cache")
    order = [1, 3, 0, 2]
    alone = [losses(model, dataset.collate([number])) for number in order]
    mixed = losses(model, dataset.collate(order))
    torch.testing.assert_close(mixed, torch.cat(alone), rtol=1e-9, atol=1e-12)
    packer = Packer(dataset, 128, places_of(model, dataset.images))
    batch = packer.collate([order[:1], order[1:]])
    assert len(batch["grids"]) == 5 and batch["image_rows"].tolist() == [0, 1, 1, 1, 1]
    torch.testing.assert_close(losses(model, batch), torch.cat(alone), rtol=1e-9, atol=1e-12)


def losses(model, batch) -> torch.Tensor:
    """Of each token that is learned, in order."""
    batch = {name: value for name, value in batch.items() if name != "prefix"}
    labels = batch.pop("labels")
    logits = model(**batch, select=labels != -100).logits
    return F.cross_entropy(logits, labels[labels != -100], reduction="none")


def test_a_mixed_batch_has_the_gradient_of_its_samples(tmp_path):
    """Each weighed by the tokens that it learns."""
    model, make_rows = learned()
    dataset = make_rows(tmp_path / "cache")
    order, parameters = [2, 0, 1, 3], list(model.parameters())
    batches = [dataset.collate([number]) for number in order]
    counts = [int((batch["labels"] != -100).sum()) for batch in batches]
    total = sum(LanguageModeling()(model, batch)[0] * count for batch, count in zip(batches, counts, strict=True))
    expected = torch.autograd.grad(total / sum(counts), parameters)
    found = torch.autograd.grad(LanguageModeling()(model, dataset.collate(order))[0], parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_squares_of_a_native_tower_are_packed_too():
    """With `resize: squash` all pictures have one size, and positions say where in it their tokens stand."""
    model, processor = make_native({"processor": {"resize": "squash"}}.items())
    images = processor.images(noise((24, 40), (16, 16))).numpy()
    pairs = [Pair(0, "", "a red circle"), Pair(1, "", "two")]
    dataset = make_dataset(images, pairs, processor, decoder=True)
    packed = Packer(dataset, 64, places_of(model.double(), images)).collate([[0, 1]])
    assert packed["positions"].shape == (1, 64, 3)
    alone = torch.cat([losses(model, dataset.collate([number])) for number in (0, 1)])
    torch.testing.assert_close(losses(model, packed), alone, rtol=1e-9, atol=1e-12)


def test_mixed_sizes_in_the_training_loop_s_batches(tmp_path):
    """`pack` chooses between rows of their own and packed ones."""
    model, make_rows = learned()
    dataset = make_rows(tmp_path / "cache")
    config = TrainConfig(batch_size=2)
    plain = make_batches(dataset, model, config, 0, 1)
    packed = make_batches(dataset, model, dataclasses.replace(config, pack=96), 0, 1)
    assert type(plain) is Batches and type(packed) is PackedBatches
    for batches in (plain, packed):
        batch = batches.at(3)
        assert torch.equal(batch["images"], batches.at(3)["images"])
        assert len(batch["images"]) == batch["grids"].prod(dim=1).sum()
        assert torch.isfinite(LanguageModeling()(model, batch)[0])
    with pytest.raises(UserError, match=r"found a sample of \d+ tokens, 1[0-9] of them of pictures, in rows of 12"):
        make_batches(dataset, model, dataclasses.replace(config, pack=12), 0, 1)


def vilt():
    """(a model that answers by classes, what fills its pictures up)."""
    own = make("prefix")[1]
    config, theirs = random_module("vilt.answers", vocab_size=own.vocab_size, max_position_embeddings=40)
    prepare = transformers.ViltImageProcessorPil(size={"shortest_edge": 20}, size_divisor=5)
    return convert(config.to_dict(), theirs.state_dict()), HuggingFaceProcessor(prepare, own_tokenizer(own), 20, 40)


def test_filled_up_among_larger_ones_a_sample_has_the_loss_that_it_has_alone(tmp_path):
    model, processor = vilt()
    kept = decoded(model, processor, tmp_path / "cache", ((61, 40), (40, 64), (50, 50)))
    assert kept.several and len(inputs_of(kept, [1, 1])) == 1
    texts = ("a red circle", "how many shapes", "two")
    rows = Dataset(kept, tuple((number, (processor.encode(text),)) for number, text in enumerate(texts)))
    labelled = Labelled(rows, {"answers": torch.rand(3, model.config.heads.answers.classes)})
    alone = [Answers()(model, labelled.collate([number]))[0] for number in range(3)]
    batch = labelled.collate([0, 1, 2])
    assert len(batch["grids"].unique(dim=0)) == 3
    torch.testing.assert_close(Answers()(model, batch)[0], torch.stack(alone).mean(), rtol=1e-5, atol=1e-6)


def test_objectives_that_exchange_hide_or_compare_pictures_want_one_size(tmp_path):
    model, processor = vilt()
    mixed = decoded(model, processor, tmp_path / "cache", ((61, 40), (40, 64)))
    for name in ("matching", "contrastive", "masked_image", {"masked_text": 1.0, "matching": 1.0}):
        with pytest.raises(UserError, match="objective: found pictures that keep their own sizes"):
            check_sizes(mixed, make_objective(name, model))
    check_sizes(mixed, make_objective({"masked_text": 1.0, "answers": 1.0}, model))
    same = decoded(model, processor, tmp_path / "same", ((61, 40), (61, 40)))
    check_sizes(same, make_objective("matching", model))
    processor.pictures.size_divisor = 3
    with pytest.raises(UserError, match="expected uint8 in whole patches of 5 x 5 pixels"):
        decoded(model, processor, tmp_path / "odd")


@pytest.mark.parametrize("pack", [None, 96])
def test_a_run_on_pictures_of_several_sizes(pack, tmp_path):
    table = pa.table({
        "image": [{"bytes": data, "path": None} for data in png(noise(*SIZES))],
        "caption": ["a red circle", "two shapes", "a blue square", "red"],
    })
    write_table(tmp_path / "packed" / "train" / "part-00000.parquet", table)
    write_manifest(tmp_path / "packed", "packed", [])
    optimizer = OptimizerConfig(lr=1e-2, schedule=ScheduleConfig(warmup=2))
    config = TrainConfig(steps=25, batch_size=2, pack=pack, optimizer=optimizer)
    architecture, inline = parse(VLMConfig, SMALL, "native"), Cluster(backend="inline", threads=1)
    pretrain(tmp_path / "packed", tmp_path, tmp_path / "out", tmp_path / "state", architecture, config, inline)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "curves.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 * losses[0]
    assert len(caption(*load(tmp_path / "out"), noise(*SIZES))) == 4
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["live", "timing.json", "timing.jsonl"]
