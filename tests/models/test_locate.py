"""Masks and boxes in the picture's own pixels."""

import pytest
import torch
import transformers
from PIL import Image

from tests.models.heads.test_pointing import make
from tests.models.tiny import pictures
from vlmpipe.errors import UserError
from vlmpipe.models.locate import detect, segment, window
from vlmpipe.models.pretrained import HuggingFaceProcessor


def test_masks_are_as_large_as_the_picture():
    model, processor = make()
    image = pictures(1)[0]
    found = segment(model, processor, image, ["red", "a blue square"])
    assert found.shape == (2, image.height, image.width)
    assert ((found > 0) & (found < 1)).all()


def test_what_a_crop_cuts_off_is_nothing():
    model, processor = make()
    processor.config = type(processor.config)(resize="crop")
    found = segment(model, processor, Image.new("RGB", (60, 40)), ["red"])
    assert window(processor, (60, 40)) == (10, 0, 50, 40)
    assert (found[:, :, :10] == 0).all() and (found[:, :, 50:] == 0).all() and (found[:, :, 10:50] > 0).all()


def test_boxes_are_in_pixels_the_surest_first():
    model, processor = make()
    with torch.no_grad():
        model.detection.box[-1].weight.zero_()
    found = detect(model, processor, Image.new("RGB", (80, 40)), ["red", "blue"], least=0.0)
    assert found.boxes.shape == (16, 4) and set(found.phrases.tolist()) <= {0, 1}
    assert (found.scores[:-1] >= found.scores[1:]).all()
    widths = found.boxes[:, 2] - found.boxes[:, 0]
    torch.testing.assert_close(widths.max(), torch.tensor(20.0), atol=0.1, rtol=0)
    assert found.boxes[:, 2].max() <= 80 and found.boxes[:, 3].max() <= 40
    assert len(detect(model, processor, Image.new("RGB", (80, 40)), ["red"], least=1.0).boxes) == 0


def test_nothing_to_look_for_or_to_look_with():
    model, processor = make(mask=None)
    image = pictures(1)[0]
    with pytest.raises(UserError, match="found no phrase"):
        detect(model, processor, image, [])
    with pytest.raises(UserError, match=r"without heads\.mask"):
        segment(model, processor, image, ["red"])


def test_the_part_that_a_hugging_face_image_processor_cuts_out():
    def seen(pictures, size):
        return window(HuggingFaceProcessor(pictures, None, 32, 16), size)

    crop = transformers.CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    assert seen(crop, (200, 100)) == (60, 10, 140, 90)
    assert seen(transformers.OwlViTImageProcessorPil(), (200, 100)) == (0, 0, 200, 100)
    assert seen(transformers.ViTImageProcessorPil(), (200, 100)) == (0, 0, 200, 100)
