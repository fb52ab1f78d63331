import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmpipe.errors import UserError
from vlmpipe.images import NotAnImage, decode_rgb, open_image

HOSTILE = Path(__file__).parents[1] / "../shared/data/hostile-images"


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(data):
    return decode_rgb(data).getpixel((0, 0))


def test_alpha_goes_over_white():
    assert pixel(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))) == (255, 255, 255)
    assert pixel(encode(Image.new("RGBA", (4, 4), (255, 0, 0, 255)))) == (255, 0, 0)
    assert pixel(encode(Image.new("LA", (4, 4), (0, 0)))) == (255, 255, 255)


def test_transparent_palette_goes_over_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 255] + [0] * 765)
    assert pixel(encode(image)) == (0, 0, 255)
    assert pixel(encode(image, transparency=0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_cut():
    grey = Image.fromarray(np.full((4, 4), 32896, dtype=np.uint16))
    assert pixel(encode(grey)) == (128, 128, 128)


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_rgb(encode(image, "JPEG", exif=exif)).size == (4, 8)


def test_cmyk_comes_out_red():
    red = pixel(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert red[0] > 200 and red[1] < 60 and red[2] < 60


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not_an_image"),
        (b"<html>no</html>", "not_an_image"),
        (encode(Image.new("RGB", (64, 64)), "JPEG")[:300], "not_an_image|broken_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
    ],
)
def test_what_is_no_picture_has_a_reason(data, reason):
    with pytest.raises(NotAnImage) as error:
        decode_rgb(data)
    assert error.value.reason in reason.split("|")


def test_a_bomb_is_refused_by_its_header():
    with pytest.raises(NotAnImage) as error:
        decode_rgb(encode(Image.new("1", (3000, 3000))), max_pixels=1_000_000)
    assert error.value.reason == "decompression_bomb"


def test_open_image_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match="found no file"):
        open_image(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_text("hello")
    with pytest.raises(UserError, match="expected a picture"):
        open_image(tmp_path / "x.jpg")


@pytest.mark.skipif(not HOSTILE.exists(), reason="needs ../shared/data/hostile-images")
def test_hostile_files_decode_or_are_refused_as_listed():
    index = {row["file"]: row["decodes"] for row in json.loads((HOSTILE / "index.json").read_text())}
    decoded = set()
    for name in index:
        try:
            assert decode_rgb((HOSTILE / name).read_bytes()).mode == "RGB"
            decoded.add(name)
        except NotAnImage as error:
            assert error.reason in {"not_an_image", "broken_image", "decompression_bomb"}, name
    # Odd formats that nobody serves as web pictures (FLI, ...) may be refused; nothing broken may pass.
    assert decoded <= {name for name, decodes in index.items() if decodes}
    assert len(decoded) >= 25
