"""What is stored of a picture: its size, its colours, and no loss that can be avoided."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from vlmpipe.curate.convert import bare_jpeg, convert, fitted
from vlmpipe.curate.pixels import ResizeMode, Wanted
from vlmpipe.images import decode_rgb


def smooth(width, height, seed=0):
    corners = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.BICUBIC)


def encoded(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data):
    return np.asarray(decode_rgb(data)).astype(int)


def exif(orientation, **tags):
    made = Image.Exif()
    made[0x0112] = orientation
    for tag, value in tags.items():
        made[int(tag[1:])] = value
    return made


@pytest.mark.parametrize("mode", ResizeMode.__args__)
def test_sizes_and_pixels_are_those_of_img2dataset(mode, monkeypatch):
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for a newer version of itself
    from img2dataset.resizer import Resizer

    theirs = Resizer(64, mode, True, encode_quality=95)
    for width, height in ((200, 100), (101, 150), (64, 64), (63, 90), (40, 30), (500, 3), (65, 64)):
        data = encoded(smooth(width, height), "PNG")
        ours = convert(data, Wanted(image_size=64, resize_mode=mode))
        image, *sizes, error = theirs(io.BytesIO(data))
        assert error is None and [ours.width, ours.height, ours.original_width, ours.original_height] == sizes
        assert abs(pixels(ours.image) - pixels(image)).mean() < 1.5, (width, height)


def test_a_reduced_decode_gives_the_same_size_and_nearly_the_same_picture():
    for size in ((1000, 700), (640, 480), (333, 517), (512, 512)):
        data = encoded(smooth(*size), quality=95)
        fast, exact = (convert(data, Wanted(image_size=128, reduced=reduced)) for reduced in (True, False))
        assert (fast.width, fast.height) == (exact.width, exact.height) == fitted(size, Wanted(image_size=128))
        assert (fast.original_width, fast.original_height) == size
        assert abs(pixels(fast.image) - pixels(exact.image)).mean() < 2.5


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_large_turned_jpeg_comes_out_upright(turn):
    image = Image.new("RGB", (300, 200), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 60, 40))
    upright = decode_rgb(encoded(image, "PNG", exif=exif(turn)))
    stored = convert(encoded(image, quality=95, exif=exif(turn)), Wanted(image_size=96))
    assert (stored.original_width, stored.original_height) == upright.size
    assert abs(pixels(stored.image) - np.asarray(upright.resize((stored.width, stored.height))).astype(int)).mean() < 4


def test_a_small_jpeg_is_stored_bit_for_bit_but_for_its_remarks():
    plain = encoded(smooth(90, 60), quality=70)
    remarked = encoded(smooth(90, 60), quality=70, exif=exif(1, t271="a camera"), comment=b"who", dpi=(72, 72))
    assert b"a camera" in remarked
    for data in (plain, remarked + b"what follows"):
        stored = convert(data, Wanted(image_size=96))
        assert (stored.width, stored.height) == (90, 60) == Image.open(io.BytesIO(stored.image)).size
        assert (pixels(stored.image) == pixels(data)).all() and len(stored.image) <= len(data)
        assert b"a camera" not in stored.image and b"who" not in stored.image
    assert convert(plain, Wanted(image_size=96)).image == bare_jpeg(plain) == plain


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}, {"subsampling": 0}])
def test_every_kind_of_jpeg_keeps_its_pixels(options):
    data = encoded(smooth(70, 50), quality=80, **options)
    assert (pixels(bare_jpeg(data + b"\xff\xd9tail")) == pixels(data)).all()


def test_what_is_not_plain_is_encoded_anew():
    turned = encoded(smooth(90, 60), exif=exif(6))
    grey = encoded(smooth(90, 60).convert("L"))
    cmyk = encoded(Image.new("CMYK", (90, 60), (0, 255, 255, 0)))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))
    for data in (turned, grey, cmyk, encoded(smooth(90, 60), icc_profile=profile)):
        stored = convert(data, Wanted(image_size=96))
        assert Image.open(io.BytesIO(stored.image)).mode == "RGB"
        assert abs(pixels(stored.image) - pixels(data)).mean() < 2
    red = pixels(convert(cmyk, Wanted(image_size=96)).image)[30, 30]
    assert abs(red - (255, 0, 0)).max() < 8


@pytest.mark.parametrize("image, kind, options, colour", [
    (Image.new("RGBA", (80, 80), (255, 0, 0, 128)), "PNG", {}, (255, 127, 127)),
    (Image.fromarray(np.full((80, 80), 32896, np.uint16)), "PNG", {}, (128, 128, 128)),
    (Image.new("P", (80, 80), 1), "GIF", {}, None),
    (Image.new("RGB", (80, 80), (10, 200, 30)), "WEBP", {"lossless": True}, (10, 200, 30)),
    (Image.new("RGB", (80, 80), (10, 200, 30)), "GIF",
     {"save_all": True, "append_images": [Image.new("RGB", (80, 80), (0, 0, 0))]}, (10, 200, 30)),
    (Image.new("RGB", (80, 80), (10, 200, 30)), "PNG",
     {"save_all": True, "append_images": [Image.new("RGB", (80, 80), (0, 0, 0))]}, (10, 200, 30)),
])
@pytest.mark.parametrize("size", [96, 32])
def test_modes_and_animations_come_out_in_their_colours(image, kind, options, colour, size):
    if colour is None:
        image.putpalette([0, 0, 0, 200, 100, 0] + [0] * 762)
        colour = (200, 100, 0)
    stored = convert(encoded(image, kind, **options), Wanted(image_size=size))
    assert stored.width == min(80, size)
    assert abs(pixels(stored.image)[9, 9] - colour).max() <= 4


def test_damaged_and_oversized_files_are_refused_even_where_they_would_be_stored_as_they_came():
    data = encoded(smooth(90, 60))
    assert convert(data[:-200], Wanted(image_size=96)).error.startswith("broken_image: ")
    assert convert(encoded(smooth(900, 600))[:-2000], Wanted(image_size=96)).error.startswith("broken_image: ")
    assert convert(data, Wanted(max_pixels=1000)).error.startswith("decompression_bomb: ")
    assert convert(data, Wanted(min_size=61)).error == "too_small: image too small"
    assert convert(data, Wanted(max_aspect_ratio=1.4)).error == "aspect_ratio: aspect ratio too large"


@pytest.mark.parametrize("cut", [0, 1, 2, 4, 20, 200])
def test_cut_markers_are_never_passed_on(cut):
    assert bare_jpeg(encoded(smooth(60, 60))[:cut]) is None
