"""Text in pictures: read, measured, painted over."""

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw, ImageFont

from tests.curate.made_pools import FakeScorer
from vlmpipe.curate.annotators.base import Batch, NoConfig, Tools
from vlmpipe.curate.annotators.faces import covered
from vlmpipe.curate.annotators.loop import ask
from vlmpipe.curate.annotators.ocr import Ocr, Tmars, mask_text, overlap


def poster() -> Image.Image:
    image = Image.new("RGB", (320, 120), (135, 206, 235))
    ImageDraw.Draw(image).text((20, 40), "SALE TODAY", font=ImageFont.load_default(40), fill="black")
    return image


def test_the_share_of_caption_words_that_the_picture_says():
    assert overlap("Big red SALE now", "red sale") == 0.5
    assert overlap("", "red") == 0 and overlap("a box", "") == 0 and overlap("!!", "!!") == 0


def test_boxes_count_their_union():
    assert covered([[0, 0, 5, 10], [2, 0, 7, 10]], (10, 10)) == pytest.approx(0.7)
    assert covered([], (10, 10)) == 0 and covered([[-5, -5, 50, 50]], (10, 10)) == 1


def test_text_takes_the_colour_around_it():
    array = np.full((40, 60, 3), 200, np.uint8)
    array[10:20, 10:30] = 0
    assert (mask_text(array, [[10, 10, 30, 20]]) == 200).all()
    array[25:35, 10:30] = 0
    assert (mask_text(array, [[10, 10, 30, 20], [10, 25, 30, 35]]) == 200).all(), "a box took another's ink"
    assert (mask_text(np.zeros((4, 4, 3), np.uint8), [[0, 0, 4, 4]]) == 0).all()


def test_printed_words_are_read_and_masking_takes_their_score():
    fake = FakeScorer()
    tools = Tools()
    tools.scorer = fake
    blank = Image.new("RGB", (320, 120), (250, 0, 0))
    batch = Batch([poster(), blank], ["a red sale", "red box"])
    ocr = Ocr(Ocr.Config(), tools)
    *columns, _ = ask(ocr, batch)
    found = dict(zip([field.name for field in ocr.fields], columns))
    assert found["text_in_image"].to_pylist() == ["SALE TODAY", ""]
    assert found["text_overlap"].to_pylist() == pytest.approx([1 / 3, 0])
    area = found["text_area"].to_pylist()
    assert 0.2 < area[0] < 0.5 and area[1] == 0
    batch.columns |= found
    batch.columns["clip_score"] = pa.array(np.array([0.9, 0.8], np.float32))
    masked, errors = ask(Tmars(NoConfig(), tools), batch)
    assert errors.null_count == 2 and masked[1].as_py() == pytest.approx(0.8)
    sky = fake.encode_images([Image.new("RGB", (9, 9), (135, 206, 235))]) @ fake.encode_texts(["a red sale"]).T
    assert masked[0].as_py() == pytest.approx(float(sky[0, 0]), abs=0.01)
