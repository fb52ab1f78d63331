"""Overlaps against known values, matching against all permutations, the loss by hand and over processes."""

import itertools

import pytest
import torch

from tests.train.objectives.pointing import as_processes, gradients, make, make_batch
from vlmpipe.errors import UserError
from vlmpipe.train.objectives import OBJECTIVES, boxes
from vlmpipe.train.objectives.boxes import NONE, Boxes, corners, match, overlap


@pytest.fixture(autouse=True)
def seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


# The examples are worked out from the definition in arXiv 1902.09630, algorithm 1.
@pytest.mark.parametrize(
    ("one", "other", "iou", "giou"),
    [
        ((0, 0, 1, 1), (0, 0, 1, 1), 1, 1),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7, 1 / 7 - 2 / 9),
        ((0, 0, 4, 4), (1, 1, 3, 3), 1 / 4, 1 / 4),  # one inside the other: nothing is empty
        ((0, 0, 1, 1), (1, 0, 2, 1), 0, 0),  # side by side
        ((0, 0, 1, 1), (2, 0, 3, 1), 0, -1 / 3),
        ((0, 0, 1, 1), (9, 9, 10, 10), 0, -98 / 100),
        ((0, 0, 2, 1), (0, 0, 1, 2), 1 / 3, 1 / 3 - 1 / 4),
        ((1, 1, 1, 1), (0, 0, 2, 2), 0, 0),  # a box without area
    ],
)
def test_overlaps_have_their_known_values(one, other, iou, giou):
    found = overlap(torch.tensor(one, dtype=torch.float32), torch.tensor(other, dtype=torch.float32))
    torch.testing.assert_close(torch.stack(found), torch.tensor([giou, iou], dtype=torch.float32))
    swapped = overlap(torch.tensor(other, dtype=torch.float32), torch.tensor(one, dtype=torch.float32))
    torch.testing.assert_close(found, swapped)


def test_overlap_of_no_area_at_all_is_finite_and_so_is_its_gradient():
    point = torch.tensor([0.5, 0.5, 0.5, 0.5], requires_grad=True)
    giou, iou = overlap(point, torch.tensor([0.5, 0.5, 0.5, 0.5]))
    (giou + iou).backward()
    assert torch.isfinite(giou) and torch.isfinite(point.grad).all()


def test_corners():
    assert corners(torch.tensor([0.5, 0.25, 0.5, 0.25])).tolist() == [0.25, 0.125, 0.75, 0.375]


def test_matching_is_the_cheapest_of_all():
    costs = torch.randn(3, 5, 4)
    labels = torch.tensor([[0, 0, 1, NONE], [0, NONE, NONE, NONE], [NONE] * 4])
    picture, patch, box = match(costs, labels)
    for number, real in enumerate((3, 1, 0)):
        mine = picture == number
        assert sorted(box[mine].tolist()) == list(range(real))
        best = min(
            sum(costs[number, chosen, place].item() for place, chosen in enumerate(order))
            for order in itertools.permutations(range(5), real)
        )
        assert costs[number, patch[mine], box[mine]].sum().item() == pytest.approx(best, abs=1e-5)


def test_more_boxes_than_patches_and_costs_that_are_no_numbers():
    picture, patch, _ = match(torch.rand(1, 2, 3), torch.zeros(1, 3, dtype=torch.int64))
    assert len(picture) == 2 and sorted(patch.tolist()) == [0, 1]
    assert len(match(torch.full((1, 2, 1), torch.nan), torch.zeros(1, 1, dtype=torch.int64))[0]) == 1


def test_focal_loss_by_hand():
    objective = Boxes(alpha=0.3, gamma=2.0)
    logits, p = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([0.5, 0.880797, 0.268941])
    torch.testing.assert_close(
        objective.focal(logits, torch.ones(3)), -0.3 * (1 - p) ** 2 * p.log(), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        objective.focal(logits, torch.zeros(3)), -0.7 * p**2 * (1 - p).log(), rtol=1e-5, atol=1e-6
    )


class Fixed(torch.nn.Module):
    """A model that says what it is told to."""

    def __init__(self, boxes, classes):
        super().__init__()
        self.boxes, self.classes = boxes, classes

    def forward(self, **inputs):
        return self


def whole_batch(processor):
    """One phrase for the first picture and three for the second; two boxes and one, and what fills up."""
    true = torch.tensor([[[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.3, 0.4]], [[0.5, 0.5, 0.5, 0.5], [9.0, 9.0, 9.0, 9.0]]])
    return {**make_batch(processor), "boxes": true, "box_labels": torch.tensor([[0, 0], [2, NONE]])}


def test_loss_by_hand():
    true = torch.tensor([[[0.5, 0.5, 0.2, 0.2]], [[9.0, 9.0, 9.0, 9.0]]])
    found = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]], [[0.5, 0.5, 0.2, 0.2]] * 2])
    classes = torch.zeros(2, 2, 1)
    batch = {"boxes": true + 0.0, "box_labels": torch.tensor([[0], [NONE]])}
    objective, half = Boxes(places=2.0), torch.tensor(2.0).log()
    loss, metrics = objective(Fixed(found, classes), batch)
    classed = (0.3 + 3 * 0.7) * 0.25 * half / 2  # one hit and three patches with nothing, over two pictures
    torch.testing.assert_close(loss, classed)
    assert metrics["iou"] == pytest.approx(1, abs=1e-5) and metrics["place_loss"] == 0
    batch["boxes"][0, 0, 0] = 0.6  # a tenth to the right: half of the width
    loss, metrics = objective(Fixed(found, classes), batch)
    torch.testing.assert_close(loss, classed + 2.0 * 0.1 / 2 + (1 - 1 / 3) / 2)
    assert metrics["iou"] == pytest.approx(1 / 3, abs=1e-5)


def test_what_fills_up_changes_nothing():
    model, processor = make(mask=None)
    batch = whole_batch(processor)
    more = {name: batch[name].clone() for name in ("boxes", "box_labels")}
    more["boxes"][1, 1] = torch.tensor([0.1, 0.1, 0.1, 0.1])
    assert torch.equal(Boxes()(model, batch)[0], Boxes()(model, {**batch, **more})[0])


def test_no_boxes_at_all():
    model, processor = make(mask=None)
    batch = whole_batch(processor)
    batch["box_labels"][:] = NONE
    loss, metrics = Boxes()(model, batch)
    loss.backward()
    assert loss > 0 and metrics["iou"] == 0 and metrics["place_loss"] == 0
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())


def test_a_label_without_a_query_is_refused():
    model, processor = make(mask=None)
    batch = whole_batch(processor)
    batch["box_labels"][0, 0] = 1
    with pytest.raises(UserError, match="found 1 for a picture with 1 queries"):
        Boxes()(model, batch)


def test_it_learns_where_two_things_are():
    model, processor = make(mask=None)
    batch = make_batch(processor, rows=(0, 1, 2), first=(0,), images=1)
    batch |= {
        "boxes": torch.tensor([[[0.3, 0.3, 0.2, 0.2], [0.6, 0.6, 0.3, 0.4]]]), "box_labels": torch.tensor([[0, 1]])
    }
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    for _ in range(60):
        optimizer.zero_grad()
        loss, metrics = OBJECTIVES["boxes"]()(model, batch)
        loss.backward()
        optimizer.step()
    assert metrics["iou"] > 0.8
    scores = model(**{k: batch[k] for k in ("images", "image_rows", "tokens", "segments", "positions")}).classes[0]
    best = scores.sigmoid().max(dim=0).values
    assert best[:2].min() > 1.5 * best[2]  # the third query names nothing


def test_the_mean_over_processes_is_the_loss_of_the_whole_batch(monkeypatch):
    model, processor = make(mask=None)
    whole = whole_batch(processor)
    loss, metrics = Boxes()(model, whole)
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    text, image, zero = ("tokens", "segments", "positions"), ("images", "boxes", "box_labels"), torch.tensor([0])
    parts = [
        {**{k: whole[k][:1] for k in (*text, *image)}, "image_rows": zero},
        {**{k: whole[k][1:] for k in (*text, *image)}, "image_rows": zero},
    ]
    found = as_processes(Boxes(), boxes, model, parts, monkeypatch)
    for name, value in {"loss": loss.detach(), **metrics}.items():
        torch.testing.assert_close(found[name], value, msg=name)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7, msg=name)
