"""Colours as a person sees them, and hostile bytes."""

import io
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from vlmpipe.curate.pixels import Decoder, Unusable, to_ppm, to_rgb

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
LIMIT = 1_000_000


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def colour(data, at=(2, 2)):
    return to_rgb(data, LIMIT).getpixel(at)


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
def test_exif_orientation(orientation, corner):
    image = Image.new("RGB", (30, 20))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = to_rgb(encoded(image, exif=exif), LIMIT)
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


def test_a_bomb_is_refused_by_its_header():
    data = bytearray(encoded(Image.new("RGB", (8, 8)), "BMP"))
    data[18:26] = (50_000).to_bytes(4, "little") * 2
    started = time.monotonic()
    with pytest.raises(Unusable, match=r"^decompression_bomb: "):
        to_rgb(bytes(data), LIMIT)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("data, reason", [
    (b"", "not_an_image: an empty body"), (b"<!doctype html><p>", "not_an_image: an html page"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"), (b"\x89PNG\r\n\x1a\nxx", "broken_image"),
    (encoded(Image.effect_noise((90, 90), 50), "JPEG")[:-60], "broken_image"),
])
def test_what_is_no_image_says_why(data, reason):
    with pytest.raises(Unusable, match=f"^{reason}"):
        to_rgb(data, LIMIT)


def test_ppm_is_what_opencv_reads_without_loss():
    import cv2

    pixels = np.random.default_rng(0).integers(0, 255, (7, 5, 3), dtype=np.uint8)
    read = cv2.imdecode(np.frombuffer(to_ppm(Image.fromarray(pixels)), np.uint8), cv2.IMREAD_UNCHANGED)
    assert (read[..., ::-1] == pixels).all()


@pytest.mark.skipif(not (SHARED / "hostile-images").exists(), reason="no ../shared/data/hostile-images here")
def test_hostile_files_decode_or_are_refused_as_known():
    known = json.loads((SHARED / "hostile-images" / "index.json").read_text())
    for entry in known:
        try:
            image = to_rgb((SHARED / "hostile-images" / entry["file"]).read_bytes(), 80_000_000)
            assert entry["decodes"] and image.mode == "RGB", entry
        except Unusable as error:
            assert not entry["decodes"], (entry, error)


CHILD = """
import os, sys, time
from vlmpipe.curate.pixels import Decoded, serve
def convert(data):
    print("noise on standard output")
    if data == b"die": os.abort()
    if data == b"hang": time.sleep(60)
    if data == b"once" and not os.path.exists(sys.argv[1]):
        open(sys.argv[1], "w").close()
        os.abort()
    return Decoded(data[::-1], 1, 2, 3, 4)
serve(convert)
"""


def test_the_decoder_survives_what_kills_or_hangs_its_child(tmp_path):
    decoder = Decoder([sys.executable, "-c", CHILD, str(tmp_path / "mark")], timeout=2.0)
    large = bytes(range(256)) * 20_000
    assert decoder.decode(large).image == large[::-1]
    assert decoder.decode(b"die").error.startswith("decoder_crash: ")
    assert decoder.decode(b"hang").error.startswith("decoder_timeout: ")
    assert decoder.decode(b"once").image == b"ecno"
    decoder.close()


def test_a_decoder_that_cannot_start_is_an_error_and_not_a_bad_image():
    with pytest.raises(RuntimeError, match="did not start"):
        Decoder([sys.executable, "-c", "raise SystemExit(3)"], timeout=1.0).decode(b"x")
