"""Perceptual hashes and near-duplicate search against brute force and known answers."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from vlmpipe.curate import duplicates, hamming
from vlmpipe.curate.duplicates import Looks, Near, clusters, colour_match, greedy_twins, look, near_pairs, nearest
from vlmpipe.errors import UserError

TEXTBOOKS = Path(__file__).parents[3] / "shared" / "data" / "textbooks"
BITS_ONLY = Near(radius=6, match=-1)


def disc(colour, box=(20, 20, 44, 44), size=64, background="white") -> Image.Image:
    image = Image.new("RGB", (size, size), background)
    ImageDraw.Draw(image).ellipse(box, fill=colour)
    return image


def reencoded(image: Image.Image, quality: int = 60) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def bits(looks: Looks) -> np.ndarray:
    return np.bitwise_count(looks.hashes[:, None] ^ looks.hashes[None, :])


def clustered_looks(rng: np.random.Generator, rows: int) -> Looks:
    """Hashes that crowd around a few centres at 0 to 12 bits, with two colours of thumbnail."""
    centres = rng.integers(0, 2**63, max(rows // 8, 1), dtype=np.uint64)
    hashes = rng.choice(centres, rows)
    for row in range(rows):
        for bit in rng.choice(64, rng.integers(0, 13), replace=False):
            hashes[row] ^= np.uint64(1) << np.uint64(bit)
    palette = rng.integers(0, 256, (2, duplicates.THUMBNAIL)).astype(np.uint8)
    return Looks(hashes, palette[rng.integers(0, 2, rows)])


def brute_near(looks: Looks, near: Near) -> np.ndarray:
    """The definition: bool [N, N]."""
    thumbnails = looks.thumbnails
    match = np.stack([colour_match(thumbnails, np.broadcast_to(one, thumbnails.shape)) for one in thumbnails])
    return (bits(looks) <= near.radius) & (match >= near.match)


# --- a picture ---------------------------------------------------------------------------------------------

def test_hash_agrees_with_a_plain_dct():
    """Every bit against the double-loop definition of the transform, on noise."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    grey = np.asarray(image, np.float64) @ [0.299, 0.587, 0.114]
    wave = [[np.cos(np.pi * k * (2 * x + 1) / 64) for x in range(32)] for k in range(1, 9)]
    square = [(y, x) for y in range(32) for x in range(32)]
    coefficients = [
        sum(grey[y, x] * wave[u][y] * wave[v][x] for y, x in square) for u in range(8) for v in range(8)
    ]
    expected = "".join("1" if c > np.median(coefficients) else "0" for c in coefficients)
    assert f"{int(look([image]).hashes[0]):064b}" == expected


def test_batches_do_not_change_the_look():
    images = [disc("red"), disc("navy", (4, 10, 30, 50)), Image.new("L", (100, 30), 90)]
    together, alone = look(images), [look([image]) for image in images]
    assert together.hashes.tolist() == [int(one.hashes[0]) for one in alone]
    assert np.array_equal(together.thumbnails, np.concatenate([one.thumbnails for one in alone]))
    assert look([]).hashes.shape == (0,) and look([]).thumbnails.shape == (0, 192)


def test_brightness_and_contrast_leave_the_hash_alone():
    image = Image.fromarray(np.random.default_rng(1).integers(60, 160, (40, 40, 3), dtype=np.uint8)).resize((200, 200))
    changed = image.point(lambda v: v + 40), image.point(lambda v: round(v * 1.3))
    assert bits(look([image, *changed]))[0].max() <= 2


def test_blank_pictures_share_one_hash_and_match_each_other_only():
    greys = [Image.new("RGB", (50, 50), (c, c, c)) for c in (0, 128, 255)]
    blank = look([*greys, reencoded(Image.new("L", (9, 9), 77))])
    assert blank.hashes.tolist() == [0, 0, 0, 0]
    assert colour_match(blank.thumbnails[:1], blank.thumbnails[2:3])[0] == pytest.approx(1)
    assert colour_match(blank.thumbnails[:1], look([disc("red")]).thumbnails)[0] < 0.2


def test_colour_tells_apart_what_the_hash_confuses():
    red, blue = look([disc((200, 0, 0))]), look([disc((0, 0, 255))])
    both = Looks(np.concatenate([red.hashes, blue.hashes]), np.concatenate([red.thumbnails, blue.thumbnails]))
    assert bits(both)[0, 1] <= 6
    assert len(near_pairs(both, BITS_ONLY)[0]) == 1
    assert len(near_pairs(both, Near())[0]) == 0


# --- the search --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("radius", [0, 1, 3, 6, 10])
@pytest.mark.parametrize("match", [-1.0, 0.9])
def test_pairs_equal_brute_force(radius, match, monkeypatch):
    monkeypatch.setattr(hamming, "CANDIDATES", 50)  # many small chunks
    rng = np.random.default_rng(radius)
    for rows in (0, 1, 2, 60, 150):
        looks, near = clustered_looks(rng, rows), Near(radius, match)
        left, right, distance = near_pairs(looks, near)
        expected = np.argwhere(np.triu(brute_near(looks, near), 1)) if rows else np.zeros((0, 2))
        assert np.array_equal(np.stack([left, right], 1), expected)
        assert np.array_equal(distance, bits(looks)[left, right])


def test_nearest_equals_brute_force():
    rng = np.random.default_rng(3)
    everything, near = clustered_looks(rng, 200), Near(8, 0.9)
    queries, corpus = everything.take(np.arange(120)), everything.take(np.arange(120, 200))
    row, distance = nearest(queries, corpus, near)
    allowed = brute_near(everything, near)[:120, 120:]
    cost = np.where(allowed, bits(everything)[:120, 120:].astype(int), 99)
    assert np.array_equal(row, np.where(allowed.any(1), cost.argmin(1), -1))
    assert np.array_equal(distance, np.where(allowed.any(1), cost.min(1), -1))


def test_nearest_with_an_empty_side():
    looks = clustered_looks(np.random.default_rng(0), 5)
    assert nearest(looks, looks.take(np.arange(0)), Near())[0].tolist() == [-1] * 5
    assert len(nearest(looks.take(np.arange(0)), looks, Near())[0]) == 0


@pytest.mark.parametrize("seed", range(6))
def test_greedy_twins_equal_the_sequential_walk(seed):
    rng = np.random.default_rng(seed)
    looks, near = clustered_looks(rng, 150), Near(5, 0.9)
    priority = rng.permutation(150)
    kept, adjacent = [], brute_near(looks, near)
    for row in np.argsort(priority):
        if not any(adjacent[row, other] for other in kept):
            kept.append(row)
    keeper, distance = greedy_twins(looks, priority, near)
    assert sorted(kept) == np.flatnonzero(keeper == np.arange(150)).tolist()
    for row in range(150):
        assert keeper[row] in kept and bits(looks)[row, keeper[row]] == distance[row] <= near.radius
        assert row in kept or adjacent[row, keeper[row]]


def test_a_chain_keeps_its_far_end_but_is_one_cluster():
    """0 - 4 - 8 bits: the middle is near both ends, the ends are not near each other."""
    looks = Looks(np.array([0, 0b1111, 0b11111111], np.uint64), np.zeros((3, 192), np.uint8))
    keeper, distance = greedy_twins(looks, np.arange(3), Near(4))
    assert keeper.tolist() == [0, 0, 2] and distance.tolist() == [0, 4, 0]
    assert len(set(clusters(looks, Near(4)))) == 1
    assert len(set(clusters(looks, Near(3)))) == 3


def test_clusters_equal_transitive_closure():
    looks, near = clustered_looks(np.random.default_rng(9), 120), Near(4, 0.9)
    reach = brute_near(looks, near)
    for _ in range(7):
        reach = (reach.astype(int) @ reach.astype(int)) > 0
    labels = clusters(looks, near)
    assert np.array_equal(labels[:, None] == labels[None, :], reach)


def test_a_radius_or_match_out_of_range_is_refused():
    with pytest.raises(UserError, match="expected 0 to 20"):
        Near(radius=33)
    with pytest.raises(UserError, match="expected a correlation"):
        Near(match=1.5)


# --- real pictures -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def figures():
    if not TEXTBOOKS.exists():
        pytest.skip(f"{TEXTBOOKS} is not here: the textbook figures come with the workplace, not with the project")
    names = pq.read_table(TEXTBOOKS / "pairs.parquet", columns=["file"])["file"].to_pylist()[::20]
    images = [Image.open(TEXTBOOKS / name).convert("RGB") for name in names]
    return images, look(images)


CHANGES = {
    "re-encoded": lambda image: reencoded(image, 50),
    "resized": lambda image: image.resize((max(image.width * 3 // 5, 1), max(image.height * 3 // 5, 1))),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "both": lambda image: reencoded(image.resize((max(image.width * 7 // 8, 1), max(image.height * 7 // 8, 1)))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_figures_stay_near(figures, change):
    images, original = figures
    changed = look([CHANGES[change](image) for image in images])
    distance = np.bitwise_count(original.hashes ^ changed.hashes)
    match = colour_match(original.thumbnails, changed.thumbnails)
    assert ((distance <= Near().radius) & (match >= Near().match)).mean() >= 0.99


def test_different_figures_are_far(figures):
    """Of about 20,000 pairs of different figures hardly any is near, and half are about 32 bits apart."""
    _, looks = figures
    distance = bits(looks)[np.triu_indices(len(looks), 1)]
    assert np.median(distance) in range(28, 37)
    assert len(near_pairs(looks, Near())[0]) <= 2
