"""Masks equal those of COCO's own module to the pixel and to the byte."""

import numpy as np
import pytest

from vlmpipe.data.masks import Polygons, Rle, decompress, fill


def blobs(seed: int, height: int = 23, width: int = 31) -> np.ndarray:
    """Random pixels in clumps, so that runs have all lengths."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((height // 4 + 1, width // 4 + 1)) < rng.uniform(0.1, 0.9)
    return np.kron(coarse, np.ones((4, 4), bool))[:height, :width] ^ (rng.random((height, width)) < 0.05)


def coco():
    from faster_coco_eval.core import mask

    return mask


@pytest.mark.parametrize("seed", range(8))
def test_run_lengths_are_coco_s(seed):
    pixels = blobs(seed)
    ours = Rle.of_pixels(pixels)
    theirs = coco().encode(np.asfortranarray(pixels.astype(np.uint8)))
    counts = theirs["counts"]
    assert ours.counts == (counts if isinstance(counts, bytes) else counts.encode())
    assert (ours.pixels() == pixels).all()
    assert ours.area == int(pixels.sum()) == int(coco().area(theirs))


def test_plain_and_compressed_are_the_same_mask():
    pixels = blobs(9)
    compressed = Rle.of_pixels(pixels)
    assert Rle.of_runs(*pixels.shape, compressed.runs) == compressed
    assert compressed.runs.sum() == pixels.size and (decompress(compressed.counts) == compressed.runs).all()


@pytest.mark.parametrize("pixels", [np.zeros((3, 4), bool), np.ones((3, 4), bool), np.eye(5, dtype=bool)])
def test_empty_full_and_sparse(pixels):
    assert (Rle.of_pixels(pixels).pixels() == pixels).all()


def test_a_run_of_a_large_picture():
    """Runs past 5, 10, 15 and 20 bits, and steps down by as much."""
    runs = np.array([40, 1, 5000, 3, 200_000, 2, 31, 70_000, 3_000_000])
    rle = Rle.of_runs(1, int(runs.sum()), runs)
    assert (decompress(rle.counts) == runs).all()


@pytest.mark.parametrize("seed", range(20))
def test_polygons_fill_as_coco_fills(seed):
    rng = np.random.default_rng(seed)
    height, width = int(rng.integers(5, 60)), int(rng.integers(5, 60))
    points = rng.uniform(-8, 68, (int(rng.integers(3, 12)), 2))
    if seed % 3 == 0:
        points = np.round(points)  # corners on pixel edges
    if seed % 4 == 0:
        points = np.round(points * 2) / 2
    theirs = coco().decode(coco().frPyObjects([points.ravel().tolist()], height, width))[..., 0].astype(bool)
    assert (fill(points, height, width) == theirs).all()


def test_several_outlines_are_one_mask():
    outlines = ((2.0, 2.0, 12.0, 2.0, 12.0, 12.0, 2.0, 12.0), (8.0, 8.0, 18.0, 8.0, 18.0, 18.0, 8.0, 18.0))
    mask = Polygons(20, 20, outlines)
    theirs = coco().merge(coco().frPyObjects([list(o) for o in outlines], 20, 20))
    assert (mask.pixels() == coco().decode(theirs).astype(bool)).all()
    assert mask.area == 10 * 10 * 2 - 4 * 4
    assert (mask.rle().pixels() == mask.pixels()).all()


def test_a_square_covers_its_pixels():
    filled = fill(np.array([[2, 1], [5, 1], [5, 3], [2, 3]]), 6, 8)
    expected = np.zeros((6, 8), bool)
    expected[1:3, 2:5] = True
    assert (filled == expected).all()


@pytest.mark.parametrize(("counts", "said"), [
    (b"0\xff", "characters"), (b"P", "break off"), (b"05", "runs of 5 pixels in all, where 3 x 4 are 12"),
    (b"o" * 20 + b"0", "60 bits"),
])
def test_damaged_counts_are_refused(counts, said):
    with pytest.raises(ValueError, match=said):
        Rle(3, 4, counts).pixels()


def test_negative_runs_are_refused():
    with pytest.raises(ValueError, match="a run of -1 pixels"):
        Rle.of_runs(3, 4, [5, -1, 8])
