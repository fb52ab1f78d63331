"""Colours as a person sees them, and hostile bytes."""

import io
import json
import threading
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from vlmpipe.errors import UserError
from vlmpipe.images import NotAnImage, decode_rgb, open_image, quiet, to_rgb

HOSTILE = Path(__file__).resolve().parents[2] / "shared" / "data" / "hostile-images"
LIMIT = 1_000_000


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colour(data, at=(2, 2)):
    return decode_rgb(data, LIMIT).getpixel(at)


def near(found, expected, tolerance=6):
    return all(abs(a - b) <= tolerance for a, b in zip(found, expected))


def test_cmyk_comes_out_in_its_colours_with_and_without_the_inversion_that_adobe_writes():
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert near(colour(encoded(ink, "JPEG", quality=95)), (255, 0, 0))
    assert near(colour(encoded(ink, "TIFF")), (255, 0, 0), 0)


def test_lab_is_converted():
    lab = ImageCms.applyTransform(
        Image.new("RGB", (8, 8), (200, 30, 40)),
        ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"))
    assert near(colour(encoded(lab, "TIFF")), (200, 30, 40))


@pytest.mark.parametrize("mode, pixel, expected", [
    ("RGBA", (255, 0, 0, 0), (255, 255, 255)), ("RGBA", (255, 0, 0, 128), (255, 127, 127)),
    ("RGBA", (0, 90, 0, 255), (0, 90, 0)), ("LA", (0, 128), (127, 127, 127)), ("L", 77, (77, 77, 77)),
    ("1", 1, (255, 255, 255)), ("I;16", 65535, (255, 255, 255)), ("I;16", 32896, (128, 128, 128)),
])
def test_png_modes(mode, pixel, expected):
    assert near(colour(encoded(Image.new(mode, (8, 8), pixel))), expected, 1)


def test_transparent_palette_and_colour_key():
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([10, 20, 30, 200, 100, 0] + [0] * 762)
    assert colour(encoded(palette)) == (200, 100, 0)
    assert colour(encoded(palette, transparency=1)) == (255, 255, 255)
    assert colour(encoded(Image.new("RGB", (8, 8), (1, 2, 3)), transparency=(1, 2, 3))) == (255, 255, 255)


@pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (2, (29, 0)), (3, (29, 19)), (4, (0, 19)),
                                                 (5, (0, 0)), (6, (19, 0)), (7, (19, 29)), (8, (0, 29))])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_orientation(orientation, corner, kind):
    image = Image.new("RGB", (30, 20))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = decode_rgb(encoded(image, kind, exif=exif))
    assert upright.size == ((30, 20) if orientation < 5 else (20, 30))
    assert upright.getpixel(corner) == (255, 255, 255)


def swapped_profile():
    """sRGB with its red and green primaries exchanged, under another name."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = data.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))
    return data.replace(b"rXYZ", b"????").replace(b"gXYZ", b"rXYZ").replace(b"????", b"gXYZ")


def test_the_embedded_profile_is_applied_and_a_damaged_one_is_not():
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    assert near(colour(encoded(red, icc_profile=swapped_profile())), (0, 255, 0))
    assert colour(encoded(red, icc_profile=b"not a profile" * 20)) == (255, 0, 0)


def test_a_palette_and_what_lies_on_white_go_through_the_profile_too():
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0] + [0] * 765)
    assert near(colour(encoded(palette, icc_profile=swapped_profile())), (0, 255, 0))
    opaque = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    assert near(colour(encoded(opaque, icc_profile=swapped_profile())), (0, 255, 0))


@pytest.mark.parametrize("values, bits, expected", [
    (np.uint16([[0, 4095]]), 12, (0, 255)),  # twelve bits in sixteen: white is 4095
    (np.float32([[0.0, 1.0]]), None, (0, 255)),
    (np.float32([[0.0, 200.0]]), None, (0, 200)),
    (np.float32([[-40.0, 40.0]]), None, (0, 255)),  # measurements: from the least to the most
    (np.int32([[0, 65535]]), None, (0, 255)),
])
def test_deep_grey_is_scaled_by_the_depth_of_the_file_or_by_its_values(values, bits, expected):
    image = Image.fromarray(values)
    image.tag_v2 = {258: (bits,)} if bits else {}
    assert tuple(np.asarray(to_rgb(image))[0, :, 0]) == expected


def test_once_is_enough_and_the_original_stays_as_it_was():
    exif = Image.Exif()
    exif[0x0112] = 6
    opened = Image.open(io.BytesIO(encoded(Image.new("RGB", (8, 4), (255, 0, 0)), exif=exif,
                                           icc_profile=swapped_profile())))
    once = to_rgb(opened)
    assert once.size == (4, 8) and near(once.getpixel((1, 1)), (0, 255, 0))
    assert to_rgb(once) is once
    assert opened.size == (8, 4) and opened.getpixel((1, 1)) == (255, 0, 0)


def test_a_bomb_inside_an_icon_is_refused_and_other_users_of_pillow_keep_their_limit():
    before = Image.MAX_IMAGE_PIXELS
    icon = bytearray(encoded(Image.new("RGB", (64, 64)), "ICO", sizes=[(64, 64)]))
    start = icon.index(b"IHDR") + 4
    icon[start : start + 8] = (40_000).to_bytes(4, "big") * 2
    icon[start + 13 : start + 17] = zlib.crc32(icon[start - 4 : start + 13]).to_bytes(4, "big")
    with pytest.raises(NotAnImage, match=r"^decompression_bomb: "):
        decode_rgb(bytes(icon), LIMIT)
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_bomb_is_refused_by_its_header():
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "BMP"))
    data[18:26] = (50_000).to_bytes(4, "little") * 2
    started = time.monotonic()
    with pytest.raises(NotAnImage, match=r"^decompression_bomb: "):
        decode_rgb(bytes(data), LIMIT)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("data, reason", [
    (b"", "not_an_image: an empty body"), (b"<!doctype html><p>", "not_an_image: an html page"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"), (b"\x89PNG\r\n\x1a\nxx", "broken_image"),
    (encoded(Image.effect_noise((90, 90), 50), "JPEG")[:-60], "broken_image"),
])
def test_what_is_no_image_says_why(data, reason):
    with pytest.raises(NotAnImage, match=f"^{reason}"):
        decode_rgb(data, LIMIT)


def test_open_image_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="found no file"):
        open_image(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_text("hello")
    with pytest.raises(UserError, match="expected a picture"):
        open_image(tmp_path / "x.jpg")


@pytest.mark.skipif(not HOSTILE.exists(), reason="no ../shared/data/hostile-images here")
def test_hostile_files_decode_or_are_refused_as_known():
    known = json.loads((HOSTILE / "index.json").read_text())
    for entry in known:
        try:
            image = decode_rgb((HOSTILE / entry["file"]).read_bytes())
            assert entry["decodes"] and image.mode == "RGB", entry
        except NotAnImage as error:
            assert not entry["decodes"], (entry, error)
            assert error.reason in {"not_an_image", "broken_image", "decompression_bomb"}, entry


def test_threads_share_pillows_settings_and_leave_them_as_they_were():
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    inside, leave = threading.Event(), threading.Event()

    def first():
        with quiet():
            inside.set()
            leave.wait(5)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(5)
    with quiet():
        leave.set()
        thread.join()
        assert warnings.filters != filters, "the first thread's leaving must not end the second one's quiet"
    assert (Image.MAX_IMAGE_PIXELS, list(warnings.filters)) == (limit, filters)
