"""Phrases with masks and boxes as the objectives take them, from records and from the embedded world's files."""

import pytest
import torch

from tests.models.heads.test_pointing import make
from tests.models.tiny import pictures
from vlmpipe.data.masks import Polygons
from vlmpipe.data.pictures import pictures as files
from vlmpipe.data.queries import Query, queries_of_detections, queries_of_regions
from vlmpipe.data.readers.coco import read_coco_instances
from vlmpipe.data.readers.refcoco import read_refcoco
from vlmpipe.data.task_world import write_tasks
from vlmpipe.errors import UserError
from vlmpipe.train.batches import Batches
from vlmpipe.train.objectives import OBJECTIVES
from vlmpipe.train.objectives.boxes import NONE
from vlmpipe.train.pictures import decode_images
from vlmpipe.train.regions import RegionDataset

SIZE = (64, 32)  # of the pictures; the model sees 32 x 32
LEFT = Polygons(32, 64, ((0, 0, 32, 0, 32, 32, 0, 32),))


@pytest.fixture(scope="module")
def small():
    torch.set_num_threads(1)
    return make()


def dataset(processor, queries, targets, names=("a", "b"), per_row=8):
    return RegionDataset(processor.images(pictures(len(names))).numpy(), names, queries, processor, targets, per_row)


def test_masks_of_the_model_s_size(small):
    queries = [Query("b", SIZE, "the left half", (), (LEFT,)), Query("b", SIZE, "nothing"), Query("a", SIZE, "nothing")]
    batch = dataset(small[1], queries, "masks").collate([0, 1])
    assert batch["masks"].shape == (3, 32, 32) and batch["masks"].dtype == torch.uint8
    assert batch["masks"][0, :, :15].all() and not batch["masks"][0, :, 17:].any() and not batch["masks"][1:].any()
    assert batch["image_rows"].tolist() == [0, 2] and len(batch["tokens"]) == 3
    assert batch["images"].shape == (2, 3, 32, 32)


def test_boxes_in_shares_and_queries_by_number(small):
    queries = [
        Query("a", SIZE, "one", ((0, 0, 32, 32),)), Query("a", SIZE, "none"),
        Query("a", SIZE, "two", ((16, 8, 48, 24), (60, 30, 64, 32))), Query("b", SIZE, "none"),
    ]
    batch = dataset(small[1], queries, "boxes").collate([0, 1])
    assert batch["box_labels"].tolist() == [[0, 2, 2], [NONE] * 3]
    torch.testing.assert_close(
        batch["boxes"][0], torch.tensor([[0.25, 0.5, 0.5, 1], [0.5, 0.5, 0.5, 0.5], [62 / 64, 31 / 32, 4 / 64, 2 / 32]])
    )


def test_what_a_crop_cuts_off_is_cut_off(small):
    _, processor = make()
    processor.config = type(processor.config)(resize="crop")
    queries = [Query("a", SIZE, "left", ((0, 0, 32, 32), (0, 0, 8, 8)), (LEFT, LEFT))]
    boxes = dataset(processor, queries, "boxes").boxes(queries[0])
    assert boxes == [(0.25, 0.5, 0.5, 1.0)]  # of the middle square, 16 to 48; the second lies left of it
    mask = dataset(processor, queries, "masks").mask(queries[0])
    assert mask[:, :16].all() and not mask[:, 16:].any()


def test_rows_hold_at_most_so_many_phrases(small):
    queries = [Query(image, SIZE, f"phrase {number}") for number in range(5) for image in "ab"]
    rows = dataset(small[1], queries, "boxes", per_row=2).rows
    assert [(number, len(asked)) for number, asked in rows] == [(0, 2), (0, 2), (0, 1), (1, 2), (1, 2), (1, 1)]


def test_what_cannot_be_learned_from_is_refused(small):
    _, processor = small
    with pytest.raises(UserError, match="found no phrase"):
        dataset(processor, [], "masks")
    with pytest.raises(UserError, match="about the picture 'c'"):
        dataset(processor, [Query("c", SIZE, "x")], "boxes")
    with pytest.raises(UserError, match="found no mask of 'x'"):
        dataset(processor, [Query("a", SIZE, "x", ((0, 0, 1, 1),))], "masks")


@pytest.mark.parametrize("targets", ["masks", "boxes"])
def test_the_embedded_world_s_files_feed_the_objectives(small, targets, tmp_path):
    model, processor = small
    task = {"masks": "regions", "boxes": "detection"}[targets]
    write_tasks(tmp_path, 8, 0, tasks=[task])
    folder = tmp_path / task / "train"
    if task == "regions":
        queries = queries_of_regions(read_refcoco(folder))
    else:
        queries = queries_of_detections(read_coco_instances(folder), absent=2)
    found = files(folder / "images")
    names = sorted({query.image for query in queries})
    images = decode_images((found[name] for name in names), len(names), processor, tmp_path / "cache")
    rows = RegionDataset(images, names, queries, processor, targets)
    batches = Batches(rows, 4)
    loss, metrics = OBJECTIVES[targets]()(model, batches.at(0))
    assert torch.isfinite(loss) and loss > 0 and "iou" in metrics
    assert torch.equal(batches.at(1)["tokens"], Batches(rows, 4).at(1)["tokens"])
