"""Pictures as codes and back."""

import numpy as np
import pytest
import torch

from vlmpipe.config import parse
from vlmpipe.errors import UserError
from vlmpipe.models.codes import ImageCodes, ImageCodesConfig, k_means, nearest

CONFIG = ImageCodesConfig(size=6, image_size=8, patch_size=4, patches=100)


def tiles(count: int, colours: int, seed: int = 0) -> torch.Tensor:
    """Pictures of four flat patches, of so many colours."""
    generator = torch.Generator().manual_seed(seed)
    palette = torch.randint(0, 256, (colours, 3), generator=generator, dtype=torch.uint8)
    chosen = torch.randint(0, colours, (count, 2, 2), generator=generator)
    return palette[chosen].permute(0, 3, 1, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)


def test_pictures_of_few_patches_come_back_as_they_were():
    images = tiles(30, colours=5)
    codes = ImageCodes(CONFIG)
    codes.fit(images)
    found = codes.encode(images)
    assert found.shape == (30, 4) and len(found.unique()) == 5 and found.max() < 6
    assert torch.equal(codes.decode(found), images)


def test_patches_are_counted_row_by_row_from_the_top_left():
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    image[:, :, :4, 4:] = 255
    codes = ImageCodes(CONFIG)
    codes.fit(image)
    dark, light = codes.encode(image)[0].unique(return_counts=True)[0].tolist()
    assert codes.encode(image)[0].tolist() == [dark, light, dark, dark]
    assert codes.patches(image)[0, 1].float().mean() == 255


def test_the_same_pictures_and_seed_give_the_same_book_from_memory_or_disk():
    images = torch.randint(0, 256, (40, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    books = []
    for given, seed in ((images, 0), (images.numpy(), 0), (images, 1)):
        codes = ImageCodes(CONFIG)
        codes.fit(given, seed)
        books.append(codes.codebook)
    assert torch.equal(books[0], books[1]) and not torch.equal(books[0], books[2])


def test_k_means_is_a_fixed_point_that_finds_the_groups():
    generator = torch.Generator().manual_seed(0)
    points = torch.cat([torch.randn(60, 5, generator=generator) * 0.1 + centre for centre in (-3, 0, 4)])
    weights = torch.ones(len(points))
    centres = k_means(points, weights, 3, 8, torch.Generator().manual_seed(1))
    owner, distance = nearest(points, centres)
    for index, centre in enumerate(centres):  # each centre is the mean of its own
        torch.testing.assert_close(centre, points[owner == index].mean(0))
    assert sorted(owner.bincount().tolist()) == [60, 60, 60]
    assert torch.equal(distance, nearest(points, centres, part=7)[1])


def test_counted_points_are_that_many_points():
    generator = torch.Generator().manual_seed(0)
    points, counts = torch.randn(20, 3, generator=generator), torch.randint(1, 5, (20,), generator=generator)
    centres = k_means(points, counts.float(), 4, 20, torch.Generator().manual_seed(1))
    owner = nearest(points, centres)[0]
    for index, centre in enumerate(centres):
        own = points[owner == index].repeat_interleave(counts[owner == index], 0)
        torch.testing.assert_close(centre, own.mean(0))


def test_what_was_read_before_each_code_begins_with_the_start():
    codes = ImageCodes(CONFIG)
    assert codes.opening(torch.tensor([[3, 1, 2, 5]])).tolist() == [[6, 3, 1, 2]]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), r"expected torch.uint8 \[3, 8, 8\]"),
        (torch.zeros(1, 3, 8, 8), "found pictures torch.float32"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "found an empty codebook"),
    ],
)
def test_pictures_that_can_not_be_coded_are_refused(images, message):
    with pytest.raises(UserError, match=message):
        ImageCodes(CONFIG).encode(images)


@pytest.mark.parametrize("change", [{"size": 1}, {"patch_size": 7}, {"patches": 5}])
def test_configs_that_make_no_sense_are_refused(change):
    with pytest.raises(UserError):
        parse(ImageCodesConfig, change, "codes")


def test_photographs_lose_less_with_more_codes():
    grid = np.indices((3, 8, 8)).sum(0)
    smooth = np.stack([(np.sin(grid / 5 + phase) * 120 + 128) for phase in np.linspace(0, 6, 60)])
    images = torch.from_numpy(smooth).to(torch.uint8).reshape(60, 3, 8, 8)
    losses = []
    for size in (2, 8, 32):
        codes = ImageCodes(ImageCodesConfig(size=size, image_size=8, patch_size=4, patches=300))
        codes.fit(images)
        losses.append((codes.decode(codes.encode(images)).float() - images.float()).square().mean().item())
    assert losses[0] > 2 * losses[1] > 4 * losses[2]
